"""In which order a fork server carries out what it was asked."""

import socket
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import pytest

from prefork import log
from prefork.forkserver import STOPS_AT_ONCE, STOPS_PAUSE, ForkServer
from prefork.pool import wire
from prefork.pool.wire import Command, Kind, Order, Report
from prefork.system import forks, process


@pytest.mark.parametrize("dropped", [True, False])
def test_a_fork_spares_nothing_while_lines_are_to_be_told_of(monkeypatch: pytest.MonkeyPatch, dropped: bool) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(log, "has_dropped", lambda: dropped)
    monkeypatch.setattr(forks, "spare", lambda *, everything: asked.append(everything))
    ForkServer(SimpleNamespace())._fork([])  # type: ignore[arg-type]
    assert asked == [not dropped]


def test_what_is_asked_of_a_worker_comes_after_its_fork_though_forks_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    done: list[object] = []

    def fork(_: ForkServer, slots: Sequence[int]) -> None:
        done.append(list(slots))

    def carry_out(_: ForkServer, command: Command) -> None:
        done.append(command)

    monkeypatch.setattr(ForkServer, "_fork", fork)
    monkeypatch.setattr(ForkServer, "_carry_out", carry_out)
    with ours, theirs:
        ours.setblocking(False)
        server = ForkServer(SimpleNamespace(channel=ours))  # type: ignore[arg-type]
        for command in (Command(Order.FORK, 0), Command(Order.FORK, 1), Command(Order.KILL, 1), Command(Order.FORK, 2)):
            theirs.send(wire.pack_command(command))
        assert server._obey()
        assert done == [[0, 1], Command(Order.KILL, 1), [2]]
        theirs.close()
        assert not server._obey(), "nobody is at the other end any more"


class Children:
    """A fork server with workers whose ends and stops are in our hands, and the master's end of its channel."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ours: socket.socket, master: socket.socket) -> None:
        ours.setblocking(False)
        master.setblocking(False)
        self.master = master
        self.server = ForkServer(SimpleNamespace(channel=ours))  # type: ignore[arg-type]
        self.server.children = {100 + slot: slot for slot in range(300)}
        self.server.by_slot = {slot: pid for pid, slot in self.server.children.items()}
        self._changes: list[process.Changed | process.Ended] = []
        monkeypatch.setattr(process, "reap", lambda *, stops: self._changes if stops else [])

    def turn(self, now: float, *changes: process.Changed | process.Ended) -> float | None:
        """One turn of the fork server's loop."""
        self._changes = list(changes)
        self.server._reap()
        self.server._flush()
        return self.server._tell_stops(now)

    def told(self) -> list[tuple[Kind, int]]:
        found: list[tuple[Kind, int]] = []
        while True:
            try:
                report = wire.read_report(self.master.recv(wire.MESSAGE_LIMIT))
            except BlockingIOError:
                return found
            assert isinstance(report, Report)
            found.append((report.kind, report.pid))


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Iterator[Children]:
    ours, master = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)  # for 170 messages
    with ours, master:
        yield Children(monkeypatch, ours, master)


def test_a_worker_that_is_stopped_and_continued_without_end_holds_no_end_back(children: Children) -> None:
    stop, go_on = (process.Changed(100, stopped=stopped) for stopped in (True, False))
    assert children.turn(0.0, stop) is None
    for millisecond in range(1, 10_000):
        children.turn(millisecond / 1000, stop, go_on, *([stop] if millisecond % 2 else []))
    children.turn(10.0, process.Ended(101, 0, 0.0, 0.0, 0), go_on)
    told = children.told()
    assert (Kind.EXITED, 101) in told, "nothing that goes on is in its way"
    assert len(told) <= 2 + 10 / STOPS_PAUSE
    assert told[0] == (Kind.STOPPED, 100)
    children.turn(11.0)
    assert (told + children.told())[-1] == (Kind.CONTINUED, 100), "what it is now is told"
    assert children.turn(12.0) is None


def test_who_is_stopped_is_told_after_ends_that_wait_and_not_when_it_has_ended(children: Children) -> None:
    stops = [process.Changed(pid, stopped=True) for pid in children.server.children]
    timeout = children.turn(0.0, *stops)
    assert timeout == STOPS_PAUSE
    assert len(children.told()) == STOPS_AT_ONCE
    ends = [process.Ended(pid, 0, 0.0, 0.0, 0) for pid in range(100, 398)]
    assert children.turn(1.0, *ends) is None
    assert children.server.outbox, "the channel is full"
    told = children.told()
    children.turn(1.0)
    told += children.told()
    assert told == [*((Kind.EXITED, end.pid) for end in ends), (Kind.STOPPED, 398), (Kind.STOPPED, 399)]
