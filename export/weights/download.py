"""``python -m export.weights.download --network FlowNet2``: the official weights, ready to serve.

Downloads the archive of the original release that holds the network (its weights are for research
only), takes the one file out, and exports it with ``python -m export``. A download that was
interrupted goes on where it stopped. The SHA-256 of every file is written to ``SHA256SUMS`` when it
is first seen, and held against it ever after.
"""

import argparse
import gzip
import hashlib
import http.client
import re
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import IO

from tqdm import tqdm

from export.__main__ import main as export
from export.networks import NETWORKS

BASE_URL = "https://lmb.informatik.uni-freiburg.de/resources/binaries/flownet2"
ARCHIVES = {  # the other networks are in the first one
    "FlowNet2": "flownet2-models.tar.gz",
    "FlowNet2-KITTI": "flownet2-models-kitti.tar.gz",
    "FlowNet2-Sintel": "flownet2-models-sintel.tar.gz",
}
CHECKSUMS = "SHA256SUMS"
CHUNK = 2**20
TIMEOUT_SECONDS = 60.0
TRIES = 3  # in a row that bring nothing
PAUSE_SECONDS = 2.0


class DownloadError(Exception):
    """A file cannot be downloaded; the text says which and why."""


class ChecksumError(Exception):
    """A file is not the one that was first seen under its name."""


class ArchiveError(Exception):
    """An archive is damaged, or does not hold the network."""


def main(arguments: list[str]) -> int:
    """Command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    print(f"{options.network}: weights of the FlowNet 2.0 release, for research only")
    try:
        weights = official_weights(options.network, options.to, options.base_url)
    except (DownloadError, ChecksumError, ArchiveError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    passed = ["--network", options.network, "--weights", str(weights), "--name", options.name]
    passed += ["--repository", str(options.repository), "--precision", options.precision]
    return export(passed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export.weights.download",
        description="Download the official weights of a network and export them.",
    )
    parser.add_argument("--network", required=True, choices=NETWORKS, metavar="NAME")
    parser.add_argument(
        "--to",
        type=Path,
        default=Path("weights/official"),
        metavar="DIR",
        help="where downloads are kept (default: %(default)s)",
    )
    parser.add_argument("--base-url", default=BASE_URL, help="(default: %(default)s)")
    parser.add_argument("--repository", type=Path, default=Path("model_repository"), metavar="DIR")
    parser.add_argument("--name", default="flownet2", help="the model's name")
    parser.add_argument("--precision", choices=("fp32", "fp16"), default="fp32")
    return parser


def official_weights(network: str, folder: Path, base_url: str = BASE_URL) -> Path:
    """The official weights file of a network, in `folder`; downloads only what is not there.

    Raises:
        DownloadError: the archive cannot be had.
        ChecksumError: a file differs from what was first seen under its name.
        ArchiveError: the archive is damaged or holds no such network.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = [file for file in folder.iterdir() if _member_name(network).fullmatch(file.name)]
    if found:
        note(found[0], verify(found[0]))
        return found[0]
    archive = folder / ARCHIVES.get(network, ARCHIVES["FlowNet2"])
    if not archive.exists():
        download(f"{base_url.rstrip('/')}/{archive.name}", archive)
    digest = verify(archive)
    weights = extract(archive, network, folder)
    note(archive, digest)  # not of one that cannot be read
    note(weights, verify(weights))
    return weights


def download(url: str, target: Path) -> None:
    """Download a file to `target`, through ``<target>.part``, which a later call goes on with.

    Raises:
        DownloadError: the server refuses, or several tries in a row bring nothing.
    """
    if not url.startswith(("https://", "http://")):
        raise DownloadError(f"{url} is neither https nor http")
    part = target.with_name(f"{target.name}.part")
    failures, problem = 0, ""
    while failures < TRIES:
        before = _size(part)
        try:
            complete = _transfer(url, part)
            problem = "the connection ended early"
        except urllib.error.HTTPError as error:
            problem = f"the server answers {error.code} {error.reason}"
            if error.code < HTTPStatus.INTERNAL_SERVER_ERROR:
                raise DownloadError(f"{url}: {problem}") from error
            complete = False
        except (OSError, http.client.HTTPException) as error:
            problem, complete = str(error) or type(error).__name__, False
        if complete:
            part.replace(target)
            _validator(part).unlink(missing_ok=True)
            return
        failures = 0 if _size(part) > before else failures + 1
        time.sleep(PAUSE_SECONDS)
    raise DownloadError(
        f"{url}: {problem}; {_size(part):,} bytes are in {part}, and the same command goes on there"
    )


