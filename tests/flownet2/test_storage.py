"""Sources and results in object storage: moto's server speaks S3."""

import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from flownet2 import storage
from flownet2.formats import from_flo
from flownet2.sources import find
from launch import triton
from tests.support.command import fail, succeed
from tests.support.gateway_stack import encoded, picture

moto_server = pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """An empty bucket; s3fs finds the server by the environment."""
    server = moto_server.ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("clips")
        yield "s3://clips"
    server.stop()


def test_frames_and_results_in_a_bucket(
    bucket: str, tmp_path: Path, closed_form_triton: triton.Triton
) -> None:
    url = f"grpc://{closed_form_triton.address.grpc}"
    images = [picture(seed) for seed in range(5)]
    files = fsspec.filesystem("s3")
    for number, image in enumerate(images):
        files.pipe_file(f"clips/in/frame{number}.png", encoded(image))
    arguments = ("run", f"{bucket}/in", "-o", f"{bucket}/out", "--format", "flo,mp4")
    succeed(*arguments, server=url)
    names = {path.removeprefix("clips/out/") for path in files.find("clips/out")}
    flows = {f"in/{number:06}.flo" for number in range(4)}
    assert names == {"manifest.json", "in/index.csv", "in/flow.mp4", *flows}
    for number in range(4):
        flow = from_flo(files.cat_file(f"clips/out/in/{number:06}.flo"))
        first, second = (np.asarray(one, np.float32) for one in images[number : number + 2])
        np.testing.assert_array_equal(flow, (second - first)[..., :2] / 8)
    written = {path: files.info(path)["LastModified"] for path in files.find("clips/out")}
    files.rm("clips/out/in/000002.flo")
    succeed(*arguments, server=url)
    files.invalidate_cache()
    for name in flows - {"in/000002.flo"}:
        path = f"clips/out/{name}"
        assert files.info(path)["LastModified"] == written[path]
    assert files.exists("clips/out/in/000002.flo")
    files.pipe_file("clips/in/frame1.png", encoded(images[4]))
    assert "has changed" in fail(*arguments, server=url)
    assert "s3://clips/none.mp4" in fail(
        "run", f"{bucket}/none.mp4", "-o", tmp_path / "out", server=url
    )


def test_storage_that_nobody_knows(tmp_path: Path, closed_form_triton: triton.Triton) -> None:
    url = f"grpc://{closed_form_triton.address.grpc}"
    assert "nothing://a" in fail("run", "nothing://a/b.mp4", "-o", tmp_path / "out", server=url)
    assert os.listdir(tmp_path) == []


def test_names_in_a_bucket_that_look_like_patterns(bucket: str) -> None:
    files = fsspec.filesystem("s3")
    for name in ("odd/photo[1].png", "odd/photo1.png", "take[1]/a.png", "take[1]/b.png"):
        files.pipe_file(f"clips/{name}", encoded(picture(1)))
    for argument, expected in (
        ("odd/photo[1].png", ["odd/photo[1].png"]),
        ("odd/photo?.png", ["odd/photo1.png"]),
        ("take[1]/*.png", ["take[1]/a.png", "take[1]/b.png"]),
        ("take[1]", ["take[1]/a.png", "take[1]/b.png"]),
    ):
        (source,) = find([f"{bucket}/{argument}"]).values()
        assert list(source.files) == [f"{bucket}/{name}" for name in expected]
    storage.remove(f"{bucket}/odd/photo[1].png")
    assert files.exists("clips/odd/photo1.png")
    assert not storage.exists(f"{bucket}/odd/photo[1].png")
