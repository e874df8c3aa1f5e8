"""Killing a worker for one connection and no other: with a real process, and a scoreboard that says what it serves."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from prefork.ending import Ending
from prefork.pool import scoreboard
from prefork.pool.scoreboard import BEGUN, BUSY, IDLE, OK, Access, Layout, Scoreboard
from prefork.system import process
from tests import watch


class Child:
    """A process of ours in slot 0, that serves its 7th connection."""

    def __init__(self, stack: ExitStack) -> None:
        layout = Layout(1, 4)
        board, orders = (scoreboard.create("test", size) for size in (layout.board_bytes, layout.orders_bytes))
        self.board = Scoreboard(board, orders, layout, Access.MASTER)
        stack.callback(self.board.close)
        for fd in (board, orders):
            os.close(fd)
        self.process = stack.enter_context(subprocess.Popen(["sleep", "600"]))
        stack.callback(self.process.kill)
        self.pid = self.process.pid
        self.ending = Ending(self.board)
        self.says(7, 6, BUSY)

    def says(self, begun: int, ended: int, state: int) -> None:
        record = self.board.record(0)
        self.board.words[record + BEGUN], self.board.words[record + OK] = begun, ended
        self.board.states[0] = state

    def stands_still(self) -> None:
        assert os.waitid(os.P_PID, self.pid, os.WSTOPPED) is not None


@pytest.fixture
def child() -> Iterator[Child]:
    with ExitStack() as stack:
        yield Child(stack)


def test_it_is_killed_only_after_it_was_seen_to_stand_still(child: Child) -> None:
    child.ending.ask(child.pid, 0, 7)
    child.stands_still()
    child.ending.stopped(child.pid)
    assert child.process.wait() == -signal.SIGKILL


@pytest.mark.parametrize(
    ("begun", "ended", "state"),
    [
        pytest.param(8, 7, BUSY, id="the next connection"),
        pytest.param(7, 7, BUSY, id="ended, and not idle yet"),
        pytest.param(7, 7, IDLE, id="idle"),
        pytest.param(8, 7, IDLE, id="the next one has begun and is not marked yet"),
    ],
)
def test_it_goes_on_when_it_serves_another_one_or_none(child: Child, begun: int, ended: int, state: int) -> None:
    child.ending.ask(child.pid, 0, 7)
    child.stands_still()
    child.says(begun, ended, state)
    child.ending.stopped(child.pid)
    assert os.waitid(os.P_PID, child.pid, os.WCONTINUED) is not None
    assert process.state(child.pid) != b"T"
    child.ending.stopped(child.pid)
    assert child.process.poll() is None, "it was asked once"


def test_one_that_somebody_has_stopped_is_judged_as_it_stands(child: Child) -> None:
    os.kill(child.pid, signal.SIGSTOP)
    child.stands_still()
    child.ending.ask(child.pid, 0, 6)
    assert process.state(child.pid) == b"T", "it is left to whoever has stopped it"
    child.ending.ask(child.pid, 0, 7)
    assert child.process.wait() == -signal.SIGKILL


def test_a_pid_that_was_reaped_is_nobodys(child: Child) -> None:
    child.ending.ask(child.pid, 0, 7)
    child.stands_still()
    child.ending.forget(child.pid)
    child.ending.stopped(child.pid)
    assert process.state(child.pid) == b"T"
    child.ending.ask(os.getppid(), 0, 7)  # no child of ours
    watch.until("the parent runs on", lambda: process.state(os.getppid()) != b"T")
