"""What a service manager hears of a real daemon (sd_notify(3))."""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from prefork.testing import Server, connect
from tests import watch

Module = Callable[[str], Path]

ECHO = "def loop(sock):\n    while data := sock.recv(64):\n        sock.sendall(data)\n"
SLOW = "import os, time\nwhile not os.path.exists('go'):\n    time.sleep(0.01)\n" + ECHO
ENVIRONMENT = """
import os
def loop(sock):
    sock.recv(64)
    names = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS")
    sock.sendall(" ".join(name for name in names if name in os.environ).encode() + b".")
"""
START = ("--workers=2", "--bind=127.0.0.1:0", "--module=mine:loop")


class Manager:
    """A service manager that only listens. ``heard``: its lines and when they came, those that were waited for taken out."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.heard: list[tuple[float, str]] = []

    def hears(self, start: str, deadline: float = watch.DEADLINE) -> str:
        """Wait for a line that starts so. Returns it; what came before it stays unheard no longer."""
        end = time.monotonic() + deadline
        while True:
            while self.heard:
                _, line = self.heard.pop(0)
                if line.startswith(start):
                    return line
            assert watch.readable(self.sock, end - time.monotonic()), f"not told: {start}"
            self.take()

    def take(self) -> None:
        """Take in what has come."""
        while watch.readable(self.sock, 0):
            now = time.monotonic()
            self.heard += [(now, line) for line in self.sock.recv(4096).decode().split("\n")]


@contextmanager
def managed(
    folder: Path, scratch: Path, *options: str, name: str | None = None, start: Sequence[str] = START, **environment: str
) -> Iterator[tuple[Server, Manager]]:
    """A daemon under a manager, which listens at this name; it is starting."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(scratch / "notify") if name is None else "\0" + name)
        told = {"NOTIFY_SOCKET": str(scratch / "notify") if name is None else "@" + name, **environment}
        command = [sys.executable, "-m", "prefork", "serve", *start, *options]
        with watch.running(command, folder, scratch, environment=told, wait=False) as server:
            yield server, Manager(sock)


def address(server: Server) -> tuple[str, int]:
    host, _, port = server.status()["listeners"][0]["address"].rpartition(":")
    return host, int(port)


def test_ready_is_told_when_the_first_acceptors_are_there_and_not_before(module: Module, tmp_path: Path) -> None:
    folder = module(SLOW)
    with managed(folder, tmp_path) as (server, manager):
        manager.hears("STATUS=starting")
        watch.until("it imports", lambda: len(watch.family(server.pid)) == 1)
        manager.take()
        assert "READY=1" not in [line for _, line in manager.heard]
        (folder / "go").touch()
        manager.hears("READY=1")
        assert len(watch.workers(server)) == 2
        assert manager.hears("STATUS=") == "STATUS=2 acceptors, 0 busy, 0.0 connections/s"


def test_reloads_are_told_with_their_outcome(module: Module, tmp_path: Path) -> None:
    (tmp_path / "conf").touch()
    with managed(module(ECHO), tmp_path, f"--config={tmp_path / 'conf'}") as (server, manager):
        manager.hears("READY=1")
        before = time.monotonic()
        os.kill(server.pid, signal.SIGHUP)
        manager.hears("RELOADING=1")
        told = int(manager.hears("MONOTONIC_USEC=").partition("=")[2]) / 1e6
        assert before <= told <= time.monotonic()
        manager.hears("READY=1")
        module("1 / 0\n")
        os.kill(server.pid, signal.SIGHUP)
        manager.hears("RELOADING=1")
        manager.hears("READY=1")
        assert "; last reload refused: mine:loop: the import raised ZeroDivisionError" in manager.hears("STATUS=")
        # Refused before anything begins.
        (tmp_path / "conf").write_text("wokers = 3\n")
        os.kill(server.pid, signal.SIGHUP)
        manager.hears("RELOADING=1")
        manager.hears("MONOTONIC_USEC=")
        manager.hears("READY=1")
        assert "; last reload refused: unknown option 'wokers'" in manager.hears("STATUS=")
        assert server.stop() == 0
        manager.hears("STOPPING=1")


