"""The commands `pair` and `models`."""

from pathlib import Path

import numpy as np
import psutil
import pytest

from flownet2 import read_flow, service
from launch import triton
from tests.support.command import fail, flownet2, succeed
from tests.support.frames import HEIGHT, WIDTH, closed_form, write_images
from tests.support.gateway_stack import Gateway, free_port


@pytest.mark.parametrize("output", ["flow.flo", "flow.npy", "flow.npz", "flow.pfm"])
def test_pair(tmp_path: Path, gateway: Gateway, output: str) -> None:
    images = write_images(tmp_path / "a.png", tmp_path / "b.png")
    said = succeed(
        "pair", tmp_path / "a.png", tmp_path / "b.png", "-o", tmp_path / output, server=gateway.url
    )
    flow = closed_form(*images)
    np.testing.assert_array_equal(read_flow(tmp_path / output), flow)
    lengths = np.hypot(*np.moveaxis(flow, 2, 0))
    assert f"{WIDTH}x{HEIGHT}" in said
    assert f"{lengths.mean():.2f}" in said
    assert f"{lengths.max():.2f}" in said


def test_pair_of_reduced_images(tmp_path: Path, gateway: Gateway) -> None:
    write_images(tmp_path / "a.png", tmp_path / "b.png")
    files = (tmp_path / "a.png", tmp_path / "b.png", "-o", tmp_path / "flow.flo")
    assert "flow.flo: 32x" in succeed("pair", *files, server=gateway.url, max_edge=32)
    assert read_flow(tmp_path / "flow.flo").shape[1] == 32


def test_pair_says_what_is_wrong_in_a_line(tmp_path: Path, gateway: Gateway) -> None:
    write_images(tmp_path / "a.png")
    arguments = ("pair", tmp_path / "a.png", tmp_path / "missing.png", "-o")
    assert "missing.png" in fail(*arguments, tmp_path / "flow.flo", server=gateway.url)
    assert ".bmp" in fail(*arguments, tmp_path / "flow.bmp", server=gateway.url)
    assert flownet2("pair", "a.png").returncode == 2
    assert not list(tmp_path.glob("flow.*"))


def test_without_a_server_it_says_what_to_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "WAIT_SECONDS", 0.0)
    monkeypatch.setenv("FLOWNET2_URL", "http://127.0.0.1:9")
    assert "--server" in fail("models")
    assert "is not a server" in fail("models", server="127.0.0.1:5003")


def test_a_checkout_starts_a_server_for_as_long_as_the_command_runs(
    tmp_path: Path, closed_form_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = write_images(tmp_path / "a.png", tmp_path / "b.png")
    monkeypatch.delenv("FLOWNET2_URL", raising=False)
    monkeypatch.setenv("MODEL_REPOSITORY", str(closed_form_repository))
    monkeypatch.setattr(service, "DEFAULT_SERVER", f"http://127.0.0.1:{free_port()}")
    before = psutil.Process().children(recursive=True)
    succeed("pair", tmp_path / "a.png", tmp_path / "b.png", "-o", tmp_path / "flow.flo")
    np.testing.assert_array_equal(read_flow(tmp_path / "flow.flo"), closed_form(*images))
    assert set(psutil.Process().children(recursive=True)) <= set(before)


def test_models(gateway: Gateway, closed_form_triton: triton.Triton) -> None:
    for server in (gateway.url, f"grpc://{closed_form_triton.address.grpc}"):
        said = succeed("models", server=server)
        assert "flownet2" in said
        assert "closed form" in said
