"""Idle workers that use CPU: which of them are asked to leave, and when. What the kernel would say of them is ours."""

from collections.abc import Iterator

import pytest

from prefork import computing
from prefork.computing import AT_ONCE, Computing
from prefork.pool.scoreboard import BEGUN
from prefork.pool.state import Worker
from tests.unit.test_generation import Peer

TIMEOUT = 10.0
CLIENT = [("127.0.0.1", 7)]


class Idle:
    """Two idle workers. ``cpu``: seconds that each has used; ``held``: what is found of a worker's connections."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.peer = Peer(2)
        self.peer.boot(2)
        self.workers = list(self.peer.generation.pool.workers.values())
        self.cpu = {worker.pid: 1.0 for worker in self.workers}
        self.held: list[tuple[str, int]] | None = []
        self.tired: list[tuple[int, float, float]] = []
        patch.setattr(computing, "cpu_seconds", self.cpu.get)
        patch.setattr(computing, "connections", lambda _pid, _address: self.held)
        listeners = [self.peer.listener.address]
        self.computing = Computing(self.peer.generation.link, listeners, TIMEOUT, self.tire)

    def tire(self, worker: Worker, since: float, now: float) -> None:
        self.tired.append((worker.slot, since, now))

    def look(self, now: float, used: float = 0.0) -> bool:
        """A look; the first worker has used so much CPU since the last one."""
        self.cpu[self.workers[0].pid] += used
        return self.computing.look(self.workers, now)


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> Iterator[Idle]:
    made = Idle(monkeypatch)
    yield made
    made.peer.close()


def test_workers_that_use_no_cpu_are_looked_at_twice_and_then_no_more(idle: Idle) -> None:
    idle.held = CLIENT
    assert idle.look(100.0), "there is nothing to compare with yet"
    assert not idle.look(101.0)
    assert not idle.look(200.0)
    assert idle.tired == []


def test_one_that_computes_and_holds_no_client_is_left_alone(idle: Idle) -> None:
    idle.look(100.0)
    for now in range(101, 130):
        assert not idle.look(float(now), used=1.0)
    assert idle.tired == []


def test_one_that_computes_and_holds_a_client_leaves_once_that_may_be_too_old(idle: Idle) -> None:
    idle.held = CLIENT
    idle.look(100.0)
    for now in range(101, 111):
        assert idle.look(float(now), used=0.5)
        assert idle.tired == []
    idle.look(111.0, used=0.5)
    assert idle.tired == [(0, 101.0, 111.0)]


@pytest.mark.parametrize("then", ["it serves", "it rests", "another worker"])
def test_one_that_does_anything_else_meanwhile_is_not_suspected_any_more(idle: Idle, then: str) -> None:
    idle.held = CLIENT
    idle.look(100.0)
    idle.look(101.0, used=1.0)
    match then:
        case "it serves":
            board = idle.peer.generation.board
            board.words[board.record(0) + BEGUN] += 1
            idle.look(111.0, used=1.0)
        case "it rests":
            idle.look(111.0, used=0.1)
        case "another worker":
            idle.computing.forget(0)
            idle.look(111.0, used=1.0)
    idle.look(112.0, used=1.0)
    assert idle.tired == []


def test_where_we_may_not_look_one_that_computes_leaves_too_and_may_hold_a_client_since_then(idle: Idle) -> None:
    idle.held = None
    idle.look(100.0)
    assert not idle.look(101.0, used=1.0), "no look of its own"
    idle.look(111.0, used=10.0)
    assert idle.tired == [(0, 111.0, 111.0)]


def test_of_many_a_few_are_looked_at_in_turns(idle: Idle, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    many = [Worker(slot, 0, 0.0, pid=slot + 2) for slot in range(2 * AT_ONCE)]
    monkeypatch.setattr(computing, "cpu_seconds", asked.append)
    for looks in (1, 2):
        idle.computing.look(many, 100.0 + looks)
        assert len(asked) == looks * AT_ONCE
    assert sorted(asked) == [worker.pid for worker in many]
