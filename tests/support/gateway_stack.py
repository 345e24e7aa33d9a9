"""Support of the gateway's tests: a model repository in closed form, a gateway, image files."""

import base64
import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from PIL import Image

from launch.ports import free_ports

ROOT = Path(__file__).parents[2]
MODEL = Path(__file__).parent / "triton_models" / "model.py"

CONFIG = """name: "{name}"
backend: "python"
max_batch_size: 8
input [ {inputs} ]
output [ {{ name: "flow" data_type: {flow_type} dims: [ -1, -1, 2 ] }} ]
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
dynamic_batching {{
  default_queue_policy {{
    timeout_action: REJECT
    default_timeout_microseconds: 30000000
    allow_timeout_override: true
    max_queue_size: {queue}
  }}
}}
"""


def write_model(
    repository: Path,
    name: str = "flownet2",
    *,
    queue: int = 64,
    flow_type: str = "TYPE_FP32",
    second: str = "image2",
    **parameters: object,
) -> None:
    """Write a model of tests/triton_models into a repository."""
    version = repository / name / "1"
    version.mkdir(parents=True)
    (version / "model.py").symlink_to(MODEL)
    (version / "model.onnx").touch()
    inputs = ", ".join(
        f'{{ name: "{image}" data_type: TYPE_UINT8 dims: [ -1, -1, 3 ] }}'
        for image in ("image1", second)
    )
    config = CONFIG.format(name=name, inputs=inputs, flow_type=flow_type, queue=queue)
    config += "".join(
        f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n'
        for key, value in parameters.items()
    )
    (version.parent / "config.pbtxt").write_text(config)


def write_repository(folder: Path) -> Path:
    """A repository with the default model, slow and faulty ones, and two off the contract."""
    write_model(
        folder,
        network="FlowNet2",
        parameters=162518850,
        weights_source="closed form",
        weights_license="GPL-3.0-or-later",
    )
    write_model(folder, "slow", queue=2, delay_s=2, journal=folder / "journal")
    write_model(folder, "limited", max_pixels=512 * 512)
    write_model(folder, "nan", fault="nan")
    write_model(folder, "far", fault="far")
    write_model(folder, "raising", fault="raise")
    write_model(folder, "wrong_type", flow_type="TYPE_FP16")
    write_model(folder, "wrong_name", second="frame2")
    return folder


def free_port() -> int:
    """A TCP port that is free now."""
    return free_ports(1)[0]


class Gateway:
    """`python -m gateway` as a child process, and a client of it."""

    def __init__(
        self, endpoints: str, log: Path, *, descriptors: int | None = None, **environment: str
    ) -> None:
        host = "[::1]" if environment.get("HOST") == "[::1]" else "127.0.0.1"
        self.url = f"http://{host}:{environment.setdefault('PORT', str(free_port()))}"
        self.log = log
        clean = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("GATEWAY_", "TRITON_", "OTEL_")) and key not in ("HOST", "PORT")
        }
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [
                    *(["prlimit", f"--nofile={descriptors}"] if descriptors else []),
                    sys.executable,
                    "-m",
                    "gateway",
                ],
                cwd=ROOT,
                env={
                    **clean,
                    "TRITON_ENDPOINTS": endpoints,
                    "GATEWAY_PROCESSES": "1",  # on any machine
                    **environment,
                },
                stderr=output,
            )
        self.client = httpx2.Client(base_url=self.url, timeout=60)

    def get(self, path: str) -> int:
        """Status of a GET, or 0 if nothing listens."""
        try:
            return self.client.get(path).status_code
        except httpx2.TransportError:
            return 0

    def stop(self) -> int:
        """Stop it with SIGINT, and return its exit status."""
        self.client.close()
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(30)


@contextlib.contextmanager
def run_gateway(endpoints: str, log: Path, **options: Any) -> Iterator[Gateway]:
    """Run a gateway, and wait until it answers /livez."""
    gateway = Gateway(endpoints, log, **options)
    try:
        wait_until(lambda: gateway.get("/livez") == 200)
        yield gateway
    finally:
        gateway.stop()


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait until a condition holds. The limit only ends a test that has failed."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition never held"
        time.sleep(0.05)


def picture(seed: int, width: int = 64, height: int = 48, mode: str = "RGB") -> Image.Image:
    """A smooth random image."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    """An image as a file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def as_json(file1: bytes, file2: bytes) -> dict[str, str]:
    """The JSON request for two image files."""
    return {
        "image1_base64": base64.b64encode(file1).decode(),
        "image2_base64": base64.b64encode(file2).decode(),
    }


def expected_flow(image1: Image.Image, image2: Image.Image) -> np.ndarray:
    """The expected flow: the model's closed form on images prepared with Pillow."""
    pixels1, pixels2 = (
        np.asarray(image.resize((512, 512), Image.Resampling.LANCZOS).convert("RGB"), np.float32)
        for image in (image1, image2)
    )
    scale = np.array([image1.width / 512, image1.height / 512], np.float32)
    return (pixels2 - pixels1)[..., :2] / 8 * scale
