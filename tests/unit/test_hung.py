"""Connections that take too long: when they are looked for, whose fault time is, and who is killed. A clock that we turn."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prefork.hung import ENOUGH, LOOK, SCAN, Hung
from prefork.pool import scoreboard
from prefork.pool.scoreboard import BUSY, IDLE, LEAVING
from prefork.pool.state import Worker
from prefork.pool.wire import Command, Order
from tests.unit.test_generation import Peer

TIMEOUT = 30.0


class Watched:
    """A generation of two workers, watched since second 100; the real clock is ``lost`` seconds ahead of the master's."""

    def __init__(self) -> None:
        self.peer = Peer(2)
        self.peer.boot(2)
        self.link, self.pool = self.peer.generation.link, self.peer.generation.pool
        self.retired: list[Worker] = []
        self.idle: list[int] = []
        self.computes = False
        self.in_accept: bool | None = None
        self.lost = 0.0
        self.hung = self.watch(TIMEOUT)
        self.hung.looked(100.0)

    def watch(self, timeout: float) -> Hung:
        killing = self.peer.generation.killing

        def look(idle: Sequence[Worker], _now: float) -> bool:
            self.idle = [worker.slot for worker in idle]
            return self.computes

        def retire(worker: Worker, _now: float) -> None:
            self.retired.append(worker)

        return Hung(self.link, self.pool, killing, retire, look, lambda _: self.in_accept, timeout, self.lost)

    def begins(self, slot: int, now: float) -> None:
        board = self.link.board
        record = board.record(slot)
        board.words[record + scoreboard.SINCE] = int((now + self.lost) * 1e9)
        board.words[record + scoreboard.BEGUN] += 1
        board.states[slot] = BUSY

    def tend(self, now: float) -> list[Command | None]:
        """Tend, and tell what was asked of the fork server."""
        self.hung.tend(now, int((now + self.lost) * 1e9))
        return self.peer.asked()

    def run(self, until: float) -> list[tuple[float, Command | None]]:
        """Tend whenever it wants to be woken, as long as that is not later; tell what was asked when."""
        found = []
        while (at := self.hung.wake_at()) is not None and at <= until:
            found += [(round(at, 3), command) for command in self.tend(at)]
        return found

    def write(self, text: bytes) -> None:
        os.write(self.link.stacks.write_end, text)


@pytest.fixture
def watched() -> Iterator[Watched]:
    made = Watched()
    yield made
    made.peer.close()


def test_with_nobody_busy_there_is_one_scan_after_the_last_look_and_then_none(watched: Watched) -> None:
    assert watched.hung.wake_at() == 100 + SCAN
    watched.hung.looked(100.9)
    assert watched.hung.wake_at() == 100 + SCAN, "many looks do not put the scan off"
    watched.tend(101.0)
    assert watched.hung.wake_at() == 100.9 + SCAN, "who began after the scan and within a second of the look did not ring"
    watched.tend(101.9)
    assert watched.hung.wake_at() is None


def test_without_a_timeout_nothing_is_scanned(watched: Watched) -> None:
    watched.hung = watched.watch(0.0)
    watched.hung.looked(100.0)
    assert watched.hung.wake_at() is None


def test_a_connection_that_is_too_old_is_asked_for_its_stack_and_ended(watched: Watched) -> None:
    watched.begins(1, 100.5)
    watched.tend(101.0)
    assert watched.hung.wake_at() == 100.5 + TIMEOUT
    assert watched.tend(100.5 + TIMEOUT) == [Command(Order.DUMP, 1)]
    watched.write(b"Current thread (most recent call first):\n")
    now = 100.5 + TIMEOUT + LOOK
    assert watched.tend(now) == []
    watched.write(b'  File "mine.py", line 7 in loop\n')
    assert watched.tend(now + LOOK) == []
    assert watched.tend(now + 2 * LOOK) == [Command(Order.KILL, 1)]
    worker = watched.pool.workers[1]
    assert (worker.hung, worker.killed) == (1, True)
    assert worker.stack == 'Current thread (most recent call first):\n  File "mine.py", line 7 in loop'
    assert watched.run(1000.0) == [], "once is enough"


def test_a_stack_that_does_not_come_is_not_waited_for(watched: Watched) -> None:
    watched.begins(0, 100.5)
    due = 100.5 + TIMEOUT
    assert watched.run(1000.0) == [(due, Command(Order.DUMP, 0)), (due + ENOUGH, Command(Order.KILL, 0))]
    assert watched.pool.workers[0].stack == ""


