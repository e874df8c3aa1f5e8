"""Signals to the master: stop in its three forms, and one acceptor more or fewer."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import psutil
import pytest

from prefork.master import SAME_INTERRUPT
from prefork.system import process
from prefork.testing import Server, connect
from tests import watch
from tests.conftest import HANDLERS, Gate

Start = Callable[..., Server]


@pytest.mark.parametrize("signo", [signal.SIGTERM, signal.SIGINT])
def test_a_graceful_stop_lets_connections_finish(prefork_server: Start, signo: int) -> None:
    server = prefork_server("echo:loop", workers=2)
    with server.connect() as sock:
        os.kill(server.pid, signo)
        watch.logged(server, "no longer listening")
        sock.sendall(b"still here")
        assert sock.recv(64) == b"still here"
        with pytest.raises(ConnectionRefusedError):
            connect(server.address)
    assert server.stop() == 0
    assert "stopped: 1 connections accepted, 0 cut" in server.log()


def test_a_graceful_stop_serves_whom_the_kernel_has_connected(prefork_server: Start) -> None:
    server = prefork_server("tiny:who", folder=HANDLERS, workers=1, max_workers=1)
    with server.connect() as first:
        assert first.recv(64)
        with server.connect() as queued:
            os.kill(server.pid, signal.SIGTERM)
            watch.logged(server, "stopping")
            for _ in range(2):  # each answer is a turn of the master: a listener that it closed too early is closed by now
                assert server.status()["state"] == "stopping"
            first.shutdown(socket.SHUT_WR)
            assert queued.recv(64)
    assert server.stop() == 0
    assert "2 connections accepted, 0 cut" in server.log()


def test_connections_past_graceful_timeout_are_cut_and_named(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=2, graceful_timeout=0.3)
    with server.connect() as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        peer = f"127.0.0.1:{sock.getsockname()[1]}"
        assert server.stop() == 0
        assert sock.recv(1) == b""
    assert f"is killed, serving {peer}: still there at the end of graceful_timeout" in server.log()
    assert "1 connections accepted, 1 cut" in server.log()


@pytest.mark.parametrize("how", ["QUIT", "INT twice"])
def test_a_quick_stop_waits_for_nobody(prefork_server: Start, how: str) -> None:
    server = prefork_server("echo:loop", workers=4)
    with server.connect() as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        pids = [child.pid for child in watch.family(server.pid)]
        if how == "INT twice":
            os.kill(server.pid, signal.SIGINT)
            watch.logged(server, "stopping (SIGINT)")
            time.sleep(SAME_INTERRUPT)  # within it, a second one is the echo of the first
        with watch.soon("a quick stop"):
            assert server.stop(signal.SIGQUIT if how == "QUIT" else signal.SIGINT) == 0
        assert all(map(watch.is_gone, pids))


def test_ttin_and_ttou_are_one_acceptor_more_and_one_fewer(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=2)
    watch.settled(server, 2)
    os.kill(server.pid, signal.SIGTTIN)
    watch.settled(server, 3)
    for idle in (2, 1):
        os.kill(server.pid, signal.SIGTTOU)
        watch.settled(server, idle)
    os.kill(server.pid, signal.SIGTTOU)
    os.kill(server.pid, signal.SIGHUP)
    watch.logged(server, "generation 2 serves")
    watch.settled(server, 2)


def test_every_process_has_a_group_of_its_own_in_the_masters_session(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=2)
    family = [child.pid for child in watch.family(server.pid)]
    assert len({os.getpgid(pid) for pid in (server.pid, *family)}) == 4, "a handler's killpg ends one worker"
    assert {os.getsid(pid) for pid in family} == {os.getsid(server.pid)}


def test_a_stopped_worker_is_not_hung_up_when_its_fork_server_goes(prefork_server: Start) -> None:
    """The kernel sends SIGHUP to a process group with a stopped member that has lost its last parent in the session."""
    server = prefork_server("echo:loop", workers=1)
    (idle,) = watch.settled(server, 1)["workers"]
    with server.connect() as sock:
        sock.sendall(b"a")
        assert sock.recv(1) == b"a"
        os.kill(idle["pid"], signal.SIGSTOP)
        watch.until("it is stopped", lambda: process.state(idle["pid"]) == b"T")
        fork_server = psutil.Process(idle["pid"]).ppid()
        os.kill(fork_server, signal.SIGKILL)
        watch.until("it is the master's child", lambda: psutil.Process(idle["pid"]).ppid() == server.pid)
        assert process.state(idle["pid"]) == b"T"
        os.kill(idle["pid"], signal.SIGCONT)
        sock.sendall(b"b")
        assert sock.recv(1) == b"b"


def test_sighup_while_stopping_and_term_while_reloading_are_understood(prefork_server: Start) -> None:
    server = prefork_server("gated:loop", folder=HANDLERS, workers=2)
    with server.connect() as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        os.kill(server.pid, signal.SIGHUP)
        os.kill(server.pid, signal.SIGTERM)
        watch.logged(server, "stopping")
        os.kill(server.pid, signal.SIGHUP)
        watch.logged(server, "reload (SIGHUP) ignored: the daemon is stopping")
    assert server.stop() == 0


def test_term_before_the_first_ready_ends_the_daemon(prefork_server: Start, gate: Gate) -> None:
    # Start it in a thread: the fixture waits for a READY that never comes.
    started: list[str] = []

    def start() -> None:
        try:
            prefork_server("gated:loop", folder=HANDLERS, environment=gate.environment, name="early")
        except Exception as error:
            started.append(str(error))

    thread = threading.Thread(target=start)
    with gate.closed():
        thread.start()
        pid = watch.until("the fork server runs", lambda: _master_of("prefork: early gen 1"))
        os.kill(pid, signal.SIGTERM)
        with watch.soon("ending a daemon that boots"):
            thread.join()
    assert "exit status 0" in started[0]


def _master_of(title: str) -> int | None:
    for child in watch.family(os.getpid()):
        with suppress(psutil.NoSuchProcess):  # who has read the command line is gone soon
            if child.cmdline()[:1] == [title]:
                return child.ppid()
    return None
