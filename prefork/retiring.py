"""Workers of one generation that were asked to leave: asked again until they have heard it, cut when their time is over.

Being asked is a byte on the orders, which a worker reads before each accept, and a signal for one that waits there; one that
serves a connection is left alone until it is done, but for one signal with drain = "eof", which ends its input. The signal is
repeated only while the slot says that its worker waits: one that lands just before the system call is entered is not seen by it
(signal(7)). Who is cut is never one that waits in accept(): the kernel completes the accept for a process that is dying.
"""

from collections.abc import Iterable

from prefork import log
from prefork.killing import Killing
from prefork.link import Link
from prefork.pool.scoreboard import BUSY, LEAVING
from prefork.pool.state import Pool, Worker
from prefork.pool.wire import Order

# A worker that was told to leave is looked at after a millisecond, then every 20; one that does not react for a second
# (stopped by somebody, say) only once a second.
NAG_FIRST, NAG_AGAIN, NAG_SELDOM, NAG_PATIENCE = 0.001, 0.020, 1.0, 50


class Retiring:
    """``waiting``: slots of those who were asked and may still be in accept(). ``end_input``: who serves is signalled, too."""

    def __init__(self, link: Link, pool: Pool, killing: Killing, *, end_input: bool = False) -> None:
        self.waiting: set[int] = set()
        self._link = link
        self._pool = pool
        self._killing = killing
        self._end_input = end_input
        self._nag_at: float | None = None
        self._nags = 0
        self._deadline_at: float | None = None

    def ask(self, worker: Worker, now: float, deadline: float | None) -> None:
        """Ask a worker to leave: at once, or after its connection, which is cut at the deadline."""
        board = self._link.board
        board.retire[worker.slot] = 1
        worker.retiring = True
        worker.deadline = deadline
        if deadline is not None:
            self._deadline_at = deadline if self._deadline_at is None else min(self._deadline_at, deadline)
        self.waiting.add(worker.slot)
        self._nag_at, self._nags = now + NAG_FIRST, 0
        if board.states[worker.slot] not in (BUSY, LEAVING):
            self._link.signal(worker, Order.RETIRE)
        self.end_inputs([worker])

    def end_inputs(self, workers: Iterable[Worker]) -> None:
        """With drain = "eof": have those of them who serve a connection shut down its reading side. Twice does no harm."""
        if self._end_input:
            for worker in workers:
                if self._link.board.states[worker.slot] == BUSY:
                    self._link.signal(worker, Order.RETIRE)

    def ask_again(self, now: float) -> None:
        """Their parent is another one: whoever was asked has perhaps not heard it."""
        self.end_inputs(worker for worker in self._pool.workers.values() if worker.retiring)
        self.waiting |= {worker.slot for worker in self._pool.workers.values() if worker.retiring}
        if self.waiting:
            self._nag_at, self._nags = now, 0
        deadlines = [worker.deadline for worker in self._pool.workers.values() if worker.deadline is not None]
        self._deadline_at = min(deadlines, default=None)

    def forget(self, slot: int) -> None:
        """The slot's worker has gone."""
        self._link.board.retire[slot] = 0
        self.waiting.discard(slot)

    def tend(self, now: float) -> None:
        """Do what is due."""
        if self._nag_at is not None and self._nag_at <= now:
            self._nag(now)
        if self._deadline_at is not None and self._deadline_at <= now:
            self._cut(now)

    def wake_at(self) -> float | None:
        """When to `tend`."""
        return min((at for at in (self._nag_at, self._deadline_at) if at is not None), default=None)

    def _nag(self, now: float) -> None:
        for slot in list(self.waiting):
            if self._link.board.states[slot] in (BUSY, LEAVING):
                self.waiting.discard(slot)
            else:
                self._link.signal(self._pool.workers[slot], Order.RETIRE)
        self._nags += 1
        wait = NAG_AGAIN if self._nags < NAG_PATIENCE else NAG_SELDOM
        self._nag_at = now + wait if self.waiting else None

    def _cut(self, now: float) -> None:
        self._deadline_at = None
        for worker in self._pool.workers.values():
            if worker.deadline is None or worker.killed:
                continue
            if worker.deadline <= now and self._link.board.states[worker.slot] in (BUSY, LEAVING):
                self.kill(worker, now, "its time to finish is over")
                continue
            again = worker.deadline if worker.deadline > now else now + NAG_SELDOM
            self._deadline_at = again if self._deadline_at is None else min(self._deadline_at, again)

    def kill(self, worker: Worker, now: float, why: str) -> None:
        """SIGKILL, and say so."""
        board = self._link.board
        peer = board.peer(worker.slot) if board.states[worker.slot] == BUSY else "nobody"
        log.event("cut", slot=worker.slot, generation=self._link.number, pid=worker.pid, peer=peer, why=why)
        self._killing.kill(worker, now)

    def kill_all(self, now: float, why: str) -> None:
        """SIGKILL to every worker that is left."""
        for worker in self._pool.workers.values():
            if not worker.killed:
                self.kill(worker, now, why)
