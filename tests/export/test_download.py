"""The download of official weights, from a local server with archives of the release's form."""

import functools
import hashlib
import io
import random
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from export.weights import WeightsError
from export.weights.download import official_weights

NAME = "models/FlowNet2-c/FlowNet2-c_weights.caffemodel.h5"


@dataclass
class Server:
    folder: Path
    url: str
    requests: list[str]

    def put(self, members: dict[str, bytes | str], archive: str = "flownet2-models.tar.gz") -> Path:
        """Serve a .tar.gz; a member that is a string is a symbolic link to it."""
        with tarfile.open(self.folder / archive, "w:gz") as tar:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                if isinstance(content, str):
                    info.type, info.linkname = tarfile.SYMTYPE, content
                    tar.addfile(info)
                else:
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        return self.folder / archive


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    requests: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            requests.append(self.path)

    handler = functools.partial(Handler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True).start()
        yield Server(folder, f"http://127.0.0.1:{http.server_port}", requests)
        http.shutdown()


def test_two_networks_from_one_archive(server: Server, tmp_path: Path) -> None:
    archive = server.put(
        {
            "models/FlowNet2-C/FlowNet2-C_weights.caffemodel.h5": b"upper",
            "models/FlowNet2-c/FlowNet2-c_weights.caffemodel": b"lower",
        }
    )
    for network, content in (("FlowNet2-c", b"lower"), ("FlowNet2-C", b"upper")) * 2:
        assert official_weights(network, tmp_path, server.url).read_bytes() == content
    assert server.requests == ["/flownet2-models.tar.gz"]
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert (tmp_path / "SHA256SUMS").read_text() == f"{digest}  flownet2-models.tar.gz\n"


@pytest.mark.parametrize("network", ["FlowNet2-KITTI", "FlowNet2-Sintel"])
def test_a_network_with_an_archive_of_its_own(network: str, server: Server, tmp_path: Path) -> None:
    name = f"{network}_weights.caffemodel.h5"
    server.put(
        {f"./models/{network}/{name}": b"w"},
        f"flownet2-models-{network.removeprefix('FlowNet2-').lower()}.tar.gz",
    )
    assert official_weights(network, tmp_path, server.url) == tmp_path / name


def test_an_archive_that_has_changed_is_refused(server: Server, tmp_path: Path) -> None:
    server.put({NAME: b"genuine"})
    weights = official_weights("FlowNet2-c", tmp_path, server.url)
    weights.unlink()
    (tmp_path / "flownet2-models.tar.gz").unlink()
    server.put({NAME: b"changed"})
    with pytest.raises(WeightsError, match="does not match the known hash"):
        official_weights("FlowNet2-c", tmp_path, server.url)
    assert [file.name for file in tmp_path.iterdir()] == ["SHA256SUMS"]


@pytest.mark.parametrize(
    "members",
    [
        {"../FlowNet2-c/FlowNet2-c_weights.caffemodel.h5": b"hostile"},
        {"models/FlowNet2-c/../../FlowNet2-c_weights.caffemodel.h5": b"hostile"},
        {"/tmp/FlowNet2-c/FlowNet2-c_weights.caffemodel.h5": b"hostile"},
        {"models/FlowNet2-c/FlowNet2-c_weights.caffemodel": "/etc/passwd"},
        {"models/FlowNet2-C/FlowNet2-C_weights.caffemodel.h5": b"another network's"},
    ],
)
def test_no_other_member_is_taken(
    members: dict[str, bytes | str], server: Server, tmp_path: Path
) -> None:
    server.put(members)
    with pytest.raises(WeightsError, match="holds neither FlowNet2-c/"):
        official_weights("FlowNet2-c", tmp_path, server.url)
    assert [file.name for file in tmp_path.iterdir()] == ["flownet2-models.tar.gz"]


@pytest.mark.parametrize("keep", [0, 20, 2000])
def test_a_damaged_archive_is_not_trusted(keep: int, server: Server, tmp_path: Path) -> None:
    archive = server.put({NAME: random.Random(0).randbytes(30_000)})
    archive.write_bytes(archive.read_bytes()[:keep])
    with pytest.raises(WeightsError, match="delete it to download it again"):
        official_weights("FlowNet2-c", tmp_path, server.url)
    assert not (tmp_path / "SHA256SUMS").exists()
    assert not (tmp_path / NAME).exists()


def test_a_server_without_the_archive(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between tries
    with pytest.raises(WeightsError, match="404"):
        official_weights("FlowNet2-c", tmp_path, server.url)