def test_many_that_hang_are_ended_one_after_the_other_the_oldest_first(watched: Watched) -> None:
    watched.begins(1, 100.5)
    watched.begins(0, 100.6)
    asked = [command for _, command in watched.run(1000.0)]
    assert asked == [Command(Order.DUMP, 1), Command(Order.KILL, 1), Command(Order.DUMP, 0), Command(Order.KILL, 0)]


@pytest.mark.parametrize("then", ["idle", "another", "reaped", "killed"])
def test_one_that_ends_while_its_stack_is_waited_for_is_left_alone(watched: Watched, then: str) -> None:
    watched.begins(0, 100.5)
    watched.tend(101.0)
    assert watched.tend(100.5 + TIMEOUT) == [Command(Order.DUMP, 0)]
    match then:
        case "idle":
            watched.link.board.states[0] = IDLE
        case "another":
            watched.begins(0, 100.6 + TIMEOUT)
        case "reaped":
            watched.pool.exited(0, watched.pool.workers[0].pid)
        case "killed":
            watched.pool.workers[0].killed = True
    worker = watched.pool.workers.get(0)
    assert watched.run(101.0 + TIMEOUT + ENOUGH) == []
    assert watched.retired == ([worker] if then in ("idle", "another") else []), "it was asked to leave, and is from now on"


def test_a_slot_is_not_judged_by_the_age_of_an_earlier_connection(watched: Watched) -> None:
    watched.begins(0, 100.5)
    watched.tend(101.0)
    watched.begins(0, 110.0)
    watched.hung.looked(110.0)  # it has rung
    assert watched.run(139.9) == []
    assert watched.run(141.0)[0] == (140.0, Command(Order.DUMP, 0))


def test_time_in_which_the_master_was_stopped_makes_no_known_connection_older(watched: Watched) -> None:
    watched.begins(0, 100.5)
    watched.tend(101.0)
    watched.lost = 3600.0
    assert watched.run(130.4) == []
    assert watched.run(131.0)[0] == (130.5, Command(Order.DUMP, 0))


def test_nor_one_that_was_not_known_yet(watched: Watched) -> None:
    watched.begins(0, 100.5)
    watched.lost = 3600.0
    assert watched.run(130.4) == []
    assert watched.run(131.0)[0] == (130.5, Command(Order.DUMP, 0))


def test_after_its_generation_was_retired_a_connection_is_still_found() -> None:
    peer = Peer(1, timeout=TIMEOUT)
    peer.boot(1)
    generation = peer.generation
    generation.tend(2.0, 0)
    generation.board.states[0] = BUSY
    generation.retire(0, 100.0, None)
    generation.tend(100.5, 0)
    assert generation.wake_at() == 100 + SCAN
    peer.close()


@pytest.mark.parametrize("since", [0, 1, (1 << 64) - 1])
def test_what_a_handler_writes_into_another_slot_makes_no_connection_older(watched: Watched, since: int) -> None:
    watched.tend(101.0)
    watched.hung.looked(200.0)
    watched.begins(0, 200.5)
    record = watched.link.board.record(0)
    watched.link.board.words[record + scoreboard.SINCE] = since
    assert watched.run(1000.0)[0] == (201.0 + TIMEOUT, Command(Order.DUMP, 0)), "nor younger than by a second"


@pytest.mark.parametrize(("lies", "due"), [(False, 120.0 + TIMEOUT), (True, 121.0 + TIMEOUT)])
def test_nor_where_no_look_was_due_and_its_worker_has_rung(watched: Watched, lies: bool, due: float) -> None:
    watched.begins(1, 100.5)
    watched.tend(101.0)
    watched.begins(0, 119.9)
    watched.hung.looked(120.0)
    if lies:
        watched.link.board.words[watched.link.board.record(0) + scoreboard.SINCE] = 1
    assert [command for _, command in watched.run(149.9)] == [Command(Order.DUMP, 1), Command(Order.KILL, 1)]
    assert watched.run(1000.0)[0] == (due, Command(Order.DUMP, 0))


def test_one_that_is_said_to_serve_and_waits_in_accept_is_signalled_and_not_killed(watched: Watched) -> None:
    watched.link.board.states[0] = BUSY
    watched.in_accept = True
    asked = watched.run(101.0 + TIMEOUT + ENOUGH)
    assert [command for _, command in asked] == [Command(Order.DUMP, 0), Command(Order.RETIRE, 0)]
    assert watched.retired == [watched.pool.workers[0]]
    watched.pool.workers[0].retiring = True
    asked = watched.run(asked[1][0] + TIMEOUT - 1)
    assert asked == [], "it has time to go"


