"""What the service manager is told and when, with a manager that keeps everything and a clock that is set by hand."""

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from prefork.daemon import Daemon
from prefork.notifying import AGAIN, EXTENSION, PERIOD, Notifying
from prefork.pool.scoreboard import IDLE
from prefork.pool.tally import LastReload, Trouble
from prefork.system import systemd
from prefork.system.systemd import TEXT_LIMIT, Notifier


@dataclass
class Generation:
    """As much of one as is counted."""

    idle: int = 8
    connections: int = 0
    at_ceiling: bool = False

    def count(self, state: int) -> int:
        return self.idle if state == IDLE else 0

    def begun(self) -> int:
        return self.connections


@dataclass
class Fake:
    """As much of a daemon as is told of."""

    current: Generation | None = None
    stopping: Any = None
    reloading: Any = None
    upgrade: Any = None
    last_reload: LastReload | None = None
    failure: Exception | None = None
    lost: float = 0.0
    connected: int = 0
    trouble: Trouble = field(default_factory=Trouble)
    state: str = "starting"
    tally: Any = field(default_factory=lambda: SimpleNamespace(counts=SimpleNamespace(begun=0)))
    config: Any = field(default_factory=lambda: SimpleNamespace(max_workers=256))

    def busy(self) -> int:
        return self.connected

    def generations(self) -> list[Generation]:
        return [self.current] if self.current is not None else []

    def troubles(self) -> list[Trouble]:
        return [self.trouble]

    def runs(self) -> None:
        self.current, self.state = Generation(), "running"


