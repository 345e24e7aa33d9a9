"""The download of official weights, from a local server that serves an archive of the same form."""

import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from export.weights import download
from tests.support.caffe_reference import make_blobs, write_h5

CONTENT = bytes(np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8))


class Archive:
    """A server of one file, and what it was asked for.

    Attributes:
        drops: after how many bytes the connection ends, one number for each answer to come.
        ranges: whether it answers with a part when asked for one.
        validators: the headers that tell versions of the file apart.
        requests: the request headers, in order. sent: the bytes of the bodies, in order.
    """

    def __init__(self) -> None:
        self.content = CONTENT
        self.status = 200
        self.drops: list[int] = []
        self.ranges = True
        self.wrong_part = False
        self.length = True
        self.validators = {"ETag": '"first"'}
        self.requests: list[dict[str, str]] = []
        self.sent: list[int] = []
        archive = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                archive.answer(self)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.requests.append(dict(handler.headers))
        if self.status != 200:
            handler.send_error(self.status)
            return
        start, body = 0, self.content
        wanted = handler.headers.get("Range")
        same = handler.headers.get("If-Range") in self.validators.values()
        if wanted and self.ranges and same:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                handler.send_response(416)
                handler.send_header("Content-Range", f"bytes */{len(body)}")
                handler.end_headers()
                return
            handler.send_response(206)
            shown = start + 1 if self.wrong_part else start
            handler.send_header("Content-Range", f"bytes {shown}-{len(body) - 1}/{len(body)}")
        else:
            handler.send_response(200)
        for name, value in self.validators.items():
            handler.send_header(name, value)
        body = body[start:]
        if self.length:
            handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        body = body[: self.drops.pop(0)] if self.drops else body
        self.sent.append(len(body))  # before the client has them, and can look here
        handler.wfile.write(body)


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch) -> Iterator[Archive]:
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0.0)
    one = Archive()
    yield one
    one.server.shutdown()
    one.server.server_close()


