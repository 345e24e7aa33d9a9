"""The official weights of the FlowNet 2.0 release, which are for research only."""

import shutil
import tarfile
import zlib
from pathlib import Path

import pooch

from export.weights.file import WeightsError

BASE_URL = "https://lmb.informatik.uni-freiburg.de/resources/binaries/flownet2"
ARCHIVES = {  # the first archive also holds the other networks
    "FlowNet2": "flownet2-models.tar.gz",
    "FlowNet2-KITTI": "flownet2-models-kitti.tar.gz",
    "FlowNet2-Sintel": "flownet2-models-sintel.tar.gz",
}
CHECKSUMS = "SHA256SUMS"


def official_weights(network: str, folder: Path, base_url: str = BASE_URL) -> Path:
    """Return a network's official weights file in `folder`; download it if it is missing.

    The SHA-256 of an archive is written to ``SHA256SUMS`` at the first download, and later archives
    are compared with it.

    Raises:
        WeightsError: the archive cannot be downloaded or read, or holds no such network.
    """
    names = [f"{network}_weights.caffemodel{suffix}" for suffix in ("", ".h5")]
    for name in names:
        if (folder / name).exists():
            return folder / name
    archive = ARCHIVES.get(network, ARCHIVES["FlowNet2"])
    checksums = folder / CHECKSUMS
    lines = checksums.read_text("utf-8").splitlines() if checksums.exists() else []
    known = {name: f"sha256:{digest}" for digest, name in map(str.split, lines)}
    downloads = pooch.create(
        folder, f"{base_url}/", registry={archive: known.get(archive)}, retry_if_failed=3
    )
    http = pooch.HTTPDownloader(progressbar=True, chunk_size=2**20, timeout=60)
    try:
        path = Path(downloads.fetch(archive, downloader=http))
    except (OSError, ValueError) as error:  # no connection or an error status; a different checksum
        raise WeightsError(f"{base_url}/{archive}: {error}") from error
    weights = _extract(path, [f"{network}/{name}" for name in names])
    if archive not in known:
        with checksums.open("a", encoding="utf-8") as file:
            file.write(f"{pooch.file_hash(str(path))}  {archive}\n")
    return weights


def _extract(archive: Path, members: list[str]) -> Path:
    """Extract the first of the members that an archive has into its folder, and nothing else."""
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                name = member.name.removeprefix("./").removeprefix("models/")
                if member.isreg() and name in members and (stream := tar.extractfile(member)):
                    weights = archive.with_name(Path(name).name)
                    part = weights.with_name(f"{weights.name}.part")
                    with part.open("wb") as file:
                        shutil.copyfileobj(stream, file)
                    return part.rename(weights)
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise WeightsError(f"{archive}: {error}; delete it to download it again") from error
    raise WeightsError(f"{archive} holds neither {' nor '.join(members)}")