class Manager:
    """The other end, and the clock."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.now = 1000.0
        self.daemon = Fake()
        self.notifying = Notifying(cast(Daemon, self.daemon), lambda: self.now)

    def hears(self, seconds: float = 0.0) -> list[str]:
        """What is told after so many seconds, without the requests for more time."""
        return [line for line in self.hears_all(seconds) if not line.startswith(("EXTEND", "WATCHDOG"))]

    def hears_all(self, seconds: float = 0.0) -> list[str]:
        self.now += seconds
        self.notifying.tend()
        heard = []
        while True:
            try:
                heard += self.sock.recv(4096).decode().split("\n")
            except BlockingIOError:
                return heard

    @property
    def sleeps(self) -> float | None:
        """How long the master sleeps when nothing happens."""
        at = self.notifying.wake_at()
        return None if at is None else round(at + self.daemon.lost - self.now, 3)


@pytest.fixture
def end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield sock


@pytest.fixture
def manager(end: socket.socket) -> Manager:
    made = Manager(end)
    made.notifying.begin()
    return made


@pytest.fixture
def running(manager: Manager) -> Manager:
    manager.hears()
    manager.daemon.runs()
    assert manager.hears() == ["READY=1", "STATUS=8 acceptors, 0 busy, 0.0 connections/s"]
    return manager


def test_ready_comes_once_and_a_daemon_at_rest_sends_nothing_and_sleeps(manager: Manager) -> None:
    assert manager.hears() == ["STATUS=starting"]
    manager.daemon.runs()
    assert manager.hears() == ["READY=1", "STATUS=8 acceptors, 0 busy, 0.0 connections/s"]
    for _ in range(5):
        assert manager.hears_all(PERIOD) == []
        assert manager.sleeps is None


def test_numbers_are_told_once_in_a_period_and_until_they_are_at_rest(running: Manager) -> None:
    current = running.daemon.current
    assert current is not None
    current.connections, current.idle, running.daemon.connected = 30, 7, 1
    assert running.hears(PERIOD / 2) == []
    assert running.hears(PERIOD / 2) == ["STATUS=7 acceptors, 1 busy, 3.0 connections/s"]
    current.connections, current.idle, running.daemon.connected = 2030, 8, 0
    assert running.sleeps == PERIOD
    assert running.hears(1) == []
    assert running.hears(PERIOD - 1) == ["STATUS=8 acceptors, 0 busy, 200 connections/s"]
    assert running.sleeps == PERIOD
    assert running.hears(PERIOD) == ["STATUS=8 acceptors, 0 busy, 0.0 connections/s"]
    assert running.sleeps is None


def test_counters_that_went_back_are_no_negative_rate(running: Manager) -> None:
    current = running.daemon.current
    assert current is not None
    current.connections = -50
    assert running.hears(PERIOD) == []


def test_a_rate_is_not_that_of_a_moment(running: Manager) -> None:
    current = running.daemon.current
    assert current is not None
    running.now += PERIOD
    current.connections = 50
    assert running.hears() == ["STATUS=8 acceptors, 0 busy, 5.0 connections/s"]
    current.connections = 60
    running.daemon.state = "suspended"
    assert running.hears(0.01) == ["STATUS=8 acceptors, 0 busy, 5.0 connections/s; suspended"]


def test_the_whole_is_short_enough_for_the_manager(running: Manager) -> None:
    running.daemon.last_reload = LastReload(0.0, "refused", "x" * 5000)
    running.daemon.trouble = Trouble(1, 0.0, "y" * 5000)
    running.daemon.stopping = object()
    told = running.hears()
    assert told[:-1] == ["STOPPING=1"]
    assert len(told[-1]) == len("STATUS=") + TEXT_LIMIT


def test_the_ceiling_is_told_with_the_numbers(running: Manager) -> None:
    running.daemon.current = Generation(0, at_ceiling=True)
    running.daemon.connected = 256
    told = "STATUS=0 acceptors, 256 busy, 0.0 connections/s; max_workers = 256 is reached"
    assert running.hears(PERIOD) == [told]


def test_a_reload_is_told_at_its_begin_and_its_end(running: Manager) -> None:
    running.daemon.reloading, running.daemon.state = SimpleNamespace(is_restart=False), "reloading"
    running.now += 1
    told = running.hears()
    assert told[:2] == ["RELOADING=1", f"MONOTONIC_USEC={int(running.now * 1e6)}"]
    assert told[2].endswith("; reloading")
    running.daemon.reloading, running.daemon.state = None, "running"
    running.daemon.last_reload = LastReload(0.0, "ok", None)
    assert running.hears(1) == ["READY=1", "STATUS=8 acceptors, 0 busy, 0.0 connections/s"]
    assert running.hears(1) == []


def test_one_that_is_refused_in_the_same_turn_is_told_too(running: Manager) -> None:
    running.daemon.last_reload = LastReload(0.0, "refused", "unknown option 'wokers'\nand a traceback")
    told = running.hears()
    assert told[:3] == ["RELOADING=1", f"MONOTONIC_USEC={int(running.now * 1e6)}", "READY=1"]
    assert told[3] == "STATUS=8 acceptors, 0 busy, 0.0 connections/s; last reload refused: unknown option 'wokers'"
    assert running.hears(PERIOD) == []


def test_a_new_fork_server_for_a_dead_one_is_no_reload(running: Manager) -> None:
    running.daemon.reloading = SimpleNamespace(is_restart=True)
    assert running.hears() == []


def test_an_upgrade_is_a_reload_that_the_next_program_ends(running: Manager, end: socket.socket) -> None:
    running.daemon.upgrade, running.daemon.state = SimpleNamespace(result="", at=5.0), "upgrading"
    assert running.hears()[0] == "RELOADING=1"
    successor = Manager(end)
    successor.daemon = running.daemon
    successor.notifying = Notifying(cast(Daemon, successor.daemon), lambda: successor.now)
    successor.notifying.begin()
    assert [line for line in successor.hears() if not line.startswith("STATUS=")] == []
    successor.daemon.upgrade, successor.daemon.state = SimpleNamespace(result="refused", reason="too old", at=5.0), "running"
    assert successor.hears() == ["READY=1", "STATUS=8 acceptors, 0 busy, 0.0 connections/s; last upgrade refused: too old"]
    # A reload that comes later tells how things are.
    successor.daemon.last_reload = LastReload(6.0, "ok", None)
    assert "STATUS=8 acceptors, 0 busy, 0.0 connections/s" in successor.hears()


def test_a_stop_asks_for_more_time_piece_by_piece(running: Manager) -> None:
    running.daemon.stopping, running.daemon.state, running.daemon.connected = object(), "stopping", 2
    more = f"EXTEND_TIMEOUT_USEC={EXTENSION * 1e6:.0f}"
    assert running.hears_all() == ["STOPPING=1", "STATUS=8 acceptors, 2 busy, 0.0 connections/s; stopping", more]
    assert running.hears_all() == []
    assert running.sleeps == EXTENSION / 2
    running.daemon.current = None
    assert running.hears_all(EXTENSION / 2) == ["STATUS=2 busy, 0.0 connections/s; stopping", more]


def test_so_do_a_start_and_a_reload(manager: Manager) -> None:
    more = f"EXTEND_TIMEOUT_USEC={EXTENSION * 1e6:.0f}"
    assert more in manager.hears_all()
    assert manager.hears_all(EXTENSION / 2) == [more]
    manager.daemon.runs()
    assert more not in manager.hears_all()
    manager.daemon.reloading = SimpleNamespace(is_restart=False)
    assert more in manager.hears_all()


def test_a_start_that_fails_says_why(manager: Manager) -> None:
    manager.hears()
    manager.daemon.failure, manager.daemon.stopping = ValueError("mine:loop: no module\nTraceback"), object()
    assert manager.hears() == ["STOPPING=1", "STATUS=0 busy, 0.0 connections/s; the start failed: mine:loop: no module"]


def test_workers_that_do_not_start_are_told_at_once(running: Manager) -> None:
    running.daemon.trouble = Trouble(3, 0.0, "fork failed: Cannot allocate memory")
    assert running.hears() == ["STATUS=8 acceptors, 0 busy, 0.0 connections/s; fork failed: Cannot allocate memory"]


def test_the_watchdog_is_fed_at_half_its_period(running: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    running.notifying.begin()
    running.daemon.last_reload = None
    assert "WATCHDOG=1" in running.hears_all()
    assert running.sleeps is not None
    assert running.sleeps <= 15
    assert running.hears_all(14.9) == []
    running.daemon.lost = 3.0  # the manager's clock does not stop while we do
    assert running.sleeps == 0.1
    assert running.hears_all(0.1) == ["WATCHDOG=1"]
    assert running.sleeps == 15.0


def test_what_a_full_manager_did_not_take_is_told_again(running: Manager) -> None:
    while Notifier.from_environment().send(X=1):
        pass
    running.daemon.stopping = object()
    running.notifying.tend()
    assert running.sleeps == AGAIN
    while True:
        try:
            running.sock.recv(4096)
        except BlockingIOError:
            break
    assert running.hears(AGAIN)[0] == "STOPPING=1"
    assert running.sleeps != AGAIN


def test_a_full_manager_is_not_asked_all_the_time_for_what_is_long_due(end: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    while Notifier.from_environment().send(X=1):
        pass
    manager = Manager(end)
    manager.notifying.begin()
    manager.daemon.runs()
    for _ in range(3):
        manager.notifying.tend()  # READY, more time, and the watchdog: none was ever told
        assert manager.sleeps == AGAIN
        manager.now += AGAIN


def test_nobody_to_tell_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.setenv("WATCHDOG_USEC", "1000000")
    silent = Notifying(cast(Daemon, Fake()))
    silent.begin()
    silent.tend()
    assert silent.wake_at() is None


# -- the protocol's pieces


def test_the_abstract_namespace() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind("")  # autobind: an abstract name (unix(7))
        name = end.getsockname().decode()
        assert Notifier(name.replace("\0", "@", 1)).send(READY=1, STATUS="here")
        assert end.recv(4096) == b"READY=1\nSTATUS=here"


@pytest.mark.parametrize("path", [None, "", "@", "/", "relative", "vsock:2:1234"])
def test_what_is_no_address_of_a_manager_is_nobody(path: str | None) -> None:
    notifier = Notifier(path)
    assert not notifier
    assert notifier.send(READY=1)


def test_a_manager_that_has_gone_is_not_told_again(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(str(tmp_path / "notify"))
    assert Notifier(str(tmp_path / "notify")).send(READY=1)
    assert Notifier(str(tmp_path / "nothing")).send(READY=1)


def test_a_lone_surrogate_is_told_somehow(end: socket.socket) -> None:
    assert Notifier.from_environment().send(STATUS="a \udc80 b")
    assert end.recv(4096) == b"STATUS=a \\udc80 b"


def test_a_line_is_one_line_and_short() -> None:
    assert systemd.line("one\ntwo") == "one"
    assert systemd.line("it raised\nTraceback (most recent call last):\n  File\nKeyError: 'a'\n") == "it raised KeyError: 'a'"
    assert systemd.line("ä" * TEXT_LIMIT).encode() == b"\xc3\xa4" * (TEXT_LIMIT // 2)


@pytest.mark.parametrize(
    ("microseconds", "pid", "seconds"),
    [
        ("30000000", "ours", 30.0),
        ("500000", "", 0.5),
        ("500000", "1", None),
        ("0", "", None),
        ("-5", "", None),
        ("soon", "", None),
        ("", "", None),
        (str((1 << 64) - 1), "", None),
    ],
)
def test_the_watchdog_is_for_the_process_that_is_named(microseconds: str, pid: str, seconds: float | None) -> None:
    named = pid.replace("ours", str(os.getpid()))
    assert systemd.watchdog({"WATCHDOG_USEC": microseconds, "WATCHDOG_PID": named}) == seconds
