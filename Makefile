# `make serve` and `make test` install all that they need into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

REPOSITORY := model_repository
NETWORK ?= FlowNet2

.PHONY: help serve reload test lint bench soak parity images-test up plugins weights model openapi lock clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

serve: $(VENV)/.serve $(REPOSITORY)/flownet2/1/model.onnx ## run Triton and the gateway on http://127.0.0.1:5003
	@$(BIN)/python -m launch.gpu
	@$(BIN)/python -m launch

reload: ## have a running `make serve` load the models of the repository again
	@$(BIN)/python -m launch.state

test: $(VENV)/.dev lint ## lint, types and the whole test suite
	$(BIN)/python -m pytest -q --ignore tests/training
	$(BIN)/python -m pytest -q tests/training  # apart: it crashed beside the engines' thread pools

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

bench: $(VENV)/.dev ## the benchmarks, as tables
	$(BIN)/python -m benchmarks

soak: $(VENV)/.dev $(REPOSITORY)/flownet2/1/model.onnx ## chaos test: 64 clients while processes are killed and /dev/shm fills up
	unshare --mount --map-root-user sh -c \
	  'mount -t tmpfs -o size=512m tmpfs /dev/shm; exec $(BIN)/python -m benchmarks.soak'

parity: $(VENV)/.dev ## compare ONNX Runtime with PyTorch, every network at every size
	$(BIN)/python -m pytest -q -s -m long

images-test: $(VENV)/.dev ## build both Dockerfiles with buildah on stand-in bases, and run them (as root)
	$(BIN)/python -m pytest -q -s -m images tests/deploy

up: ## the same service from docker-compose.yml: on the GPU where there is one
	docker compose --profile $(if $(shell command -v nvidia-smi),gpu,cpu) up --build

plugins: ## build the compiled correlation for the GPU (with nvcc, CMake and a C++ compiler)
	plugins/fetch_headers.sh build/onnxruntime
	cmake -S plugins -B build/plugins
	cmake --build build/plugins --parallel

weights: | $(BIN)/python ## download official weights (research only) and export them: make weights NETWORK=FlowNet2
	$(PIP_INSTALL) -e '.[serve,export]'
	$(BIN)/python -m export --network $(NETWORK) --weights official --repository $(REPOSITORY)

model: $(VENV)/.serve ## restore the model of the weights that ship
	$(BIN)/python -m export.shipped --repository $(REPOSITORY)

# A model of other weights that was exported to this place is kept.
$(REPOSITORY)/flownet2/1/model.onnx: $(wildcard weights/flownet2.*) export/shipped.py export/repository.py export/half.py flownet2/contract.py | $(VENV)/.serve
	@$(BIN)/python -m export.shipped --repository $(REPOSITORY) --keep-other

# The environment is updated when its requirements have changed.
$(VENV)/.serve: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing what the service needs into $(VENV): a minute or two, only at the first start"
	@$(PIP_INSTALL) -e '.[serve]'
	@$(PIP_INSTALL) --no-deps nvidia-pytriton
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e '.[dev]'
	$(PIP_INSTALL) --no-deps nvidia-pytriton
	@plugins/fetch_headers.sh build/onnxruntime >/dev/null \
	  || echo "No ONNX Runtime headers: the tests of its correlation op will be skipped"
	@touch $@ $(VENV)/.serve

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else \
	  "$(PYTHON) is Python %d.%d, and 3.11 to 3.13 is needed: name one, as in PYTHON=python3.12" % v)'
	$(PYTHON) -m venv $(VENV) || { echo "Python's venv module is missing: apt-get install python3-venv"; rm -rf $(VENV); exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip

openapi: $(VENV)/.dev ## write openapi.json
	$(BIN)/python -m gateway.openapi > openapi.json

lock: $(VENV)/.dev ## pin the installed versions
	{ echo "# Versions that were tested together; made by \`make lock\`."; \
	  $(BIN)/python -m pip freeze --exclude-editable \
	  | sed -E 's/\+cpu$$//; s/^numpy==(.*)$$/numpy==\1; python_version < "3.13"\nnumpy==2.5.5; python_version >= "3.13"/'; \
	} > constraints.txt

clean: ## remove the environment and all builds; models, training runs and downloads are kept
	rm -rf $(VENV) build
