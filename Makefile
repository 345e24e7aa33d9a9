# Two commands: `make serve` and `make test`. Everything they need goes into .venv.

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
	$(BIN)/python -m pytest -q

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

bench: $(VENV)/.dev ## the benchmarks, as tables
	$(BIN)/python -m benchmarks

soak: $(VENV)/.dev $(REPOSITORY)/flownet2/1/model.onnx ## 64 clients for a minute, while servers die and memory fills up
	unshare --mount --map-root-user sh -c \
	  'mount -t tmpfs -o size=512m tmpfs /dev/shm; exec $(BIN)/python -m benchmarks.soak'

parity: $(VENV)/.dev ## ONNX Runtime against PyTorch, every network at every size
	$(BIN)/python -m pytest -q -s -m long

images-test: $(VENV)/.dev ## both Dockerfiles, built with buildah on stand-in bases and run (as root)
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

model: $(VENV)/.serve ## put back the Triton model of the weights that ship
	$(BIN)/python -m export.shipped --repository $(REPOSITORY)

# A model of other weights, exported to its place, stays there.
$(REPOSITORY)/flownet2/1/model.onnx: $(wildcard weights/flownet2.*) export/shipped.py export/repository.py export/half.py flownet2/contract.py | $(VENV)/.serve
	@$(BIN)/python -m export.shipped --repository $(REPOSITORY) --keep-other

# An environment is made anew when what it installs has changed.
$(VENV)/.serve: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing what the service needs into $(VENV): a minute or two, at the first start alone"
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

openapi: $(VENV)/.dev ## write openapi.json anew
	$(BIN)/python -m gateway.openapi > openapi.json

lock: $(VENV)/.dev ## pin what is installed
	{ echo "# Versions that were tested together; made by \`make lock\`."; \
	  $(BIN)/python -m pip freeze --exclude-editable \
	  | sed -E 's/\+cpu$$//; s/^numpy==(.*)$$/numpy==\1; python_version < "3.13"\nnumpy==2.5.5; python_version >= "3.13"/'; \
	} > constraints.txt

clean: ## remove the environment and what was built; models, training runs and downloads stay
	rm -rf $(VENV) build
