"""Floods of what wakes the master: how often it is heard, on a clock that we turn."""

import errno
import os
import selectors
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, cast

import pytest

from prefork import floods
from prefork.config import Sources
from prefork.daemon import Daemon
from prefork.floods import ChildSignals, Doorbell
from prefork.link import Wiring
from prefork.master import Master
from prefork.net.listener import Listener
from prefork.ops import control
from prefork.ops.control import Client, ControlServer
from prefork.pool import wire
from prefork.pool.throttle import REGISTER_AGAIN
from prefork.system import process
from tests.unit.test_generation import Peer

RING = wire.doorbell_of(wire.Ring.ACCEPTED, 1)(0, 4_000_000)


class Pool:
    """A generation, as far as a doorbell wants to know."""

    number = 1

    def __init__(self) -> None:
        self.rings = self.looks = 0
        self.listeners: list[Listener] = []

    def rang(self, _ring: wire.Doorbell, _now: float) -> bool:
        self.rings += 1
        return True

    def look_at_everything(self, _now: float) -> None:
        self.looks += 1


class Door:
    """A daemon with a doorbell and one such generation, and our end of the pipe."""

    def __init__(self, stack: ExitStack) -> None:
        read_end, self.write_end = os.pipe2(os.O_NONBLOCK)
        for fd in (read_end, self.write_end):
            stack.callback(os.close, fd)
        self.daemon = Daemon(Sources({}))
        self.daemon.wiring = Wiring("echo", "/", read_end, self.write_end, 0)
        self.daemon.selector = stack.enter_context(selectors.DefaultSelector())
        self.pool = Pool()
        self.daemon.draining.append(cast("Any", self.pool))
        self.looked: list[Listener] = []
        self.doorbell = Doorbell(self.daemon, self.looked.append)
        self.turns = 0

    def turn(self, now: float) -> None:
        """One turn of the master's loop."""
        for key, _ in self.daemon.selector.select(0):
            self.turns += 1
            key.data(now)
        self.doorbell.tend(now)

    def rings(self, data: bytes) -> None:
        try:
            os.write(self.write_end, data)
        except BlockingIOError:
            return


@pytest.fixture
def door() -> Iterator[Door]:
    with ExitStack() as stack:
        yield Door(stack)


