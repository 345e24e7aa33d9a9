"""A child process: waiting until it is ready, and stopping it."""

import os
import signal
import threading

import pytest

from launch.child import Child
from launch.errors import LaunchError
from tests.support.gateway_stack import wait_until
from tests.support.processes import processes_of_group


def test_child_that_ignores_sigterm_is_killed_with_its_own_children() -> None:
    said: list[str] = []
    script = "trap '' TERM; sleep 600 & echo up; while :; do sleep 1; done"
    child = Child("stubborn", ["/bin/sh", "-c", script], os.environ, said.append)
    wait_until(lambda: "up" in said)
    child.stop(grace=0.3)
    assert child.exit_status() == -signal.SIGKILL
    assert not processes_of_group(child.pid)
    assert said[-1] == "stubborn: still running after 0 s, killed"


def test_child_that_is_never_ready_times_out() -> None:
    child = Child("slow", ["/bin/sh", "-c", "echo loading; sleep 600"], os.environ, lambda _: None)
    try:
        with pytest.raises(LaunchError, match=r"slow was not ready within 1 s: loading"):
            child.wait_until(lambda: False, 1.0, threading.Event())
    finally:
        child.kill()


def test_crash_of_what_a_child_started_ends_the_wait() -> None:
    script = "echo 'terminate called after throwing an instance of std::x'; echo; sleep 600"
    child = Child("broken", ["/bin/sh", "-c", script], os.environ, lambda _: None)
    try:
        with pytest.raises(LaunchError, match="broken crashed before it was ready: terminate"):
            child.wait_until(lambda: False, 60.0, threading.Event())
    finally:
        child.kill()


def test_stop_ends_the_wait_for_readiness() -> None:
    stop = threading.Event()
    stop.set()
    child = Child("slow", ["/bin/sleep", "600"], os.environ, lambda _: None)
    try:
        assert child.wait_until(lambda: False, 60.0, stop) is False
    finally:
        child.kill()
