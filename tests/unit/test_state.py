"""The pool's slots against a plain model. Reports are true or lies at random: a lie must change nothing at all."""

import copy

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from prefork.pool.state import Pool

LISTENERS, CAPACITY = 2, 3
# Few enough that lies hit slots in use, free ones, and ones that do not exist.
slots = st.integers(-1, LISTENERS * CAPACITY)
pids = st.integers(0, 4)


class PoolMachine(RuleBasedStateMachine):
    """The model: the pid in each slot in use, None before the fork is confirmed; insertion order is the order of the forks."""

    pool: Pool
    model: dict[int, int | None]
    highest: list[int]

    @initialize()
    def start(self) -> None:
        self.pool = Pool(LISTENERS, CAPACITY)
        self.model = {}
        self.highest = [0] * LISTENERS

    @rule(listener=st.integers(0, LISTENERS - 1), now=st.floats(0, 1e6))
    def a_fork_is_ordered(self, listener: int, now: float) -> None:
        free = [slot for slot in range(listener * CAPACITY, (listener + 1) * CAPACITY) if slot not in self.model]
        before = copy.deepcopy(self.pool)
        worker = self.pool.take(listener, now)
        if not free:
            assert worker is None
            assert self.pool == before
            return
        assert worker is not None
        assert (worker.slot, worker.listener, worker.since, worker.pid) == (min(free), listener, now, 0)
        assert (worker.retiring, worker.stopped, worker.killed) == (False,) * 3
        self.model[worker.slot] = None
        self.highest[listener] = max(self.highest[listener], min(free) - listener * CAPACITY + 1)

    @rule(slot=slots, pid=pids)
    def forked_is_reported(self, slot: int, pid: int) -> None:
        possible = self.model.get(slot, "nobody") is None and pid > 1 and pid not in self.model.values()
        before = copy.deepcopy(self.pool)
        worker = self.pool.forked(slot, pid)
        if possible:
            assert worker is not None
            assert (worker.slot, worker.pid) == (slot, pid)
            self.model[slot] = pid
        else:
            assert worker is None
            assert self.pool == before

    @rule(slot=slots)
    def a_failed_fork_is_reported(self, slot: int) -> None:
        possible = self.model.get(slot, "nobody") is None
        before = copy.deepcopy(self.pool)
        worker = self.pool.fork_failed(slot)
        if possible:
            assert worker is not None
            assert worker.slot == slot
            del self.model[slot]
        else:
            assert worker is None
            assert self.pool == before

    @rule(slot=slots, pid=pids)
    def exited_is_reported(self, slot: int, pid: int) -> None:
        possible = slot in self.model and self.model[slot] == pid
        before = copy.deepcopy(self.pool)
        worker = self.pool.exited(slot, pid)
        if possible:
            assert worker is not None
            assert (worker.slot, worker.pid) == (slot, pid)
            del self.model[slot]
        else:
            assert worker is None
            assert self.pool == before

    @invariant()
    def the_pool_is_the_model(self) -> None:
        if not hasattr(self, "pool"):
            return
        assert {slot: worker.pid or None for slot, worker in self.pool.workers.items()} == self.model
        assert list(self.pool.unborn) == [slot for slot in self.pool.workers if self.model[slot] is None]
        assert self.pool.live == [sum(slot // CAPACITY == listener for slot in self.model) for listener in range(LISTENERS)]
        assert self.pool.high == self.highest
        for pid in range(-1, 8):
            worker = self.pool.by_pid(pid)
            holders = [slot for slot, held in self.model.items() if held == pid]
            assert ([worker.slot] if worker else []) == holders


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=200, stateful_step_count=40)


def test_the_oldest_unconfirmed_fork_comes_first() -> None:
    pool = Pool(1, 4)
    for now in (1.0, 2.0, 3.0):
        pool.take(0, now)
    pool.forked(0, 100)
    assert [worker.since for worker in pool.unborn.values()] == [2.0, 3.0]


def test_a_new_worker_inherits_nothing_from_the_one_before_it() -> None:
    pool = Pool(1, 1)
    first = pool.take(0, 1.0)
    assert first is not None
    pool.forked(0, 100)
    first.retiring = first.killed = True
    pool.exited(0, 100)
    second = pool.take(0, 2.0)
    assert second is not None
    assert (second.slot, second.pid, second.retiring, second.killed) == (0, 0, False, False)
    assert not pool.unready