@pytest.mark.parametrize("data", [RING, RING * 200, b"garbage", b"\xff" * 65536], ids=["one", "many", "stray", "full"])
def test_a_doorbell_that_rings_without_end_is_heard_so_often_and_told_once(
    door: Door, data: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    seconds = 5
    for millisecond in range(seconds * 1000):
        door.rings(data)
        door.turn(millisecond / 1000)
    assert floods.TURNS_A_SECOND * (seconds - 1) < door.turns <= floods.TURNS + floods.TURNS_A_SECOND * seconds + 1
    if data is not RING:
        assert door.pool.looks == door.turns, "what may have been lost is looked for"
    assert capfd.readouterr().err.count("a flood of rings") == 1
    for second in range(4):
        door.turn(seconds + 1.0 + second)
    before = door.pool.rings
    door.rings(RING)
    door.turn(seconds + 5.0)
    assert door.pool.rings == before + 1, "it is heard again as soon as it is calm"


def test_a_look_that_costs_more_comes_more_seldom_and_is_told_once(
    door: Door, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As where there are a hundred addresses."""
    seconds, cost = 10, 0.0036
    monkeypatch.setattr(time, "thread_time", lambda: cost * door.pool.looks)
    for millisecond in range(seconds * 1000):
        door.rings(b"garbage")
        door.turn(millisecond / 1000)
    assert door.pool.looks > seconds, "it is heard all the same"
    assert cost * door.pool.looks <= floods.TURN * (floods.TURNS + floods.TURNS_A_SECOND * seconds) + cost
    assert capfd.readouterr().err.count("a flood of rings (garbage") == 1


class Refusing(selectors.DefaultSelector):
    """A selector whose kernel has no watch left when it is told so."""

    refuses = False

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        if self.refuses:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().register(fileobj, events, data)


def test_a_doorbell_that_can_not_be_registered_again_is_tried_again(door: Door, capfd: pytest.CaptureFixture[str]) -> None:
    door.daemon.selector.close()
    with Refusing() as door.daemon.selector:
        door.doorbell = Doorbell(door.daemon, door.looked.append)
        door.rings(b"garbage")
        door.turn(1.0)
        assert door.doorbell.paused_until == 1.0 + floods.REST
        door.daemon.selector.refuses = True
        door.turn(1.1)
        assert door.doorbell.paused_until == 1.1 + REGISTER_AGAIN
        door.turn(2.2)
        door.daemon.selector.refuses = False
        door.rings(RING)
        door.turn(3.3)
        before = door.pool.rings
        door.turn(3.4)
        assert door.pool.rings == before + 1
    assert capfd.readouterr().err.count("can't hear the workers' rings for now: No space left on device") == 1


def test_rings_with_forks_behind_them_are_no_flood(door: Door, capfd: pytest.CaptureFixture[str]) -> None:
    for millisecond in range(5_000):
        door.rings(RING)
        door.turn(millisecond / 1000)
        door.daemon.tally.forked += millisecond % 2
    assert door.turns == 5_000
    assert "flood" not in capfd.readouterr().err


def test_children_that_end_or_stop_without_end_are_reaped_so_often(capfd: pytest.CaptureFixture[str]) -> None:
    children, turns, seconds = ChildSignals(), 0, 10
    try:
        for millisecond in range(seconds * 1000):
            now = millisecond / 1000
            if signal.SIGCHLD not in signal.pthread_sigmask(signal.SIG_BLOCK, []):
                turns += 1
                children.came(now, ours=False)
            children.tend(now)
        assert floods.TURNS_A_SECOND * (seconds - 1) < turns <= floods.TURNS + floods.TURNS_A_SECOND * seconds + 1
        assert capfd.readouterr().err.count("a flood of ends and stops") == 1
        children.tend(now + 1)
        assert signal.SIGCHLD not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])


def test_ends_of_workers_are_no_flood_and_do_not_make_the_master_deaf(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    peer = Peer(1)
    peer.boot(1)
    master = Master(Sources({}), lambda *_: None)
    master.daemon.draining.append(peer.generation)
    master.daemon.wiring = peer.generation.link.wiring
    pid = peer.generation.pool.workers[0].pid

    def reaped(pid: int) -> bool:
        monkeypatch.setattr(process, "reap", lambda **_: [process.Ended(pid, 0, 0.0, 0.0, 0)])
        return master._reap()

    assert not reaped(pid + 1), "an orphan of user code"
    assert reaped(pid)
    for millisecond in range(1000):
        master.child_signals.came(millisecond / 1000, ours=True)
    assert master.child_signals.paused_until is None
    assert "flood" not in capfd.readouterr().err
    peer.close()


def test_what_is_not_reaped_in_one_go_is_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "ENDS_AT_ONCE", 2)
    told: list[int] = []
    before = signal.signal(signal.SIGCHLD, lambda signo, _: told.append(signo))
    try:
        children = [os.posix_spawn("/bin/true", ["true"], {}) for _ in range(3)]
        for pid in children:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        told.clear()
        found = process.reap(stops=True)
        assert len(found) == 2
        assert told, "there is more"
        told.clear()
        found += process.reap(stops=True)
        assert {change.pid for change in found} == set(children)
        assert not told
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_ends_do_not_wait_behind_the_stops_of_older_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "CHANGES_AT_ONCE", 2)
    told: list[int] = []
    before = signal.signal(signal.SIGCHLD, lambda signo, _: told.append(signo))
    older = [os.posix_spawn("/bin/sleep", ["sleep", "60"], {}) for _ in range(3)]
    younger = os.posix_spawn("/bin/true", ["true"], {})
    try:
        for pid in older:
            os.kill(pid, signal.SIGSTOP)
            os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
        os.waitid(os.P_PID, younger, os.WEXITED | os.WNOWAIT)
        told.clear()
        found = process.reap(stops=True)
        assert [change.pid for change in found] == [*older[:2], younger]
        assert told, "there is a stop more"
        told.clear()
        assert process.reap(stops=True) == [process.Changed(older[2], stopped=True)]
        assert not told
    finally:
        for pid in older:
            os.kill(pid, signal.SIGKILL)
        for pid in (*older, younger):
            with suppress(ChildProcessError):  # reaped, as it should be
                os.waitpid(pid, 0)
        signal.signal(signal.SIGCHLD, before)


# -- fork servers


def test_a_channel_at_its_end_is_not_heard_again() -> None:
    peer = Peer(1)
    peer.boot(1)
    daemon = Daemon(Sources({}))
    daemon.current = peer.generation
    with selectors.DefaultSelector() as daemon.selector:
        daemon.listen_to(peer.generation)
        peer.end.shutdown(socket.SHUT_RDWR)
        (key, _), *_ = daemon.selector.select(0)
        key.data(1.0)
        for _ in range(3):
            daemon.listen_to(peer.generation)
            assert daemon.selector.select(0) == []
    wake_at = peer.generation.wake_at()
    assert wake_at is not None
    assert wake_at > 1.0
    peer.close()


def test_a_channel_that_can_not_be_registered_again_is_tried_again(capfd: pytest.CaptureFixture[str]) -> None:
    peer = Peer(1)
    peer.boot(1)
    daemon = Daemon(Sources({}))
    daemon.current = peer.generation
    with Refusing() as daemon.selector:
        daemon.selector.refuses = True
        for daemon.now in (1.0, 2.0, 3.0):
            daemon.listen_to_all()
            assert not peer.generation.is_heard
            assert peer.generation.wake_at() == daemon.now + REGISTER_AGAIN
            peer.generation.tend(daemon.now + REGISTER_AGAIN, 0)
        daemon.selector.refuses = False
        daemon.listen_to_all()
        assert peer.generation.is_heard
        peer.end.send(b"nonsense")
        (key, _), *_ = daemon.selector.select(0)
        key.data(4.0)
    assert peer.generation.gossip == 1
    assert capfd.readouterr().err.count("can't hear the fork server of generation 1 for now") == 1
    peer.close()


def test_a_fork_server_that_has_ended_and_is_not_reaped_is_found_by_looks_that_become_rare() -> None:
    peer = Peer(1)
    peer.boot(1)
    generation = peer.generation
    read_end, write_end = os.pipe()
    pid = os.posix_spawn(
        "/bin/cat", ["cat"], {}, file_actions=[(os.POSIX_SPAWN_DUP2, read_end, 0), (os.POSIX_SPAWN_CLOSE, write_end)]
    )
    os.close(read_end)
    generation.link.pid = None  # `hang_up` is to kill nobody
    generation.hang_up(0.0)
    generation.link.pid, now, looks = pid, 0.0, 0
    while now < 30:
        if generation.fork_server_is_a_zombie(now):
            raise AssertionError("it lives")
        looks, now = looks + 1, now + 0.01
        wake_at = generation.wake_at()
        assert wake_at is not None
        now = max(now, wake_at)
    assert looks < 40
    os.close(write_end)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert not generation.fork_server_is_a_zombie(now + 1), "it may be reaped in this very turn"
    assert generation.fork_server_is_a_zombie(now + 2)
    os.waitpid(pid, 0)
    peer.close()


@pytest.mark.parametrize("message", [b"", b"nonsense"], ids=["stopped and continued", "nonsense"])
def test_a_fork_server_that_tells_without_end_is_heard_so_often(message: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    peer = Peer(1)
    peer.boot(1)
    generation, told, turns, seconds = peer.generation, 0, 0, 5
    stop, go_on = (wire.pack_report(wire.Report(kind, 0, 4_000_000)) for kind in (wire.Kind.STOPPED, wire.Kind.CONTINUED))
    for millisecond in range(1000, (seconds + 1) * 1000):
        now = millisecond / 1000
        try:
            peer.end.send(message or (stop, go_on)[told % 2])
            told += 1
        except BlockingIOError:
            pass
        if generation.is_heard:
            turns += 1
            assert generation.receive(now)
        generation.tend(now, 0)
        peer.asked()
    assert told > turns
    assert turns <= 200 + 50 * seconds
    assert capfd.readouterr().err.count("a flood of reports") == 1
    generation.tend(now + 1, 0)
    assert generation.is_heard, "a pause has an end"
    peer.close()


# -- control clients


class Control:
    """A control server that answers all with its uptime, on a clock that we turn."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self.now, self.turns = 0.0, 0
        self.selector = stack.enter_context(Refusing())
        self.server: ControlServer = control.serve(f"{folder}/control", self.selector, self.obey)
        stack.callback(self.server.close)

    def obey(self, client: Client, _request: dict[str, Any]) -> None:
        self.server.answer(client, {"ok": True}, self.now)

    def turn(self) -> None:
        for key, _ in self.selector.select(0):
            self.turns += 1
            key.data(self.now)
        self.server.tend(self.now)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Control]:
    with ExitStack() as stack:
        yield Control(stack, tmp_path)


def _connected(served: Control) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.connect(served.server.path)
    return client


@pytest.mark.parametrize("request_", [b'{"command": "status"}\n', b"garbage\n", b""])
def test_control_clients_without_end_are_heard_so_often(
    served: Control, request_: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    seconds, answered, client = 8, 0, None
    while served.now < seconds:
        if client is None:
            client = _connected(served)
            client.setblocking(False)
            client.sendall(request_)
            if not request_:
                client.shutdown(socket.SHUT_WR)
        served.turn()
        try:
            client.recv(100)
        except BlockingIOError:
            pass
        else:
            answered += 1
            client.close()
            client = None
        served.now += 0.001
    if client is not None:
        client.close()
    assert served.turns <= control.TURNS + control.TURNS_A_SECOND * seconds + 2
    assert answered >= control.TURNS_A_SECOND * seconds / 3, "each that comes is answered, if later"
    assert capfd.readouterr().err.count("a flood of control clients") == 1


def test_a_control_socket_that_can_not_be_registered_again_is_tried_again(served: Control) -> None:
    served.server._pause(1.0)
    served.selector.refuses, served.now = True, 1.0
    served.turn()
    assert served.server.wake_at() == 1.0 + REGISTER_AGAIN
    served.selector.refuses, served.now = False, 1.0 + REGISTER_AGAIN
    served.turn()
    with _connected(served):
        served.turn()
        assert len(served.server.clients) == 1


def test_a_request_in_many_pieces_is_none(served: Control) -> None:
    with _connected(served) as client:
        client.setblocking(False)
        served.turn()
        for piece in range(control.PIECES):
            client.send(b"x")
            served.turn()
            assert bool(served.server.clients) == (piece < control.PIECES - 1)
        assert b"pieces" in client.recv(200)
