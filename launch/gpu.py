"""`python -m launch.gpu`: install the packages that serving on this machine's GPU needs.

The packages go to a separate folder that only the model's process uses, because their build of ONNX
Runtime and the one for the CPU must not be in one environment.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from export.engine.gpu import EngineError, Gpu, NoDriver, find_gpu
from launch.child import Echo
from launch.errors import LaunchError

CUDA = 13  # the major version in requirements-gpu.txt
REQUIREMENTS = Path(__file__).parent.parent / "requirements-gpu.txt"
PACKAGES = Path(os.environ.get("FLOWNET2_GPU_PACKAGES") or Path(sys.prefix) / "gpu")
SIZE = "1.6 GB to download"


def usable_gpu(say: Echo) -> Gpu | None:
    """Return the GPU to serve on, or None for the CPU.

    Args:
        say: receives a line with the reason if an existing GPU is not used.

    Raises:
        LaunchError: DEVICE is neither empty nor `cpu`.
    """
    device = os.environ.get("DEVICE", "")
    if device.lower() not in ("", "cpu"):
        raise LaunchError(f"DEVICE={device} is not known: set it to cpu, or leave it unset")
    if device:
        return None
    try:
        return find_gpu(CUDA)
    except NoDriver:
        return None
    except EngineError as error:
        say(f"warning: the CPU serves: {error}")
        return None


def installed_packages() -> Path | None:
    """Return the folder of the installed packages, or None if there are none of these versions."""
    return PACKAGES if _read(PACKAGES / REQUIREMENTS.name) == _read(REQUIREMENTS) else None


def _read(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def install() -> None:
    """Install the packages, unless these versions are installed.

    Raises:
        LaunchError: pip failed.
    """
    new = PACKAGES.with_suffix(".new")
    shutil.rmtree(new, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--only-binary", ":all:", "--no-deps"]
    command += ["--target", str(new), "--requirement", str(REQUIREMENTS)]
    if subprocess.run(command, check=False).returncode:  # noqa: S603
        shutil.rmtree(new, ignore_errors=True)
        raise LaunchError("pip could not install them; its message is above")
    shutil.rmtree(PACKAGES, ignore_errors=True)
    shutil.copyfile(REQUIREMENTS, new / REQUIREMENTS.name)
    new.rename(PACKAGES)


def main() -> int:
    """Install the packages if a GPU can be used; if the installation fails, the CPU serves."""
    with contextlib.suppress(LaunchError):  # the launcher reports these
        gpu = usable_gpu(lambda line: None)
        if gpu and not installed_packages():
            print(
                f"{gpu.name}: installing ONNX Runtime with CUDA and cuDNN into {PACKAGES} ({SIZE}; "
                "DEVICE=cpu does without)",
                flush=True,
            )
            try:
                install()
            except (LaunchError, OSError) as error:
                print(f"warning: the CPU serves: {error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
