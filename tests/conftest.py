"""Fixtures that several test files share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.report import bypass_proxies
from export.shipped import write_shipped
from launch import triton, wheel
from tests.support.exported import EXPORTS, Exported, export
from tests.support.gateway_stack import Gateway, run_gateway, wait_until, write_repository
from tests.support.stack import Stack, run_stack

bypass_proxies()  # pip may have needed one; what the tests ask is on this machine


@pytest.fixture(scope="session")
def closed_form_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository whose flow is known in closed form."""
    return write_repository(tmp_path_factory.mktemp("closed_form"))


@pytest.fixture(scope="session")
def closed_form_triton(closed_form_repository: Path) -> Iterator[triton.Triton]:
    """A real Triton over that repository."""
    with wheel.serve(closed_form_repository) as server:
        yield server


@pytest.fixture(scope="session")
def gateway(
    closed_form_triton: triton.Triton, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    """A gateway with default settings in front of that Triton."""
    log = tmp_path_factory.mktemp("gateway") / "log"
    with run_gateway(closed_form_triton.address.grpc, log) as running:
        wait_until(lambda: running.get("/readyz") == 200)
        yield running


@pytest.fixture(scope="session")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with only the shipped model."""
    repository = tmp_path_factory.mktemp("shipped")
    write_shipped(repository)
    return repository


@pytest.fixture(scope="session")
def stack(shipped: Path) -> Iterator[Stack]:
    """The service as `make serve` runs it."""
    with run_stack(shipped) as running:
        yield running


@pytest.fixture(scope="session", params=EXPORTS)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Exported]:
    """One architecture after the other; all tests of an architecture run together, across files."""
    yield from export(*request.param, tmp_path_factory.mktemp("exported"))
