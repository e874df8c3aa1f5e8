"""Workers that were asked to leave and do not: when they are told, and which of them are killed. A clock that we turn."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from prefork import retiring
from prefork.pool.scoreboard import BEGUN, BUSY, IDLE, LEAVING, STARTING
from prefork.pool.state import Worker
from prefork.pool.wire import Command, Kind, Order, Report
from prefork.retiring import LATE
from prefork.system.signals import RETIRE
from prefork.system.standing import Standing
from tests.unit.test_generation import PID, Peer

TIMEOUT = 10.0
ASKED = 1 << RETIRE - 1
WAITS = Standing("S (sleeping)", 0, 0, 0)
KILL = Command(Order.KILL, 0)


class Asked:
    """A worker that was asked to leave in second 100, and says that it waits. ``how`` it stands, and ``held``, are ours."""

    def __init__(self, patch: pytest.MonkeyPatch, timeout: float = TIMEOUT) -> None:
        self.peer = Peer(1, timeout=timeout)
        self.peer.boot(1)
        self.generation = self.peer.generation
        self.how: Standing | None = WAITS
        self.in_accept: bool | None = False
        self.held: list[tuple[str, int]] | None = []
        patch.setattr(retiring, "standing", lambda _pid: self.how)
        patch.setattr(retiring, "is_in_call_on", lambda _pid, _fd: self.in_accept)
        patch.setattr(retiring, "connections", lambda _pid, _address: self.held)
        self.generation.retire(0, 100.0, None)

    def run(self, until: float) -> list[float]:
        """Tend whenever it wants to be woken. When it was killed."""
        killed = []
        while (at := self.generation.retiring.wake_at()) is not None and at <= until:
            self.generation.retiring.tend(at)
            killed += [at for command in self.peer.asked() if command == KILL]
        return killed


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    made = Asked(monkeypatch)
    yield made
    made.peer.close()


def test_one_that_is_late_is_told_ever_more_seldom_and_not_waited_for(asked: Asked, capfd: pytest.CaptureFixture[str]) -> None:
    asked.in_accept = True
    asked.run(100.0 + LATE / 2)
    waited_for = [asked.generation.accepts]
    assert asked.generation.overdue(101.0) == []
    asked.run(120.0)
    waited_for.append(asked.generation.accepts)
    assert waited_for == [True, False]
    [late] = asked.generation.overdue(120.0)
    assert (late.pid, late.what) == (PID, "asked to leave")
    assert late.seconds == pytest.approx(20.0)
    told = [line for line in capfd.readouterr().err.splitlines() if "has not left" in line]
    assert [line.partition(" since ")[2].partition(" s,")[0] for line in told] == ["1", "3", "7", "15"]
    assert asked.generation.accepts_at(asked.peer.listener), "an inherited socket is not closed under it"


def test_one_that_takes_its_signals_and_is_in_no_accept_is_killed_when_a_client_of_its_has_had_its_time(asked: Asked) -> None:
    [killed] = asked.run(200.0)
    assert TIMEOUT <= killed - 100.0 <= TIMEOUT + 1.1


def test_one_that_was_seen_to_hold_a_client_is_killed_once_it_was_told(asked: Asked) -> None:
    asked.generation.retiring.holds_since[0] = 80.0
    [killed] = asked.run(200.0)
    assert LATE < killed - 100.0 <= LATE + 1.1


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(replace(WAITS, state="T (stopped)"), id="stopped"),
        pytest.param(replace(WAITS, state="t (tracing stop)"), id="traced"),
        pytest.param(replace(WAITS, pending=ASKED), id="not heard yet"),
        pytest.param(replace(WAITS, deaf=ASKED), id="blocked"),
        pytest.param(replace(WAITS, pending=None), id="not known"),
        pytest.param(None, id="hidden"),
    ],
)
def test_one_that_may_be_in_accept_is_never_killed(asked: Asked, how: Standing | None) -> None:
    asked.how = how
    assert asked.run(1000.0) == []


def test_nor_is_one_that_is_in_accept_though_it_takes_signals(asked: Asked) -> None:
    asked.in_accept = True
    assert asked.run(1000.0) == []


def test_nor_is_one_whose_system_call_is_hidden(asked: Asked) -> None:
    asked.in_accept = None
    assert asked.run(1000.0) == []


@pytest.mark.parametrize("state", [BUSY, LEAVING])
@pytest.mark.parametrize("in_accept", [True, None])
def test_nor_at_its_deadline_one_whose_slot_others_have_written_to(asked: Asked, state: int, in_accept: bool | None) -> None:
    asked.in_accept = in_accept
    asked.generation.board.states[0] = state
    worker = asked.generation.pool.workers[0]
    asked.generation.retiring.ask(worker, 100.0, 105.0)
    assert len(asked.run(110.0)) == (0 if in_accept else 1)


def test_one_that_sleeps_in_the_kernel_is(asked: Asked) -> None:
    asked.how = Standing("D (disk sleep)", 0, 0, ASKED)
    assert len(asked.run(200.0)) == 1


def test_one_that_was_continued_a_moment_before_the_look_is_left_to_go(asked: Asked) -> None:
    asked.how = replace(WAITS, state="T (stopped)")
    assert asked.run(150.0) == []
    # It takes the signal that was pending, is in no accept() any more, and has not come to say that it leaves.
    asked.how = WAITS
    assert asked.run(150.0 + LATE) == []
    asked.generation.board.states[0] = LEAVING
    assert asked.run(1000.0) == []


@pytest.mark.parametrize("state", [BUSY, LEAVING, STARTING])
def test_one_that_does_not_say_that_it_waits_is_left_alone(asked: Asked, state: int) -> None:
    asked.generation.board.states[0] = state
    assert asked.run(1000.0) == []


def test_without_a_time_out_none_is_killed_before_its_time_to_finish_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch, timeout=0.0)
    assert asked.run(1000.0) == []
    asked.generation.pool.workers[0].deadline = 1005.0
    assert len(asked.run(1010.0)) == 1
    asked.peer.close()


@pytest.mark.parametrize("begins", [False, True])
def test_the_client_that_it_was_seen_to_hold_is_counted_once(asked: Asked, begins: bool) -> None:
    board = asked.generation.board
    asked.held = [("10.0.0.1", 7)]
    asked.run(200.0)
    if begins:  # before the SIGKILL came
        board.words[board.record(0) + BEGUN] += 1
    asked.peer.say(Report(Kind.EXITED, 0, PID, status=9), 200.0)
    counts = board.counts(0)
    assert (counts.begun, counts.killed, counts.serving) == (1, 1, 0)
    death = asked.generation.tally.deaths[-1]
    assert death.cause == f"timeout after {TIMEOUT:g} s (SIGKILL)"
    if not begins:
        assert death.peer == "10.0.0.1:7"


def test_a_connection_that_user_code_has_kept_is_not_counted_again(asked: Asked) -> None:
    board = asked.generation.board
    asked.held = [("10.0.0.1", 7)]
    board.put_peer(0, "10.0.0.1", 7)
    asked.run(200.0)
    assert asked.generation.retiring.unserved == {}


@pytest.mark.parametrize("held", [[], None, [("10.0.0.1", 7), ("10.0.0.2", 7)]])
def test_no_client_is_counted_for_one_that_held_none_or_several_or_may_not_be_looked_into(
    asked: Asked, held: list[tuple[str, int]] | None
) -> None:
    asked.held = held
    asked.run(200.0)
    asked.peer.say(Report(Kind.EXITED, 0, PID, status=9), 200.0)
    counts = asked.generation.board.counts(0)
    assert (counts.begun, counts.killed) == (0, 0)
    assert asked.generation.board.states[0] != IDLE


def test_a_signal_that_was_sent_a_moment_ago_does_not_count_as_one_that_is_not_heard(asked: Asked) -> None:
    """The master's own child has it at once, and takes it when it is given a CPU: in time for the next look."""
    retiring_of, send = asked.generation.retiring, asked.generation.link.signal

    def signal(worker: Worker, order: Order) -> None:
        asked.how = replace(WAITS, pending=ASKED)
        send(worker, order)

    asked.generation.link.signal = signal  # type: ignore[method-assign]
    killed = []
    while (at := retiring_of.wake_at()) is not None and at <= 200.0:
        asked.how = WAITS
        retiring_of.tend(at)
        killed += [at for command in asked.peer.asked() if command == KILL]
    assert len(killed) == 1