def test_what_was_known_before_an_upgrade_is_known_after_it_and_the_rest_is_younger(watched: Watched) -> None:
    watched.begins(0, 100.5)
    watched.tend(101.0)
    watched.hung.looked(105.0)
    carried = watched.hung.carry()
    watched.begins(1, 105.1)
    for slot in range(2):
        watched.link.board.words[watched.link.board.record(slot) + scoreboard.SINCE] = 1
    watched.hung = watched.watch(TIMEOUT)
    watched.hung.adopt(*carried)
    watched.hung.looked(105.2)
    asked = [(at, command) for at, command in watched.run(140.0) if command in (Command(Order.DUMP, 0), Command(Order.DUMP, 1))]
    assert asked == [(100.5 + TIMEOUT, Command(Order.DUMP, 0)), (106.2 + TIMEOUT, Command(Order.DUMP, 1))]


def test_what_was_lost_before_a_scan_is_nobodys_gain_after_it(watched: Watched) -> None:
    watched.lost = 3600.0
    watched.tend(101.0)
    watched.hung.looked(200.0)
    watched.begins(0, 200.5)
    assert watched.run(1000.0)[0] == (200.5 + TIMEOUT, Command(Order.DUMP, 0))


def test_what_was_lost_to_an_upgrade_counts_against_no_connection_that_it_found(watched: Watched) -> None:
    watched.begins(0, 100.5)
    watched.lost = 3600.0
    watched.hung = watched.watch(TIMEOUT)
    watched.hung.adopt({}, 0.0)  # of a program that does not tell what it knew
    watched.hung.forgive(watched.lost)
    watched.hung.looked(100.6)
    assert watched.run(1000.0)[0][0] == pytest.approx(100.5 + TIMEOUT)


# -- whoever is cut has had its time, wherever the worker is while the master looks


class Serving:
    """Slot 0's worker: the loop of `prefork.worker`, a step for each store and each read that the master could see or be late for.

    Its first client leaves after ``patience`` steps; others come at once and stay.
    """

    def __init__(self, watched: Watched, patience: int) -> None:
        self.board = watched.link.board
        self.states, self.words = self.board.states, self.board.words
        self.patience = patience
        self.accepted_at: float | None = None  # of the connection that it has
        self.now = 100.5
        self._loop = self._serve()

    def steps(self, count: int) -> None:
        for _ in range(count):
            next(self._loop, None)

    def _serve(self) -> Iterator[None]:
        record = self.board.record(0)
        while True:
            self.states[0] = IDLE
            yield
            if self.board.retire[0]:
                break
            yield
            self.accepted_at = self.now
            yield
            self.words[record + scoreboard.SINCE] = int(self.now * 1e9)
            yield
            self.words[record + scoreboard.BEGUN] += 1
            yield
            self.states[0] = BUSY
            yield
            while self.patience:
                self.patience -= 1
                yield
            self.patience = 1_000_000
            self.accepted_at = None
            yield
            self.words[record + scoreboard.OK] += 1
            yield
        self.states[0] = LEAVING


class Interrupted:
    """A row of the board: before each reading the worker goes some steps, the next number of ``plan``."""

    def __init__(self, row: Any, worker: Serving, plan: list[int]) -> None:
        self.row, self.worker, self.plan = row, worker, plan

    def __getitem__(self, index: int) -> Any:
        if self.plan:
            self.worker.steps(self.plan.pop(0))
        return self.row[index]

    def __setitem__(self, index: int, value: Any) -> None:
        self.row[index] = value


@settings(deadline=None, derandomize=True)
@given(patience=st.integers(0, 60), plan=st.lists(st.integers(0, 12), max_size=16), late=st.integers(0, 40))
@example(patience=20, plan=[], late=40)  # the connection ends after the master has looked for the last time, before the SIGKILL
@example(patience=8, plan=[0, 0, 0, 0, 12, 12], late=40)  # it ends while the stack is waited for
def test_whoever_is_cut_has_had_its_time(patience: int, plan: Sequence[int], late: int) -> None:
    watched = Watched()
    worker = Serving(watched, patience)
    try:
        worker.steps(6)
        interrupted = Interrupted(worker.states, worker, list(plan))
        watched.link.board.states = interrupted  # type: ignore[assignment]
        watched.link.board.words = Interrupted(worker.words, worker, interrupted.plan)  # type: ignore[assignment]
        while (at := watched.hung.wake_at()) is not None and at <= 1000.0:
            worker.now = at
            if Command(Order.KILL, 0) in watched.tend(at):
                worker.steps(late)  # the order is on its way
                assert worker.accepted_at is None or at - worker.accepted_at >= TIMEOUT
                break
    finally:
        watched.link.board.states, watched.link.board.words = worker.states, worker.words
        watched.peer.close()
