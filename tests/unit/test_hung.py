"""Connections that take too long: when they are looked for, whose fault time is, and whom END is for. A clock that we turn."""

import os
from collections.abc import Iterator

import pytest

from prefork.hung import ENOUGH, LOOK, SCAN, Hung
from prefork.pool import scoreboard
from prefork.pool.scoreboard import BUSY, IDLE
from prefork.pool.wire import Command, Order
from tests.unit.test_generation import Peer

TIMEOUT = 30.0


class Watched:
    """A generation of two workers, watched since second 100; the real clock is ``lost`` seconds ahead of the master's."""

    def __init__(self) -> None:
        self.peer = Peer(2)
        self.peer.boot(2)
        self.link, self.pool = self.peer.generation.link, self.peer.generation.pool
        self.hung = Hung(self.link, self.pool, TIMEOUT, 0.0)
        self.lost = 0.0
        self.hung.looked(100.0)

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
    watched.hung = Hung(watched.link, watched.pool, 0.0, 0.0)
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
    assert watched.tend(now + 2 * LOOK) == [Command(Order.END, 1, 1)]
    worker = watched.pool.workers[1]
    assert (worker.hung, worker.killed) == (1, False)
    assert worker.stack == 'Current thread (most recent call first):\n  File "mine.py", line 7 in loop'
    assert watched.run(1000.0) == [], "once is enough"


def test_a_stack_that_does_not_come_is_not_waited_for(watched: Watched) -> None:
    watched.begins(0, 100.5)
    due = 100.5 + TIMEOUT
    assert watched.run(1000.0) == [(due, Command(Order.DUMP, 0)), (due + ENOUGH, Command(Order.END, 0, 1))]
    assert watched.pool.workers[0].stack == ""


def test_many_that_hang_are_ended_one_after_the_other_the_oldest_first(watched: Watched) -> None:
    watched.begins(1, 100.5)
    watched.begins(0, 100.6)
    asked = [command for _, command in watched.run(1000.0)]
    assert asked == [Command(Order.DUMP, 1), Command(Order.END, 1, 1), Command(Order.DUMP, 0), Command(Order.END, 0, 1)]


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
    assert watched.run(101.0 + TIMEOUT + ENOUGH) == []


def test_a_slot_is_not_judged_by_the_age_of_an_earlier_connection(watched: Watched) -> None:
    watched.begins(0, 100.5)
    watched.tend(101.0)
    watched.begins(0, 110.0)
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


def test_what_was_lost_before_a_scan_is_nobodys_gain_after_it(watched: Watched) -> None:
    watched.lost = 3600.0
    watched.tend(101.0)
    watched.hung.looked(200.0)
    watched.begins(0, 200.5)
    assert watched.run(1000.0)[0] == (200.5 + TIMEOUT, Command(Order.DUMP, 0))


def test_what_was_lost_to_an_upgrade_counts_against_no_connection_that_it_found(watched: Watched) -> None:
    watched.begins(0, 100.5)
    watched.lost = 3600.0
    watched.hung = Hung(watched.link, watched.pool, TIMEOUT, watched.lost)
    watched.hung.forgive(watched.lost)
    watched.hung.looked(100.6)
    assert watched.run(1000.0)[0][0] == pytest.approx(100.5 + TIMEOUT)
