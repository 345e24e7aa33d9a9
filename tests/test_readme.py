"""The examples of the README and of docs/ run as they stand, in order, on a running service."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import av
import pytest
from PIL import Image

from gateway import settings
from tests.support.stack import ROOT, Stack

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
EXAMPLE = re.compile(
    r"^ *(?:<!-- not run: (?P<reason>[^\n]+) -->\n *)?```(?P<kind>sh|python)\n(?P<text>.*?)^ *```",
    re.DOTALL | re.MULTILINE,
)
DEFAULT_PORTS = {
    "PORT": "5003",
    "TRITON_HTTP_PORT": "8000",
    "TRITON_GRPC_PORT": "8001",
    "TRITON_METRICS_PORT": "8002",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples(page: Path, stack: Stack, tmp_path: Path) -> None:
    """Each example ends with status 0; files that one writes are there for the next."""
    shutil.copytree(ROOT / "samples", tmp_path / "samples")
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    write_film(tmp_path / "film.mp4")
    for example in EXAMPLE.finditer(page.read_text()):
        if not example["reason"]:
            run(example["kind"], textwrap.dedent(example["text"]), stack, tmp_path)


def run(kind: str, text: str, stack: Stack, folder: Path) -> None:
    """Run an example with this Python, against the ports of the test's service."""
    python = shlex.quote(sys.executable)
    text = text.replace(".venv/bin/python", python)
    text = re.sub(r"(?:\.venv/bin/|^)flownet2 ", f"{python} -m flownet2 ", text, flags=re.MULTILINE)
    for variable, port in DEFAULT_PORTS.items():
        text = re.sub(rf"(127\.0\.0\.1|localhost):{port}\b", rf"\1:{stack.ports[variable]}", text)
    command = ["bash", "-euo", "pipefail", "-c"] if kind == "sh" else [sys.executable, "-c"]
    done = subprocess.run(
        [*command, text],
        cwd=folder,
        env={
            **os.environ,
            **{name: str(port) for name, port in stack.ports.items()},
            "FLOWNET2_URL": stack.url,
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"


def write_film(path: Path) -> None:
    """Write a video of a sample's two frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height = 320, 256
        for number in range(2):
            with Image.open(ROOT / "samples" / "layers_0" / f"frame{number}.png") as image:
                container.mux(stream.encode(av.VideoFrame.from_image(image.convert("RGB"))))
        container.mux(stream.encode(None))


def test_response_that_the_readme_shows() -> None:
    """The factors in the JSON on the page are those of the request above it."""
    (shown,) = {
        match
        for page in PAGES
        for match in re.findall(
            r'"scale_x_back_factor": ([\d.]+),\s*"scale_y_back_factor": ([\d.]+)}', page.read_text()
        )
    }
    with Image.open(ROOT / "samples" / "layers_0" / "frame0.png") as image:
        assert tuple(map(float, shown)) == (image.width / 512, image.height / 512)


def test_settings_table() -> None:
    """The table of settings is the one that the gateway prints."""
    assert any(settings.table().strip() in page.read_text() for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), target


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
