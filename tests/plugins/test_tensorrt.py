"""The TensorRT plugin: built against TensorRT's headers, and driven through a real registry.

TensorRT's headers come with NVIDIA's container or its public repository: name their folder in
TENSORRT_INCLUDE_DIR. The registry and the parser are those of the package `tensorrt-rtx`, which has
TensorRT 11's interfaces and needs no GPU (nor runs a plugin: that needs TensorRT and a GPU).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from plugins.correlation_cases import CASES, REFUSED_CASES, Case
from tests.support.correlation_model import one_node_model
from tests.support.plugins_build import PLUGINS, library, needs, run, tensorrt_rtx

SUPPORT = Path(__file__).parents[1] / "support"
# Loads TensorRT for all, as a server does that links it, then the plugin in the way of argv[2].
PREAMBLE = """
import ctypes, sys
ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
import tensorrt_rtx as trt

class Logger(trt.ILogger):
    def __init__(self):
        super().__init__()

    def log(self, severity, message):
        print(message, flush=True)

logger = Logger()
builder = trt.Builder(logger)
registry = trt.get_plugin_registry()
"""


@dataclass(frozen=True)
class Built:
    """The plugin, the harness linked with it, and the TensorRT library that both use."""

    plugin: Path
    harness: Path
    tensorrt: Path

    def python(self, script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", PREAMBLE + script, self.tensorrt, self.plugin, *arguments],
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    plugin = library("libflownet2_tensorrt.so")
    tensorrt = tensorrt_rtx()
    if tensorrt is None:
        pytest.skip("tensorrt-rtx is not installed")
    folder = tmp_path_factory.mktemp("tensorrt")
    harness = folder / "harness"
    # nvcc finds CUDA's headers, which TensorRT's need.
    run(
        *("nvcc", "-std=c++17", "-I", os.environ["TENSORRT_INCLUDE_DIR"], "-I", PLUGINS, "-c"),
        *(SUPPORT / "tensorrt_harness.cpp", "-o", folder / "harness.o"),
    )
    run(
        *("c++", folder / "harness.o", "-o", harness, "-Wl,--no-as-needed", plugin, tensorrt),
        *(f"-Wl,-rpath,{plugin.parent}", f"-Wl,-rpath,{tensorrt.parent}"),
    )
    return Built(plugin, harness, tensorrt)


@pytest.fixture(scope="module")
def driven(built: Built) -> Built:
    """`built`, where its headers are of the registry's version."""
    version = (Path(os.environ["TENSORRT_INCLUDE_DIR"]) / "NvInferVersion.h").read_text()
    major = re.search(r"MAJOR(?:_ENTERPRISE)? (\d+)", version)
    if major is None or major[1] != "11":
        pytest.skip("tensorrt-rtx has TensorRT 11's interfaces, the headers are of another version")
    return built


def drive(built: Built, cases: list[Case]) -> tuple[list[str], str]:
    """Return the harness's output for the cases, one line each, and its log."""
    lines = [" ".join(map(str, (*case.attributes.values(), *case.shape))) for case in cases]
    done = subprocess.run(
        [built.harness], input="\n".join(lines), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


def test_shapes_types_and_serialization(driven: Built) -> None:
    printed, _ = drive(driven, list(CASES))
    shapes = [tuple(map(int, line.split())) for line in printed]
    assert shapes == [case.output_shape for case in CASES]


def test_refuses_with_a_message(driven: Built) -> None:
    for case, word in REFUSED_CASES:
        printed, log = drive(driven, [case])
        assert printed == ["refused"], case.name
        assert word in log, case.name


def test_exports_what_tensorrt_calls(built: Built) -> None:
    needs("nm")
    symbols = run("nm", "--dynamic", "--defined-only", "--format=just-symbols", built.plugin)
    assert set(symbols.split()) == {"getCreators", "setLoggerFinder"}


REGISTERED = """
name = ("Correlation", "1", "flownet2")
assert registry.get_creator(*name) is None
{load}
assert registry.get_creator(*name) is not None
"""


def test_registers_when_loaded(driven: Built) -> None:
    """Triton's plugins= and trtexec's --staticPlugins only load the library."""
    done = driven.python(REGISTERED.format(load="ctypes.CDLL(sys.argv[2])"))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("before", ["", "ctypes.CDLL(sys.argv[2])\n"], ids=["alone", "loaded"])
def test_registers_through_the_registry(driven: Built, before: str) -> None:
    """trtexec's --dynamicPlugins has the registry load it, also when it was loaded before."""
    load = before + "assert registry.load_library(sys.argv[2]) is not None"
    done = driven.python(REGISTERED.format(load=load))
    assert done.returncode == 0, done.stderr
    assert "exists already" not in done.stdout


def test_registers_when_preloaded(driven: Built) -> None:
    script = "import ctypes; registry = ctypes.CDLL(None).getPluginRegistry; print('registry')"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "LD_PRELOAD": str(driven.plugin)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "registry\n", "")


PARSE = """
ctypes.CDLL(sys.argv[2])
network = builder.create_network(0)
parser = trt.OnnxParser(network, logger)
with open(sys.argv[3], "rb") as file:
    parser.parse(file.read())
"""


@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=lambda dtype: dtype.__name__)
def test_parser_creates_it_from_a_node(
    driven: Built, dtype: type[np.float32 | np.float16], tmp_path: Path
) -> None:
    """The parser finds the plugin by the node's attributes and hands them over.

    It stops after that, one way or another: tensorrt-rtx has no plugin layers.
    """
    model = tmp_path / "model.onnx"
    model.write_bytes(one_node_model(CASES[0], dtype).SerializeToString())
    assert "Successfully created plugin: Correlation" in driven.python(PARSE, model).stdout


def test_parser_passes_the_refusal_on(driven: Built, tmp_path: Path) -> None:
    case, word = REFUSED_CASES[0]
    model = tmp_path / "model.onnx"
    model.write_bytes(one_node_model(case).SerializeToString())
    done = driven.python(PARSE, model)
    assert "Successfully created plugin" not in done.stdout
    assert f"Correlation: {word}" in done.stdout
