"""The README's examples do what they say."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import av
import pytest
from PIL import Image

from benchmarks import perf_analyzer
from gateway import settings
from tests.support.stack import ROOT, Stack

README = (ROOT / "README.md").read_text()
# From "Use it" up to "Networks and weights".
EXAMPLES = re.findall(
    r"^```(sh|python)\n(.*?)^```",
    README[README.index("## Use it") : README.index("## Networks and weights")],
    re.DOTALL | re.MULTILINE,
)
DEFAULT_PORTS = {"PORT": "5003", "TRITON_HTTP_PORT": "8000", "TRITON_GRPC_PORT": "8001"}


def test_examples(stack: Stack, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "samples", tmp_path / "samples")
    write_film(tmp_path / "film.mp4")
    assert [kind for kind, _ in EXAMPLES] == ["sh", "python", "sh", "sh", "python", "python", "sh"]
    assert "benchmarks.perf_analyzer" in EXAMPLES[-1][1]
    try:
        perf_analyzer.PerfAnalyzer()
        examples = EXAMPLES
    except perf_analyzer.Unavailable:  # no network, or a machine that it is not made for
        examples = EXAMPLES[:-1]
    ports = {name: str(port) for name, port in stack.ports.items()}
    output = ""
    for kind, text in examples:
        python = shlex.quote(sys.executable)
        example = text.replace(".venv/bin/python", python)
        example = example.replace(".venv/bin/flownet2", f"{python} -m flownet2")
        for variable, port in DEFAULT_PORTS.items():
            example = example.replace(f"127.0.0.1:{port}", f"127.0.0.1:{stack.ports[variable]}")
        command = ["bash", "-euc"] if kind == "sh" else [sys.executable, "-W", "ignore", "-c"]
        done = subprocess.run(
            [*command, example],
            cwd=tmp_path,
            env={**os.environ, **ports, "FLOWNET2_URL": stack.url, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        output += done.stdout
    response = json.loads((tmp_path / "response.json").read_text())
    assert len(response["flow"]) == 512
    shown = re.search(r'"scale_x_back_factor": (\S+), "scale_y_back_factor": (\S+)}', README)
    assert shown is not None
    assert response["scale_x_back_factor"] == float(shown[1])
    assert response["scale_y_back_factor"] == float(shown[2])
    assert (tmp_path / "flow.npy").read_bytes().startswith(b"\x93NUMPY")
    assert (tmp_path / "flow.png").read_bytes().startswith(b"\x89PNG")
    pair, both, over_grpc, over_http, *table = output.strip().splitlines()
    assert pair.startswith("flow.flo: 320x256, ")
    assert both.startswith("(256, 320, 2) float32 0.")
    assert sorted(path.name for path in (tmp_path / "flows" / "film").iterdir()) == [
        "000000.flo",
        "flow.mp4",
        "index.csv",
    ]
    for one in (over_grpc, over_http):
        assert one.startswith("(256, 320, 2) float32 [")
    medians = [[float(x) for x in one.split("[")[1][:-1].split()] for one in (over_grpc, over_http)]
    assert medians[0] == pytest.approx(medians[1], abs=1e-3)
    assert len(examples) < len(EXAMPLES) or table[-1].startswith("| 8 | ")


def write_film(path: Path) -> None:
    """A video of a sample's two frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height = 320, 256
        for number in range(2):
            with Image.open(ROOT / "samples" / "layers_0" / f"frame{number}.png") as image:
                container.mux(stream.encode(av.VideoFrame.from_image(image.convert("RGB"))))
        container.mux(stream.encode(None))


def test_settings_table() -> None:
    shown = README[README.index("<!-- settings -->") : README.index("<!-- /settings -->")]
    assert settings.table().strip() in shown


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("https://"):
            assert (ROOT / target).exists(), target
