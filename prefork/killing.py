"""Workers that are killed: by SIGKILL, through their parent, and again for as long as they are there.

A SIGKILL does not always end a process soon: it may sleep in the kernel (state D: a device, a mount whose server is away), its
tracer may not have let go of what is left of it, and its parent may not be allowed to signal what a set-user-ID program has made
of it. So a kill is tried again, ever more seldom, and what is so is told each time, in one line for all of a generation: nothing
else waits for such a worker. Which worker is killed, and why, is decided elsewhere (`prefork.hung`, `prefork.retiring`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from prefork import log
from prefork.link import Link
from prefork.pool.state import Worker
from prefork.pool.wire import Order
from prefork.system.standing import standing

# A process that can end does so within milliseconds; the times between two tries double from here to there.
FIRST, LONGEST = 1.0, 600.0
# So many are named in a line. A mount that is away may have all workers of a pool wait.
NAMED = 8


@dataclass(slots=True)
class _Kill:
    worker: Worker
    since: float
    again_at: float
    wait: float


class Killing:
    """The workers of one generation that were killed and have not been reaped yet."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._kills: dict[int, _Kill] = {}  # by slot

    def kill(self, worker: Worker, now: float) -> None:
        """SIGKILL."""
        self.note(worker, now)
        self._link.signal(worker, Order.KILL)

    def note(self, worker: Worker, now: float) -> None:
        """It was killed, by one order for all or by another program of this process: see that it goes."""
        worker.killed = True
        self._kills.setdefault(worker.slot, _Kill(worker, now, now + FIRST, FIRST))

    def kill_again(self) -> None:
        """Their parent is another one, which has perhaps not heard of it."""
        for kill in self._kills.values():
            self._link.signal(kill.worker, Order.KILL)

    def forget(self, slot: int) -> None:
        """The slot's worker was reaped."""
        self._kills.pop(slot, None)

    def tend(self, now: float) -> None:
        """Do what is due."""
        due = [kill for kill in self._kills.values() if kill.again_at <= now]
        for kill in due:
            self._link.signal(kill.worker, Order.KILL)
            kill.wait = min(LONGEST, 2 * kill.wait)
            kill.again_at = now + kill.wait
        if due:
            who = named([(kill.worker, now - kill.since) for kill in due])
            log.event("still_there", generation=self._link.number, count=len(due), who=who)

    def wake_at(self) -> float | None:
        """When to `tend`."""
        return min((kill.again_at for kill in self._kills.values()), default=None)

    def overdue(self, now: float) -> list[tuple[Worker, float]]:
        """The workers that were killed longer ago than it should take, and for how long they have been."""
        return [(kill.worker, now - kill.since) for kill in self._kills.values() if now - kill.since >= FIRST]


def named(overdue: Sequence[tuple[Worker, float]]) -> str:
    """Workers that should have gone, for so many seconds, and how they stand: some of them, for people."""
    return "; ".join([_described(*late) for late in overdue[:NAMED]] + (["..."] if len(overdue) > NAMED else []))


def _described(worker: Worker, seconds: float) -> str:
    how = standing(worker.pid) if worker.pid else None
    return f"worker {worker.slot} (pid {worker.pid or 'not known'}) since {seconds:.0f} s, {how or 'its state is hidden'}"
