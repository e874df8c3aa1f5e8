"""Workers that say IDLE and use CPU, where there is a ``timeout``: a client of theirs may be nobody's.

A thread that a handler has left behind, in C code that keeps Python's lock, keeps its worker's loop from going on. When the kernel
gives that worker a client, accept() returns, and nothing follows: the slot still says IDLE, and no time-out begins. That a worker
uses CPU is no evidence of it: an acceptor beside a busy thread is healthy. So its descriptor table is looked at
(`prefork.net.held`). One that holds a connection to its listener, though it says that it serves none, for ``timeout`` seconds, uses
CPU all the while and begins no connection, is *tired*: another is forked in its place, and it is asked to leave, which costs a
healthy one nothing. Where we may not look into it, CPU for so long is enough for that.

Looks are those for hung connections (`prefork.hung`), and where CPU is to be compared one more a second later: a pool in
which no worker computes has no look more than before. Not found is a worker whose thread keeps the lock and sleeps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prefork.link import Link
from prefork.net.address import Address
from prefork.net.held import connections
from prefork.pool.scoreboard import BEGUN
from prefork.pool.state import Worker
from prefork.system.standing import cpu_seconds

# So many workers are asked for their CPU in one look (8 us each), in turns.
AT_ONCE = 64
# Two looks are compared that are so far apart; a tick is 10 ms.
APART = 0.5
# A thread that computes gets at least this share of a CPU, unless twenty times as many as there are CPUs do; a heartbeat does not.
SHARE = 0.05


@dataclass(slots=True)
class _Sample:
    pid: int
    begun: int
    cpu: float
    at: float
    since: float | None = None  # since when it is suspected


class Computing:
    """Watches the idle workers of one generation.

    ``tire(worker, since, now)`` has one leave that may hold a client since then.
    """

    def __init__(
        self, link: Link, addresses: Sequence[Address], timeout: float, tire: Callable[[Worker, float, float], None]
    ) -> None:
        self._link = link
        self._addresses = addresses
        self._timeout = timeout
        self._tire = tire
        self._samples: dict[int, _Sample] = {}
        self._turn = 0

    def look(self, idle: Sequence[Worker], now: float) -> bool:
        """Look at some of those who say that they wait. Whether there is something to compare in a second."""
        first = self._turn if self._turn < len(idle) else 0
        self._turn = first + AT_ONCE
        again = False
        for worker in idle[first : first + AT_ONCE]:
            again |= self._look_at(worker, now)
        return again

    def forget(self, slot: int) -> None:
        """The slot's worker has gone."""
        self._samples.pop(slot, None)

    def _look_at(self, worker: Worker, now: float) -> bool:
        board = self._link.board
        begun, cpu = board.words[board.record(worker.slot) + BEGUN], cpu_seconds(worker.pid)
        if cpu is None:
            return False
        before = self._samples.get(worker.slot)
        if before is None or (before.pid, before.begun) != (worker.pid, begun):
            self._samples[worker.slot] = _Sample(worker.pid, begun, cpu, now)
            return True
        if now < before.at + APART:
            return True
        computes = cpu - before.cpu >= SHARE * (now - before.at)
        before.cpu, before.at = cpu, now
        held = connections(worker.pid, self._addresses[board.layout.listener(worker.slot)]) if computes else []
        if held == []:
            before.since = None
            return False
        if before.since is None:
            before.since = now
        if now >= before.since + self._timeout:
            self._tire(worker, now if held is None else before.since, now)
        return held is not None
