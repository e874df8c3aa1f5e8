"""Workers of one generation that were asked to leave: asked again until they have heard it, cut when their time is over.

Being asked is a byte on the orders, which a worker reads before each accept, and a signal for one that waits there; one that
serves a connection is left alone until it is done, but for one signal with drain = "eof", which ends its input. The signal is
repeated only while the slot says that its worker waits: one that lands just before the system call is entered is not seen by it
(signal(7)). Who is cut is never one that waits in accept(): the kernel completes the accept for a process that is dying.

One that has not gone after LATE, though it says that it waits, is named, and nothing else waits for it. If its main thread has
taken every signal that was sent (or sleeps in the kernel, where none is taken) and is in no system call on the listener, it does
not accept any more: a thread that a handler has left behind keeps it from going on, in C code with Python's lock, and a client
that it has accepted is nobody's. Such a one is killed when it has been found so for LATE, and once a client that it may have is as
old as ``timeout``, or its time to finish is over; never one that was stopped, is traced, blocks the signal, or has not been given a
CPU to hear it. (A worker that was continued a moment ago has taken its signal, and is about to go.)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prefork import log
from prefork.killing import Killing, named
from prefork.link import Link
from prefork.net.address import parts_text
from prefork.net.held import connections
from prefork.net.listener import Listener
from prefork.pool.scoreboard import BEGUN, BUSY, IDLE, LEAVING, PAUSED
from prefork.pool.state import Pool, Worker
from prefork.pool.wire import Order
from prefork.system import signals
from prefork.system.standing import is_in_call_on, standing

# A worker that was told to leave is looked at after a millisecond, then every 20; one that does not react for a second
# (stopped by somebody, say) only once a second.
NAG_FIRST, NAG_AGAIN, NAG_SELDOM, NAG_PATIENCE = 0.001, 0.020, 1.0, 51
# By then one that is given a CPU has heard it. It is told again after twice the time, and so on.
LATE, TOLD_LAST = 1.0, 600.0


@dataclass(frozen=True, slots=True)
class Unserved:
    """A client that a worker has accepted, and has not begun to serve: the slot's count then, and the peer's host and port."""

    begun: int
    peer: tuple[str, int]


class Retiring:
    """``waiting``: slots of those who were asked and may still be in accept(), ``late`` those of them who should have gone.

    ``end_input``: who serves is signalled, too.
    """

    def __init__(
        self,
        link: Link,
        pool: Pool,
        killing: Killing,
        listeners: Sequence[Listener],
        timeout: float = 0.0,
        *,
        end_input: bool = False,
    ) -> None:
        self.waiting: set[int] = set()
        self.late: set[int] = set()
        self.holds_since: dict[int, float] = {}  # who says that it waits, and has been seen to hold a client
        self.unserved: dict[int, Unserved] = {}  # of those who were killed
        self._listeners = listeners
        self._timeout = timeout
        self._asked_at: dict[int, float] = {}
        self._tell_at: dict[int, float] = {}
        self._out_since: dict[int, float] = {}  # late ones that were out of accept() at each look since then
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
        self._await(worker.slot, now)
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
        for worker in self._pool.workers.values():
            if worker.retiring and not worker.killed:
                self._await(worker.slot, now)
        if self.waiting:
            self._nag_at, self._nags = now, 0
        deadlines = [worker.deadline for worker in self._pool.workers.values() if worker.deadline is not None]
        self._deadline_at = min(deadlines, default=None)

    def forget(self, slot: int) -> None:
        """The slot's worker has gone."""
        self._link.board.retire[slot] = 0
        self._leave_alone(slot)
        self.holds_since.pop(slot, None)
        self.unserved.pop(slot, None)

    def _await(self, slot: int, now: float) -> None:
        if slot not in self.waiting:
            self.waiting.add(slot)
            self._asked_at[slot] = now

    def _leave_alone(self, slot: int) -> None:
        self.waiting.discard(slot)
        self.late.discard(slot)
        self._asked_at.pop(slot, None)
        self._tell_at.pop(slot, None)
        self._out_since.pop(slot, None)

    @property
    def prompt(self) -> bool:
        """Whether one of those who wait was asked a moment ago, so that it is worth waiting for."""
        return self.waiting > self.late

    def overdue(self, now: float) -> list[tuple[Worker, float]]:
        """The workers that should have gone, and for how long."""
        return [(self._pool.workers[slot], now - self._asked_at[slot]) for slot in self.late]

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
                self._leave_alone(slot)
        # Before the next signal, which would be pending: what is asked is whether the last one was taken in all the time since.
        self._end_the_late(now)
        for slot in self.waiting:
            self._link.signal(self._pool.workers[slot], Order.RETIRE)
        self._nags += 1
        wait = NAG_AGAIN if self._nags < NAG_PATIENCE else NAG_SELDOM
        self._nag_at = now + wait if self.waiting else None

    def _end_the_late(self, now: float) -> None:
        self.late = {slot for slot in self.waiting if now >= self._asked_at[slot] + LATE}
        untold: list[tuple[Worker, float]] = []
        for slot in list(self.late):
            worker, since = self._pool.workers[slot], now - self._asked_at[slot]
            if self._link.board.states[slot] not in (IDLE, PAUSED):
                continue  # it starts: boot_timeout is for that
            told, stays_out = slot in self._tell_at, self._stays_out_of_accept(worker, now)
            if told and stays_out and self._time_is_over(worker, now):
                self._kill_unheard(worker, now)
            elif now >= self._tell_at.get(slot, 0.0):
                self._tell_at[slot] = now + min(TOLD_LAST, since)
                untold.append((worker, since))
        if untold:
            log.event("not_left", generation=self._link.number, count=len(untold), who=named(untold))

    def _stays_out_of_accept(self, worker: Worker, now: float) -> bool:
        """Whether it was so at each look for LATE: one look may find a worker that has just heard its signal."""
        if not _is_out_of_accept(worker.pid, self._listener(worker.slot).fileno()):
            self._out_since.pop(worker.slot, None)
            return False
        return now >= self._out_since.setdefault(worker.slot, now) + LATE

    def is_in_accept(self, worker: Worker) -> bool | None:
        """Whether the kernel says that it waits there, whatever its slot says; None where the kernel does not tell."""
        return is_in_call_on(worker.pid, self._listener(worker.slot).fileno())

    def _listener(self, slot: int) -> Listener:
        return self._listeners[self._link.layout.listener(slot)]

    def _time_is_over(self, worker: Worker, now: float) -> bool:
        """Whether a client that this worker may have accepted before it was asked has had its time."""
        if worker.deadline is not None and worker.deadline <= now:
            return True
        asked = self._asked_at[worker.slot]
        return bool(self._timeout) and now >= min(asked, self.holds_since.get(worker.slot, asked)) + self._timeout

    def _kill_unheard(self, worker: Worker, now: float) -> None:
        board, slot, asked = self._link.board, worker.slot, self._asked_at[worker.slot]
        begun = board.words[board.record(slot) + BEGUN]
        # A connection that user code has kept (`detach`) was counted when its handler returned: where there are several, or the one
        # is the slot's last, none is taken for a client that was not.
        peers = connections(worker.pid, self._listener(slot).address) or []
        if len(peers) == 1 and (not peers[0][1] or parts_text(*peers[0]) != board.peer(slot)):
            self.unserved[slot] = Unserved(begun, peers[0])
            worker.hung = begun + 1
        self._leave_alone(slot)
        self.kill(worker, now, f"it was asked to leave {now - asked:.0f} s ago, and hears nothing")

    def _cut(self, now: float) -> None:
        self._deadline_at = None
        for worker in self._pool.workers.values():
            if worker.deadline is None or worker.killed:
                continue
            if worker.deadline <= now and self._link.board.states[worker.slot] in (BUSY, LEAVING):
                if not self.is_in_accept(worker):
                    self.kill(worker, now, "its time to finish is over")
                    continue
                self._link.signal(worker, Order.RETIRE)  # others have written that into its slot
            again = worker.deadline if worker.deadline > now else now + NAG_SELDOM
            self._deadline_at = again if self._deadline_at is None else min(self._deadline_at, again)

    def kill(self, worker: Worker, now: float, why: str) -> None:
        """SIGKILL, and say so."""
        board = self._link.board
        peer = board.peer(worker.slot) if board.states[worker.slot] == BUSY else "nobody"
        if (unserved := self.unserved.get(worker.slot)) is not None:
            peer = parts_text(*unserved.peer)
        log.event("cut", slot=worker.slot, generation=self._link.number, pid=worker.pid, peer=peer, why=why)
        self._killing.kill(worker, now)

    def kill_all(self, now: float, why: str) -> None:
        """SIGKILL to every worker that is left."""
        for worker in self._pool.workers.values():
            if not worker.killed:
                self.kill(worker, now, why)


def _is_out_of_accept(pid: int, listener: int) -> bool:
    """Whether a worker's main thread can't be in accept(): each signal to leave that has come was taken, which ends the call.

    ``listener`` is its descriptor. C code may have put a handler in the place of ours that does nothing: so the kernel has to say,
    too, that it is in no such call, and where it does not tell, the worker may be there.
    """
    how = standing(pid) if pid else None
    heard = how is not None and (how.sleeps_in_the_kernel or how.has_taken(signals.RETIRE))
    return heard and is_in_call_on(pid, listener) is False