def _transfer(url: str, part: Path) -> bool:
    """Get what `part` lacks of a file; True when it is whole."""
    request = urllib.request.Request(url)  # noqa: S310
    have = _size(part)
    if have and _validator(part).exists():
        # The rest is sent only of the very file that the part is of, otherwise the whole file is.
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", _validator(part).read_text(encoding="ascii"))
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)  # noqa: S310
    except urllib.error.HTTPError as error:
        if error.code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        # There is nothing behind what we have: it is whole, or of another file.
        if error.headers.get("Content-Range") == f"bytes */{have}":
            return True
        part.unlink()
        return False
    with answer:
        resumed = answer.status == HTTPStatus.PARTIAL_CONTENT
        if resumed and not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise DownloadError(f"{url}: the server sends another part than the one asked for")
        if not resumed:
            have = 0
            _remember(part, answer.headers)
        length = answer.headers.get("Content-Length")
        whole = have + int(length) if length else None
        free = shutil.disk_usage(part.parent).free
        if whole and whole - have > free:
            raise DownloadError(
                f"{url}: {whole - have:,} bytes to come, and room for {free:,} in {part.parent}"
            )
        with (
            part.open("ab" if resumed else "wb") as file,
            tqdm(total=whole, initial=have, unit="B", unit_scale=True, desc=part.stem) as bar,
        ):
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    return whole is None or _size(part) == whole


def _remember(part: Path, headers: Mapping[str, str]) -> None:
    """Keep what tells this version of the file from others (weak tags do not: RFC 9110, 13.1.5)."""
    tag = headers.get("ETag", "")
    validator = tag if tag.startswith('"') else headers.get("Last-Modified", "")
    if validator:
        _validator(part).write_text(validator, encoding="ascii")
    else:
        _validator(part).unlink(missing_ok=True)


def _validator(part: Path) -> Path:
    return part.with_name(f"{part.name}.version")


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def verify(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal, after holding it against ``SHA256SUMS`` beside it.

    Raises:
        ChecksumError: the file is in there with another one.
    """
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    expected = _noted(file).get(file.name, digest)
    if expected != digest:
        raise ChecksumError(
            f"{file} has SHA-256 {digest}, and had {expected} when it was first seen: delete it to "
            f"download it again, or its line in {CHECKSUMS} beside it if you trust the new file"
        )
    return digest


def note(file: Path, digest: str) -> None:
    """Give a file its line in ``SHA256SUMS`` beside it, unless it has one."""
    if file.name not in _noted(file):
        with file.with_name(CHECKSUMS).open("a", encoding="utf-8") as stream:
            stream.write(f"{digest}  {file.name}\n")
        print(f"{file}: first seen, SHA-256 {digest}")


def _noted(file: Path) -> dict[str, str]:
    """Digests by file name."""
    sums = file.with_name(CHECKSUMS)
    lines = sums.read_text(encoding="utf-8").splitlines() if sums.exists() else []
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def extract(archive: Path, network: str, folder: Path) -> Path:
    """Take the weights file of a network out of an archive of the release.

    Only that member is read, if it is a plain file in the release's place; nothing in the archive
    decides where anything is written.

    Raises:
        ArchiveError: the archive is damaged or holds no such file.
    """
    member_path = re.compile(
        rf"(?:\./)?(?:models/)?{re.escape(network)}/({_member_name(network).pattern})"
    )
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                match = member_path.fullmatch(member.name)
                if match and member.isreg():
                    stream = tar.extractfile(member)
                    assert stream is not None
                    target = folder / match[1]
                    _write(stream, member.size, target)
                    return target
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ArchiveError(
            f"{archive} cannot be read ({error}): delete it to download it again"
        ) from error
    raise ArchiveError(f"{archive} holds no models/{network}/{network}_weights.caffemodel[.h5]")


def _member_name(network: str) -> re.Pattern[str]:
    return re.compile(rf"{re.escape(network)}_weights\.caffemodel(?:\.h5)?")


def _write(stream: IO[bytes], size: int, target: Path) -> None:
    part = target.with_name(f"{target.name}.part")
    with (
        tqdm.wrapattr(stream, "read", total=size, desc=target.name) as counted,
        part.open("wb") as file,
    ):
        shutil.copyfileobj(counted, file, CHUNK)
    part.replace(target)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