def tar_of(members: dict[str, bytes | str]) -> bytes:
    """A .tar.gz; a string is the target of a symbolic link."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def test_the_command_downloads_checks_and_exports(
    archive: Archive, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blobs = make_blobs(["s"], 3 / 8)
    weights = write_h5(tmp_path / "official.h5", blobs).read_bytes()
    archive.content = tar_of(
        {
            "models/FlowNet2-S/FlowNet2-S_weights.caffemodel.h5": b"another network's",
            "models/FlowNet2-s/FlowNet2-s_deploy.prototxt.template": b"layer {}",
            "models/FlowNet2-s/FlowNet2-s_weights.caffemodel.h5": weights,
        }
    )
    folder, repository = tmp_path / "official", tmp_path / "repository"
    arguments = ["--network", "FlowNet2-s", "--base-url", archive.url, "--to", str(folder)]
    assert download.main([*arguments, "--repository", str(repository)]) == 0

    file = folder / "FlowNet2-s_weights.caffemodel.h5"
    assert file.read_bytes() == weights
    assert (folder / "SHA256SUMS").read_text().splitlines() == [
        f"{hashlib.sha256(archive.content).hexdigest()}  flownet2-models.tar.gz",
        f"{hashlib.sha256(weights).hexdigest()}  {file.name}",
    ]
    assert "research only" in capsys.readouterr().out

    model = onnx.load(repository / "flownet2" / "1" / "model.onnx")
    arrays = [onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    first = blobs["conv1"][0]
    assert any(a.shape == first.shape and np.array_equal(a, first) for a in arrays)
    config = text_format.Parse(
        (repository / "flownet2" / "config.pbtxt").read_text(), model_config_pb2.ModelConfig()
    )
    assert config.parameters["network"].string_value == "FlowNet2-s"


def test_a_second_network_takes_the_same_archive(archive: Archive, tmp_path: Path) -> None:
    archive.content = tar_of(
        {
            "models/FlowNet2-S/FlowNet2-S_weights.caffemodel.h5": b"upper",
            "models/FlowNet2-s/FlowNet2-s_weights.caffemodel": b"lower",
        }
    )
    for network, content in (("FlowNet2-s", b"lower"), ("FlowNet2-S", b"upper")) * 2:
        file = download.official_weights(network, tmp_path, archive.url)
        assert file.read_bytes() == content
    assert len(archive.requests) == 1


@pytest.mark.parametrize(
    ("network", "path"),
    [
        ("FlowNet2-KITTI", "/flownet2-models-kitti.tar.gz"),
        ("FlowNet2-Sintel", "/flownet2-models-sintel.tar.gz"),
        ("FlowNet2-css-ft-sd", "/flownet2-models.tar.gz"),
    ],
)
def test_each_network_comes_from_its_archive(
    network: str, path: str, archive: Archive, tmp_path: Path
) -> None:
    archive.content = tar_of({f"./models/{network}/{network}_weights.caffemodel.h5": b"w"})
    file = download.official_weights(network, tmp_path, archive.url)
    assert file.name == f"{network}_weights.caffemodel.h5"
    assert (tmp_path / path.strip("/")).exists()


def test_a_broken_connection_goes_on_where_it_stopped(archive: Archive, tmp_path: Path) -> None:
    archive.drops = [100_000, 50_000]
    download.download(f"{archive.url}/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert archive.sent == [100_000, 50_000, 150_000]
    assert [one.get("Range") for one in archive.requests] == [
        None,
        "bytes=100000-",
        "bytes=150000-",
    ]
    assert archive.requests[2]["If-Range"] == '"first"'
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_an_interrupted_command_goes_on_where_it_stopped(archive: Archive, tmp_path: Path) -> None:
    archive.drops = [100_000, 0, 0, 0]
    with pytest.raises(download.DownloadError, match=r"100,000 bytes are in .*file\.part"):
        download.download(f"{archive.url}/file", tmp_path / "file")
    assert not (tmp_path / "file").exists()
    assert len(archive.requests) == 1 + download.TRIES
    download.download(f"{archive.url}/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert archive.sent[-1] == 200_000


@pytest.mark.parametrize(
    "validators", [{}, {"ETag": 'W/"weak"'}], ids=["no validator", "weak validator"]
)
def test_without_proof_of_the_same_file_it_starts_again(
    validators: dict[str, str], archive: Archive, tmp_path: Path
) -> None:
    archive.validators = validators
    archive.drops = [100_000]
    download.download(f"{archive.url}/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert archive.sent == [100_000, 300_000]


def test_last_modified_is_proof_too(archive: Archive, tmp_path: Path) -> None:
    archive.validators = {"Last-Modified": "Tue, 01 Aug 2017 10:00:00 GMT", "ETag": 'W/"weak"'}
    archive.drops = [100_000]
    download.download(f"{archive.url}/file", tmp_path / "file")
    assert archive.sent == [100_000, 200_000]


def test_a_server_without_ranges_sends_it_all_again(archive: Archive, tmp_path: Path) -> None:
    archive.ranges = False
    archive.drops = [100_000]
    download.download(f"{archive.url}/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert archive.sent == [100_000, 300_000]


def test_a_file_that_changed_meanwhile_is_not_mixed(archive: Archive, tmp_path: Path) -> None:
    archive.drops = [100_000, 0, 0, 0]
    with pytest.raises(download.DownloadError):
        download.download(f"{archive.url}/file", tmp_path / "file")
    archive.content, archive.validators = CONTENT[::-1], {"ETag": '"second"'}
    download.download(f"{archive.url}/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT[::-1]


def test_a_part_that_was_whole_already_is_taken(archive: Archive, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT)
    (tmp_path / "file.part.version").write_text('"first"')
    download.download(f"{archive.url}/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert archive.sent == []


def test_a_part_longer_than_the_file_is_thrown_away(archive: Archive, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT + b"more")
    (tmp_path / "file.part.version").write_text('"first"')
    download.download(f"{archive.url}/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_the_wrong_part_is_refused(archive: Archive, tmp_path: Path) -> None:
    archive.drops, archive.wrong_part = [100_000], True
    with pytest.raises(download.DownloadError, match="another part"):
        download.download(f"{archive.url}/file", tmp_path / "file")


def test_a_length_is_not_needed(archive: Archive, tmp_path: Path) -> None:
    archive.length = False
    download.download(f"{archive.url}/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize(("status", "asked"), [(404, 1), (503, download.TRIES)])
def test_a_refusal_is_final_and_an_outage_is_not(
    status: int, asked: int, archive: Archive, tmp_path: Path
) -> None:
    archive.status = status
    with pytest.raises(download.DownloadError, match=f"answers {status}"):
        download.download(f"{archive.url}/file", tmp_path / "file")
    assert len(archive.requests) == asked


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/file"])
def test_only_http_is_spoken(url: str, tmp_path: Path) -> None:
    with pytest.raises(download.DownloadError, match="neither https nor http"):
        download.download(url, tmp_path / "file")


@pytest.mark.parametrize("changed", ["flownet2-models.tar.gz", "FlowNet2-c_weights.caffemodel.h5"])
def test_another_checksum_than_the_first_is_an_error(
    changed: str, archive: Archive, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "models/FlowNet2-c/FlowNet2-c_weights.caffemodel.h5"
    archive.content = tar_of({name: b"genuine"})
    weights = download.official_weights("FlowNet2-c", tmp_path, archive.url)
    if changed == weights.name:
        weights.write_bytes(b"changed")
    else:  # the server has another archive now
        weights.unlink()
        (tmp_path / changed).unlink()
        archive.content = tar_of({name: b"changed"})
    arguments = ["--network", "FlowNet2-c", "--base-url", archive.url, "--to", str(tmp_path)]
    assert download.main([*arguments, "--repository", str(tmp_path / "repository")]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ")
    assert changed in message
    assert "when it was first seen" in message
    assert not (tmp_path / "repository").exists()


@pytest.mark.parametrize(
    "member",
    [
        "../FlowNet2-c/FlowNet2-c_weights.caffemodel.h5",
        "models/FlowNet2-c/../../FlowNet2-c_weights.caffemodel.h5",
        "/tmp/FlowNet2-c/FlowNet2-c_weights.caffemodel.h5",
        "models/FlowNet2-C/FlowNet2-C_weights.caffemodel.h5",
        "models/FlowNet2-c/FlowNet2-c_weights.caffemodel.h5.solverstate",
    ],
)
def test_no_other_member_is_taken(member: str, tmp_path: Path) -> None:
    archive = tmp_path / "a" / "flownet2-models.tar.gz"
    archive.parent.mkdir()
    archive.write_bytes(tar_of({member: b"hostile"}))
    with pytest.raises(download.ArchiveError, match="holds no models/FlowNet2-c/"):
        download.extract(archive, "FlowNet2-c", archive.parent)
    assert list(tmp_path.rglob("*")) == [archive.parent, archive]


def test_a_link_in_the_archive_is_not_followed(tmp_path: Path) -> None:
    archive = tmp_path / "flownet2-models.tar.gz"
    archive.write_bytes(tar_of({"models/FlowNet2-c/FlowNet2-c_weights.caffemodel": "/etc/passwd"}))
    with pytest.raises(download.ArchiveError, match="holds no"):
        download.extract(archive, "FlowNet2-c", tmp_path)


@pytest.mark.parametrize("keep", [0, 20, 2000])
def test_a_damaged_archive_is_an_error_and_not_noted(
    keep: int, archive: Archive, tmp_path: Path
) -> None:
    whole = tar_of({"models/FlowNet2-c/FlowNet2-c_weights.caffemodel.h5": CONTENT})
    archive.content = whole[:keep]
    with pytest.raises(download.ArchiveError, match="delete it to download it again"):
        download.official_weights("FlowNet2-c", tmp_path, archive.url)
    assert not (tmp_path / "SHA256SUMS").exists()
    assert not (tmp_path / "FlowNet2-c_weights.caffemodel.h5").exists()


def test_a_full_disk_is_said_before_the_download(
    archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: Usage)
    with pytest.raises(download.DownloadError, match=r"300,000 bytes to come, and room for 1,000"):
        download.download(f"{archive.url}/file", tmp_path / "file")
