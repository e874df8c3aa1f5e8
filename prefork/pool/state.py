"""The state of a generation's slots, as the master knows it: pure, no clock, no operating system.

What arrives from fork servers and workers is somebody's word (they run user code). Each event is checked against what this
state allows; one that can't be true changes nothing and is answered with None or False, for the caller to count.
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(slots=True)
class Worker:
    """A slot in use: from the order to fork until the process was reaped."""

    slot: int
    listener: int
    since: float
    pid: int = 0  # 0 until the fork server has said FORKED
    retiring: bool = False  # was asked to leave
    stopped: bool = False  # SIGSTOPped by somebody
    deadline: float | None = None  # when its connection is cut; only for retiring ones
    killed: bool = False  # SIGKILL was ordered
    hung: int | None = None  # because its slot's so-many-th connection has taken too long
    stack: str = ""  # where it was then


@dataclass(slots=True)
class Pool:
    """The slots of one generation. ``capacity`` slots for each listener; the lowest free one is taken, so rows stay short."""

    listeners: int
    capacity: int
    workers: dict[int, Worker] = field(default_factory=dict)
    unready: dict[int, Worker] = field(default_factory=dict)  # forked, and never parked or idle yet, oldest first
    unborn: dict[int, Worker] = field(default_factory=dict)  # forks that were ordered and not confirmed, oldest first
    high: list[int] = field(init=False)  # for each listener: one more than the highest slot that was ever used
    live: list[int] = field(init=False)  # for each listener: slots in use, retiring ones included
    _free: list[list[int]] = field(init=False)
    _by_pid: dict[int, Worker] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.high = [0] * self.listeners
        self.live = [0] * self.listeners
        self._free = [[] for _ in range(self.listeners)]

    @classmethod
    def restored(
        cls,
        listeners: int,
        capacity: int,
        workers: Iterable[Worker],
        unready: Iterable[int],
        unborn: Iterable[int],
        high: Iterable[int],
    ) -> "Pool":
        """The pool that had these workers, unready and unborn slots, and highest slots."""
        pool = cls(listeners, capacity)
        pool.high = list(high)
        pool.workers = {worker.slot: worker for worker in workers}
        pool.unready = {slot: pool.workers[slot] for slot in unready}
        pool.unborn = {slot: pool.workers[slot] for slot in unborn}
        for worker in pool.workers.values():
            pool.live[worker.listener] += 1
            if worker.pid:
                pool._by_pid[worker.pid] = worker
        for listener, top in enumerate(pool.high):
            # In order, and so a heap.
            pool._free[listener] = [place for place in range(top) if listener * capacity + place not in pool.workers]
        return pool

    def take(self, listener: int, now: float) -> Worker | None:
        """Take a slot for a fork that is about to be ordered; None when all are in use."""
        free = self._free[listener]
        if free:
            place = heapq.heappop(free)
        elif self.high[listener] < self.capacity:
            place = self.high[listener]
            self.high[listener] += 1
        else:
            return None
        worker = Worker(listener * self.capacity + place, listener, now)
        self.workers[worker.slot] = self.unborn[worker.slot] = worker
        self.live[listener] += 1
        return worker

    def forked(self, slot: int, pid: int) -> Worker | None:
        """The fork happened. None when it can't be true: slot not waiting for a fork, or pid already somebody's."""
        worker = self.workers.get(slot)
        if worker is None or worker.pid or pid <= 1 or pid in self._by_pid:
            return None
        worker.pid = pid
        self._by_pid[pid] = self.unready[slot] = self.unborn.pop(slot)
        return worker

    def fork_failed(self, slot: int) -> Worker | None:
        """The fork did not happen; the slot is free again. None when nobody was waiting for it."""
        worker = self.workers.get(slot)
        if worker is None or worker.pid:
            return None
        return self._release(worker)

    def exited(self, slot: int, pid: int) -> Worker | None:
        """The worker was reaped; the slot is free again. None when that slot does not hold that pid."""
        worker = self.workers.get(slot)
        if worker is None or not worker.pid or worker.pid != pid:
            return None
        return self._release(worker)

    def by_pid(self, pid: int) -> Worker | None:
        """The worker with this pid."""
        return self._by_pid.get(pid)

    def _release(self, worker: Worker) -> Worker:
        del self.workers[worker.slot]
        self.unborn.pop(worker.slot, None)
        self.unready.pop(worker.slot, None)
        self._by_pid.pop(worker.pid, None)
        self.live[worker.listener] -= 1
        heapq.heappush(self._free[worker.listener], worker.slot % self.capacity)
        return worker
