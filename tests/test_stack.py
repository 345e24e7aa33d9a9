"""The service end to end: images in, right flow out."""

import base64
import io
from collections.abc import Callable
from pathlib import Path

import httpx2
import numpy as np
import pytest
from PIL import Image

from flownet2 import read_flow
from tests.support.gateway_stack import wait_until
from tests.support.stack import ROOT, Stack

SAMPLES = sorted(path.parent for path in (ROOT / "samples").glob("*/gt.flo"))


def post(stack: Stack, *images: bytes, **options: object) -> httpx2.Response:
    body = {f"image{i}_base64": base64.b64encode(x).decode() for i, x in enumerate(images, 1)}
    return httpx2.post(f"{stack.url}/estimate_flow/", json=body, timeout=120, **options)


def epe(flow: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(flow - truth, axis=-1).mean())


def test_there_are_samples() -> None:
    assert len(SAMPLES) >= 3


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda path: path.name)
def test_flow_is_right(stack: Stack, sample: Path) -> None:
    truth = read_flow(sample / "gt.flo")
    height, width, _ = truth.shape
    frames = [(sample / f"frame{i}.png").read_bytes() for i in (0, 1)]

    response = post(stack, *frames).raise_for_status().json()
    grid = np.array(response["flow"], np.float32)
    assert grid.shape == (512, 512, 2)
    assert response["scale_x_back_factor"] == width / 512
    assert response["scale_y_back_factor"] == height / 512
    # A client resizes the matrix, and multiplies nothing.
    back = np.stack(
        [np.asarray(Image.fromarray(grid[..., i]).resize((width, height))) for i in (0, 1)], -1
    )
    zero = epe(np.zeros_like(truth), truth)
    assert epe(back, truth) < zero / 2

    native = post(
        stack, *frames, params={"size": "native"}, headers={"Accept": "application/x-npy"}
    ).raise_for_status()
    flow = np.load(io.BytesIO(native.content))
    assert flow.shape == truth.shape
    assert epe(flow, truth) < zero / 2


def encode(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


MODES: dict[str, Callable[[Image.Image], bytes]] = {
    "grey": lambda image: encode(image.convert("L")),
    "grey with alpha": lambda image: encode(image.convert("LA")),
    "16-bit grey": lambda image: encode(
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    ),
    "palette": lambda image: encode(image.quantize(256)),
    "alpha": lambda image: encode(image.convert("RGBA")),
    "JPEG": lambda image: encode(image, "JPEG", quality=95),
    "WebP": lambda image: encode(image, "WEBP", lossless=True),
    "CMYK JPEG": lambda image: encode(image.convert("CMYK"), "JPEG", quality=95),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes_and_sizes(stack: Stack, mode: str) -> None:
    """Whatever the mode of the images, the flow is near that of the RGB PNGs."""
    frames = [Image.open(SAMPLES[0] / f"frame{i}.png").convert("RGB") for i in (0, 1)]
    frames = [frame.resize((301, 233)) for frame in frames]
    expected = np.array(post(stack, *map(encode, frames)).raise_for_status().json()["flow"])
    response = post(stack, *map(MODES[mode], frames)).raise_for_status().json()
    assert response["scale_x_back_factor"] == 301 / 512
    flow = np.array(response["flow"])
    assert epe(flow, expected) < 0.5 * epe(np.zeros_like(expected), expected)


def test_health_names_the_engine_and_its_golden_difference(stack: Stack) -> None:
    def engines() -> list[dict[str, object]]:
        return httpx2.get(f"{stack.url}/healthz").json()["triton"][0]["engines"]

    wait_until(engines)
    (engine,) = engines()
    assert engine["model"] == "flownet2"
    assert engine["engine"]
    assert engine["device"]
    assert engine["precision"]
    assert 0 <= engine["golden_difference_px"] <= 0.05
