"""Workers that SIGKILL does not end at once: when it is tried again, and what is told. A clock that we turn."""

from collections.abc import Iterator

import pytest

from prefork.killing import FIRST, LONGEST, NAMED
from prefork.pool.wire import Command, Kind, Order, Report
from tests.unit.test_generation import PID, Peer


@pytest.fixture
def peer() -> Iterator[Peer]:
    made = Peer(NAMED + 1)
    made.boot(NAMED + 1)
    yield made
    made.close()


def run(peer: Peer, until: float) -> list[tuple[float, Command | None]]:
    """Tend whenever it wants to be woken; tell what was asked of the fork server when."""
    killing, found = peer.generation.killing, []
    while (at := killing.wake_at()) is not None and at <= until:
        killing.tend(at)
        found += [(at, command) for command in peer.asked()]
    return found


def test_a_kill_is_tried_again_ever_more_seldom_until_its_worker_was_reaped(peer: Peer, capfd: pytest.CaptureFixture[str]) -> None:
    generation = peer.generation
    generation.killing.kill(generation.pool.workers[1], 100.0)
    kill = Command(Order.KILL, 1)
    assert peer.asked() == [kill]
    assert run(peer, 110.0) == [(100.0 + FIRST, kill), (103.0, kill), (107.0, kill)]
    told = capfd.readouterr().err
    assert f"1 worker of generation 1 was killed and has not ended: worker 1 (pid {PID + 1}) since 1 s, its state is hidden" in told
    assert [(late.pid, late.slot, late.seconds, late.what) for late in generation.overdue(110.0)] == [(PID + 1, 1, 10.0, "killed")]
    times = [at for at, _ in run(peer, 100_000.0)]
    assert times[-1] - times[-2] == LONGEST
    peer.say(Report(Kind.EXITED, 1, PID + 1, status=9), 100_000.0)
    assert generation.killing.wake_at() is None
    assert generation.overdue(100_000.0) == []


def test_one_that_goes_at_once_is_not_told(peer: Peer, capfd: pytest.CaptureFixture[str]) -> None:
    generation = peer.generation
    generation.killing.kill(generation.pool.workers[0], 100.0)
    assert generation.overdue(100.5) == []
    peer.say(Report(Kind.EXITED, 0, PID, status=9), 100.5)
    assert run(peer, 1000.0) == []
    assert "have not ended" not in capfd.readouterr().err


def test_many_are_told_in_one_line_that_names_a_few(peer: Peer, capfd: pytest.CaptureFixture[str]) -> None:
    peer.generation.retiring.kill_all(100.0, "the test wants it")
    peer.asked()
    capfd.readouterr()
    assert len(run(peer, 101.0)) == NAMED + 1
    [line] = capfd.readouterr().err.splitlines()
    assert f"{NAMED + 1} workers of generation 1" in line
    assert line.count("(pid ") == NAMED
    assert line.endswith("; ...")


def test_those_who_were_killed_by_one_order_for_all_are_watched_too(peer: Peer) -> None:
    peer.generation.ready = True
    peer.generation.quit(100.0)
    assert peer.asked() == [Command(Order.QUIT)]
    assert len(run(peer, 101.0)) == NAMED + 1
