"""The parts of the benchmarks: perf_analyzer, the web layers, the small functions."""

import base64
import subprocess
import sys
from pathlib import Path

import httpx2
import numpy as np
import pytest
import torch
from PIL import Image
from tritonclient import grpc

from benchmarks import gpu, perf_analyzer, report, samples, web
from export.networks.blocks import CORRELATION
from export.networks.operators import correlation
from launch import triton
from launch.ports import free_ports
from plugins.correlation_cases import Case, brute_force
from tests.support.stack import ROOT


@pytest.fixture
def sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder with the layout of `samples/` and a single pair."""
    folder = tmp_path / "samples" / "noise"
    folder.mkdir(parents=True)
    random = np.random.default_rng(3)
    for index in (0, 1):
        Image.fromarray(random.integers(0, 256, (40, 60, 3), np.uint8)).save(
            folder / f"frame{index}.png"
        )
    monkeypatch.setattr(samples, "SAMPLES", folder.parent)
    return folder


def test_perf_analyzer_loads_triton_with_real_images(
    closed_form_triton: triton.Triton, sample: Path
) -> None:
    try:
        program = perf_analyzer.PerfAnalyzer()
    except perf_analyzer.Unavailable as reason:
        pytest.skip(str(reason))
    table = program.measure(closed_form_triton.address, (1, 2), rounds=4)
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    assert [row[0] for row in rows] == ["1", "2"]
    for _, pairs_per_second, p50, p95 in rows:
        assert float(pairs_per_second) > 0
        assert float(p50) <= float(p95)


def test_perf_analyzer_says_what_is_wrong(
    closed_form_triton: triton.Triton, sample: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        program = perf_analyzer.PerfAnalyzer()
    except perf_analyzer.Unavailable as reason:
        pytest.skip(str(reason))
    monkeypatch.setattr(perf_analyzer, "SIZE", -1)
    monkeypatch.setattr(perf_analyzer, "sample_pair", dict)
    with pytest.raises(perf_analyzer.Unavailable, match="perf_analyzer failed: "):
        program.measure(closed_form_triton.address, (1,), rounds=1)


def test_no_perf_analyzer_for_other_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(perf_analyzer.Unavailable, match="no perf_analyzer for Linux aarch64"):
        perf_analyzer.PerfAnalyzer(tmp_path)


def test_pair_for_perf_analyzer_is_the_resized_sample(sample: Path) -> None:
    pair = perf_analyzer.sample_pair()
    with Image.open(sample / "frame1.png") as image:
        resized = np.asarray(image.resize((512, 512), Image.Resampling.LANCZOS))
    pixels = np.frombuffer(base64.b64decode(pair["image2"]["b64"]), np.uint8)
    np.testing.assert_array_equal(pixels.reshape(512, 512, 3), resized)


def test_plain_web_layer_answers_as_the_gateway_does(sample: Path) -> None:
    request = web.requests(web.sample_frames())[0]
    flows, names = [], []
    with web.instant_triton() as address:
        for served in (web.gateway_of(address, 1), web.plain_web_layer(address)):
            with served as service:
                before = service.cpu()
                assert web.load(service.port, request, clients=2, seconds=0.2) >= 2
                assert service.cpu() > before
                url = f"http://127.0.0.1:{service.port}{request.path}"
                document = httpx2.post(url, content=request.body, timeout=60).json()
                names.append(document.keys())
                flows.append(document["flow"])
    assert names[0] == names[1]
    np.testing.assert_allclose(flows[0], flows[1], rtol=1e-6)


def test_own_servers_are_measured_without_a_proxy(
    closed_form_triton: triton.Triton, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_ports(1)[0]}")
    monkeypatch.setenv("no_proxy", "example.org")
    report.bypass_proxies()
    address = closed_form_triton.address
    assert httpx2.get(f"http://{address.http}/v2/health/ready").status_code == 200
    with grpc.InferenceServerClient(address.grpc) as client:
        assert client.is_server_ready(client_timeout=30)


def test_table_is_markdown() -> None:
    assert report.table(("a", "b"), [("x", "1")]) == "| a | b |\n| --- | ---: |\n| x | 1 |\n"


@pytest.mark.parametrize(("seconds", "text"), [(0.00123, "1.2"), (0.0999, "99.9"), (2.5, "2500")])
def test_milliseconds(seconds: float, text: str) -> None:
    assert report.milliseconds(seconds) == text


def test_the_gpu_benchmark_gives_the_kernel_what_the_network_means() -> None:
    def kernel(case: Case, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(brute_force(case, a.numpy(), b.numpy())).to(a)

    a, b = torch.randn(2, 1, 4, 6, 9)
    torch.testing.assert_close(gpu.correlation_with(kernel)(a, b), correlation(a, b, **CORRELATION))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("benchmark", ["gpu", "correlation"])
def test_the_gpu_benchmarks_say_what_they_lack(benchmark: str) -> None:
    """In NVIDIA's PyTorch image, where there is no OpenVINO, they start."""
    code = f"""if True:
        import runpy, sys
        sys.modules["openvino"] = None
        runpy.run_module("benchmarks.{benchmark}", None, "__main__")
    """
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr == f"benchmarks.{benchmark}: no GPU that PyTorch can use\n"
