"""A handler that becomes another program: its connection is the program's, and goes on over whatever becomes of the daemon."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from _pytest.mark.structures import ParameterSet

from prefork.testing import Server
from tests import watch

Start = Callable[..., Server]
Module = Callable[[str], Path]

CAT = """
import os

def loop(sock):
    for fd in (0, 1):
        os.dup2(sock.fileno(), fd)
    os.execvp("cat", ["cat"])
"""
# As C code does it: nothing of Python's knows.
BY_C = CAT.replace('os.execvp("cat", ["cat"])', 'ctypes.CDLL(None).execlp(b"cat", b"cat", None)').replace("os\n", "ctypes, os\n", 1)


def slow(happens: Callable[[Server], None]) -> ParameterSet:
    return pytest.param(happens, marks=pytest.mark.slow)


def says(sock: socket.socket, line: bytes) -> None:
    sock.sendall(line)
    assert sock.recv(64) == line


def reload(server: Server) -> None:
    old = watch.fork_server(server)
    assert server.command("reload")["ok"]
    watch.until("the old fork server has gone", lambda: watch.is_gone(old))


def upgrade(server: Server) -> None:
    os.kill(server.pid, signal.SIGUSR2)
    watch.logged(server, "goes on where prefork")
    watch.logged(server, "generation 2 serves")


def kill_the_fork_server(server: Server) -> None:
    os.kill(watch.fork_server(server), signal.SIGKILL)
    watch.logged(server, "generation 2 serves")


def scale(server: Server) -> None:
    assert server.command("scale", workers="1")["ok"]


def kill_the_master(server: Server) -> None:
    fork_server = watch.fork_server(server)
    os.kill(server.pid, signal.SIGKILL)
    server.process.wait()
    watch.until("the address is free", lambda: watch.is_free(server.address[1]))
    assert not watch.is_gone(fork_server), "it waits for its last worker"


def kill_both(server: Server) -> None:
    fork_server = watch.fork_server(server)
    os.kill(server.pid, signal.SIGSTOP)
    os.kill(fork_server, signal.SIGKILL)
    os.kill(server.pid, signal.SIGKILL)
    server.process.wait()
    watch.until("the address is free", lambda: watch.is_free(server.address[1]))


@pytest.mark.parametrize("drain", ["finish", "eof"])
@pytest.mark.parametrize("happens", [reload, slow(upgrade), kill_the_fork_server, scale, kill_the_master, slow(kill_both)])
def test_a_program_that_a_handler_has_become_finishes_its_connection(
    prefork_server: Start, module: Module, happens: Callable[[Server], None], drain: str
) -> None:
    server = prefork_server("mine:loop", folder=module(CAT if drain == "finish" else BY_C), workers=2, drain=drain)
    with server.connect() as sock:
        says(sock, b"before")
        busy = watch.workers(server, "busy")[0]["pid"]
        happens(server)
        says(sock, b"after")
        assert not watch.is_gone(busy)
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(64) == b""
    watch.until("it has ended", lambda: watch.is_gone(busy))
    if server.process.poll() is None:
        [death] = watch.until("its end is known", lambda: server.status()["deaths"])
        assert (death["pid"], death["cause"]) == (busy, "exit status 0")


def test_a_program_that_takes_longer_than_timeout_ends_by_a_signal_that_has_a_name(prefork_server: Start, module: Module) -> None:
    server = prefork_server("mine:loop", folder=module(CAT), workers=1, timeout=0.1)
    with server.connect() as sock:
        says(sock, b"before")
        assert watch.cut(sock)
    [death] = watch.until("its end is known", lambda: server.status()["deaths"])
    assert death["cause"] == "timeout after 0.1 s (signal 37 (SIGRTMIN+3))"
    assert "died: timeout after 0.1 s (signal 37 (SIGRTMIN+3)), serving 127.0.0.1:" in watch.logged(server, "died:")


@pytest.mark.slow
def test_no_client_is_lost_whose_handler_becomes_a_program_while_it_is_asked_to_leave(
    prefork_server: Start, module: Module
) -> None:
    program = f'os.execv("{sys.executable}", ["python", "-SEsc", "import os; os.write(1, os.read(0, 64))"])'
    server = prefork_server("mine:loop", folder=module(CAT.replace('os.execvp("cat", ["cat"])', program)), workers=4)
    served, failures, done = [0], [], threading.Event()

    def ask() -> None:
        while not done.is_set():
            try:
                with server.connect() as sock:
                    says(sock, b"hello")
                served[0] += 1
            except (OSError, AssertionError) as error:
                failures.append(repr(error))

    clients = [threading.Thread(target=ask) for _ in range(4)]
    for client in clients:
        client.start()
    for _ in range(20):
        assert server.command("reload")["ok"]
    done.set()
    for client in clients:
        client.join()

    assert served[0] > 40
    assert not failures
