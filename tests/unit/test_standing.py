"""What the kernel tells of other processes, and of their descriptors."""

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from prefork.net import held
from prefork.net.address import parse
from prefork.system.standing import cpu_seconds, is_in_call_on, standing
from tests import watch

NONE = 4_000_000  # more than this kernel gives


@pytest.fixture
def waiting() -> Iterator[subprocess.Popen[bytes]]:
    """A process that reads from descriptor 0, where nothing comes."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        watch.until("it waits", lambda: (how := standing(child.pid)) is not None and how.state.startswith("S"))
        yield child
        child.kill()


def test_a_process_that_waits_has_taken_its_signals_and_one_that_was_stopped_has_not(waiting: subprocess.Popen[bytes]) -> None:
    how = standing(waiting.pid)
    assert how is not None
    assert (how.stands_still, how.sleeps_in_the_kernel, how.has_taken(signal.SIGTERM)) == (False, False, True)
    waiting.send_signal(signal.SIGSTOP)
    assert os.waitid(os.P_PID, waiting.pid, os.WSTOPPED) is not None
    waiting.send_signal(signal.SIGTERM)
    how = standing(waiting.pid)
    assert how is not None
    assert str(how) == "state T (stopped)"
    assert (how.stands_still, how.pending, how.has_taken(signal.SIGTERM)) == (True, 1 << signal.SIGTERM - 1, False)


def test_signals_that_are_blocked_or_ignored_are_not_taken() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
            how = standing(child.pid)
            child.kill()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert how is not None
    assert how.is_deaf_to(signal.SIGUSR1)
    assert not how.has_taken(signal.SIGUSR1)


def test_the_descriptor_of_a_system_call_is_known_where_we_may_look(waiting: subprocess.Popen[bytes]) -> None:
    try:
        Path(f"/proc/{waiting.pid}/syscall").read_text()
    except OSError as error:
        pytest.skip(f"nobody may look at another process' system call here: {error}")
    watch.until("it reads", lambda: is_in_call_on(waiting.pid, 0))
    assert is_in_call_on(waiting.pid, 1) is False


def test_of_a_process_that_is_not_there_nothing_is_told() -> None:
    assert standing(NONE) is None
    assert cpu_seconds(NONE) is None
    assert held.connections(NONE, parse("127.0.0.1:7000")) is None
    assert is_in_call_on(NONE, 0) is None


def test_cpu_that_was_used_is_told() -> None:
    before = cpu_seconds(os.getpid())
    assert before is not None
    watch.until("it counts", lambda: (cpu_seconds(os.getpid()) or 0.0) > before)


def test_what_is_no_socket_is_closed_and_ends_no_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number may be another file's once it is taken, and some sockets tell no name (AF_ALG)."""
    with ExitStack() as stack:
        ends = os.pipe()
        for fd in ends:
            stack.callback(os.close, fd)
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        client = stack.enter_context(socket.create_connection(listener.getsockname()))
        accepted = stack.enter_context(listener.accept()[0])
        here = parse("{}:{}".format(*listener.getsockname()))
        if held.connections(os.getpid(), here) is None:
            pytest.skip("pidfd_getfd is not allowed here")
        monkeypatch.setattr(held, "_is_socket", lambda _pid, name: int(name) in (*ends, accepted.fileno()))
        before = sorted(os.listdir("/proc/self/fd"))
        assert held.connections(os.getpid(), here) == [client.getsockname()]
        assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
def test_the_connections_of_one_listener_are_found_and_no_others(family: int, tmp_path: Path) -> None:
    where = ("127.0.0.1", 0) if family == socket.AF_INET else str(tmp_path / "socket")
    with ExitStack() as stack:
        listener, other, client = (stack.enter_context(socket.socket(family)) for _ in range(3))
        listener.bind(where)
        other.bind(("127.0.0.1", 0) if family == socket.AF_INET else str(tmp_path / "other"))
        for sock in (listener, other):
            sock.listen()
        name = listener.getsockname()
        here, elsewhere = (
            parse("{}:{}".format(*sock.getsockname()) if family == socket.AF_INET else f"unix:{sock.getsockname()}")
            for sock in (listener, other)
        )
        client.connect(name)
        if held.connections(os.getpid(), here) is None:
            pytest.skip("pidfd_getfd is not allowed here")
        assert held.connections(os.getpid(), here) == [], "the client's end is none, nor is one that nobody has accepted"
        accepted, _ = listener.accept()
        with accepted:
            assert held.connections(os.getpid(), here) == [client.getsockname() if family == socket.AF_INET else ("unix", 0)]
            assert held.connections(os.getpid(), elsewhere) == []
