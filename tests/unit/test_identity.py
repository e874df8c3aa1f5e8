"""Whose child a process is, and with whose credentials: by both ways in which the kernel tells it."""

import os
import signal
import threading
from collections.abc import Iterator
from unittest import mock

import pytest

from prefork.system import identity
from prefork.system.identity import Identity, Missing, identify

NOBODY = 65534
OLD_KERNEL = OSError(25, "Inappropriate ioctl for device")


@pytest.fixture(params=["pidfd", "proc", "no descriptor"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernel tells by a pidfd, or does not know how; or there is none."""
    where = {"proc": "fcntl.ioctl", "no descriptor": "os.pidfd_open"}
    if request.param == "pidfd" and identity._by_pidfd(fd := os.pidfd_open(os.getpid())) is None:
        os.close(fd)
        pytest.skip("a kernel before 6.13")
    elif request.param == "pidfd":
        os.close(fd)
        yield request.param
    else:
        error = OLD_KERNEL if request.param == "proc" else OSError(24, "Too many open files")
        with mock.patch(f"prefork.system.identity.{where[request.param]}", side_effect=error):
            yield request.param


@pytest.mark.usefixtures("way")
def test_a_child_is_known_until_it_was_reaped() -> None:
    us = Identity(os.getpid(), frozenset(os.getresuid()), frozenset(os.getresgid()))
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    os.close(reading)
    assert identify(pid) == us
    os.close(writing)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert identify(pid) == us, "a zombie"
    os.waitpid(pid, 0)
    assert identify(pid) is Missing.GONE


@pytest.mark.usefixtures("way")
def test_every_identifier_counts() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can be several users")
    ready, now = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setresgid(NOBODY, NOBODY, 7)
            os.setresuid(NOBODY, NOBODY, 9)
            os.write(now, b"x")
            signal.pause()
        finally:
            os._exit(0)
    os.read(ready, 1)
    found = identify(pid)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    for fd in (ready, now):
        os.close(fd)
    assert found == Identity(os.getpid(), frozenset({NOBODY, 9}), frozenset({NOBODY, 7}))


@pytest.mark.parametrize("pid", [4_000_000, 1 << 30])
@pytest.mark.usefixtures("way")
def test_what_is_no_process_is_gone(pid: int) -> None:
    assert identify(pid) is Missing.GONE


@pytest.mark.usefixtures("way")
def test_a_thread_is_no_process() -> None:
    begun, end = threading.Event(), threading.Event()
    found: list[int] = []

    def run() -> None:
        found.append(threading.get_native_id())
        begun.set()
        end.wait()

    thread = threading.Thread(target=run)
    thread.start()
    begun.wait()
    told = identify(found[0])
    end.set()
    thread.join()
    assert told is Missing.GONE


def test_what_proc_hides_is_there_nevertheless() -> None:
    with (
        mock.patch("prefork.system.identity.fcntl.ioctl", side_effect=OLD_KERNEL),
        mock.patch("prefork.system.identity.open", create=True, side_effect=FileNotFoundError),
    ):
        assert identify(os.getppid()) is Missing.HIDDEN
        assert identify(4_000_000) is Missing.GONE