def test_an_upgrade_ends_as_it_was_begun_by_the_program_before(module: Module, tmp_path: Path) -> None:
    with managed(module(ECHO), tmp_path, WATCHDOG_USEC="1000000") as (server, manager):
        manager.hears("READY=1")
        for generation in (2, 3):
            asked = server.command("upgrade")
            assert server.command("outcome", upgrade=asked["upgrade"])["generation"] == generation
            manager.hears("RELOADING=1")
            manager.hears("READY=1")
            manager.hears("WATCHDOG=1")
        manager.take()
        assert not [line for _, line in manager.heard if line.startswith("MAINPID")]


def test_the_watchdog_is_fed_by_the_main_loop_and_only_by_it(module: Module, tmp_path: Path) -> None:
    with managed(module(ECHO), tmp_path, WATCHDOG_USEC="600000") as (server, manager):
        manager.hears("READY=1")
        for _ in range(5):
            manager.hears("WATCHDOG=1")
        os.kill(server.pid, signal.SIGSTOP)
        try:
            watch.until("it stands still", lambda: os.waitid(os.P_PID, server.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT))
            manager.take()
            manager.heard.clear()
            assert not watch.readable(manager.sock, 1.0)
        finally:
            os.kill(server.pid, signal.SIGCONT)
        manager.hears("WATCHDOG=1", deadline=0.3)


def test_a_watchdog_of_another_process_is_not_ours(module: Module, tmp_path: Path) -> None:
    with managed(module(ECHO), tmp_path, WATCHDOG_USEC="100000", WATCHDOG_PID="1") as (_, manager):
        manager.hears("READY=1")
        manager.hears("STATUS=")
        assert not watch.readable(manager.sock, 0.5)


def test_a_stop_asks_for_time_while_connections_end(module: Module, tmp_path: Path) -> None:
    with managed(module(ECHO), tmp_path) as (server, manager):
        manager.hears("READY=1")
        with connect(address(server)) as sock:
            sock.sendall(b"x")
            assert sock.recv(1) == b"x"
            os.kill(server.pid, signal.SIGTERM)
            manager.hears("STOPPING=1")
            assert manager.hears("STATUS=").endswith("; stopping")
            assert manager.hears("EXTEND_TIMEOUT_USEC=") == "EXTEND_TIMEOUT_USEC=20000000"
        assert server.stop() == 0


def test_a_manager_in_the_abstract_namespace(module: Module, tmp_path: Path) -> None:
    with managed(module(ECHO), tmp_path, name=f"prefork-test-{os.getpid()}") as (server, manager):
        manager.hears("READY=1")
        assert server.stop() == 0
        manager.hears("STOPPING=1")


def test_a_start_that_fails_tells_why(module: Module, tmp_path: Path) -> None:
    with managed(module("1 / 0\n"), tmp_path) as (server, manager):
        assert "the start failed: mine:loop: the import raised ZeroDivisionError" in manager.hears("STATUS=0 busy")
        assert server.process.wait() == 78
    (tmp_path / "notify").unlink()
    with managed(tmp_path, tmp_path, start=("--config=/nowhere",)) as (server, manager):
        assert (
            manager.hears("STATUS=") == "STATUS=the start failed: /nowhere: can't read the configuration: No such file or directory"
        )
        assert server.process.wait() == 78


def test_handlers_are_told_nothing_of_the_manager(module: Module, tmp_path: Path) -> None:
    with managed(module(ENVIRONMENT), tmp_path, WATCHDOG_USEC="10000000") as (server, manager):
        manager.hears("READY=1")
        with connect(address(server)) as sock:
            sock.sendall(b"?")
            assert sock.recv(64) == b"."
