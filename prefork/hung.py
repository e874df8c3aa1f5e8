"""Connections that take longer than ``timeout``: found without polling, told with their worker's stack, ended with the worker.

A worker rings when the master has not looked at its pool for a second. So whatever begins is found by a scan that comes a second
after each look, and once a connection is known, the next scan comes when it is due: an idle daemon scans nothing. A connection's
age is what the master's own clock has counted since then. That clock leaves out what the master itself was stopped or starved
for, and before a connection was known as much is taken off its age: nobody is punished for time in which nobody watched.

What a slot says of when its connection has begun is held against that: any handler can write on the board. One that the last scan
has not seen has begun since then; and where no look was due after that scan, it has rung, and the look that followed opened the
time in which others need not ring. What is said to be older counts from the scan that finds it. Who is said to serve and is in
accept() by the kernel's word is not killed.

One worker of a generation at a time, because all write their stacks to one pipe. Between the look that finds a connection too old
and the SIGKILL the worker may end it and begin another client's. So it is asked to leave first, by the byte on the orders that a
worker reads before each accept: from then on it begins no other one. Then it is asked for its stack; and after that wait, if the
slot still says BUSY (read first) with the same count (read second), the worker is killed. Else it has ended the connection and is
leaving, or has not seen the byte and waits in accept(): it is retired like any other, and no client is lost.

That a byte is seen is a question of time and not of a fence: a store does not stay in a CPU's buffer for LOOK.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from prefork import log
from prefork.killing import Killing
from prefork.link import Link
from prefork.pool.scoreboard import BEGUN, BUSY, IDLE, SINCE
from prefork.pool.state import Pool, Worker
from prefork.pool.wire import Order
from prefork.system import stacks
from prefork.system.standing import standing

# A scan comes so long after a look: `prefork.worker.UNSEEN_NS`, after which a worker rings.
SCAN = 1.0
# A stack is complete when nothing more of it has come from one look to the next. It is waited for no longer than this: on a busy
# machine it takes its time until the fork server has passed the signal on, and the worker has taken it.
LOOK, ENOUGH = 0.01, 2.0


@dataclass(slots=True)
class Case:
    """A worker that was asked for its stack, because it has served the slot's ``begun``-th connection since then."""

    worker: Worker
    begun: int
    since: float
    until: float
    look_at: float
    came: bool = False
    mute: bool = False


class Hung:
    """Watches one generation; without a ``timeout`` it does nothing. ``lost``: what the master's clock is behind the real one.

    ``retire`` has a worker leave that was asked to by the byte alone. ``look_at_idle`` is shown, at each scan, the workers that say
    that they wait, and tells whether it wants to see them again in a second (`prefork.computing`). ``is_in_accept`` asks the
    kernel, which may not tell.
    """

    def __init__(
        self,
        link: Link,
        pool: Pool,
        killing: Killing,
        retire: Callable[[Worker, float], None],
        look_at_idle: Callable[[Sequence[Worker], float], bool],
        is_in_accept: Callable[[Worker], bool | None],
        timeout: float,
        lost: float,
    ) -> None:
        self._link = link
        self._pool = pool
        self._killing = killing
        self._retire = retire
        self._look_at_idle = look_at_idle
        self._is_in_accept = is_in_accept
        self._timeout = timeout
        self._lost = lost
        self._known: dict[int, tuple[int, float]] = {}  # connections by slot: the number there, and since when it is served
        # Connections that no scan has seen have begun since then; None: whoever begins one rings.
        self._unseen_since: float | None = None
        self._looked_at = 0.0
        self._scan_at: float | None = None
        self._case: Case | None = None

    def looked(self, now: float) -> None:
        """The master has looked at the pool: who begins a connection in the next second does not ring."""
        if self._timeout:
            self._looked_at = now
            if self._unseen_since is None:
                self._unseen_since = now
            if self._scan_at is None or self._scan_at > now + SCAN:
                self._scan_at = now + SCAN

    def carry(self) -> tuple[dict[int, tuple[int, float]], float | None]:
        """The connections that are known, by slot, and since when others may have begun: for another program (`adopt`)."""
        return self._known, self._unseen_since

    def adopt(self, known: Mapping[int, tuple[int, float]], unseen_since: float | None) -> None:
        """Go on with what another program of this process has known."""
        self._known, self._unseen_since = dict(known), unseen_since

    def forgive(self, seconds: float) -> None:
        """Take time that the master's clock has left out off the age of the connections that are not known yet."""
        self._lost -= seconds

    def tend(self, now: float, now_ns: int) -> None:
        """Do what is due. ``now_ns`` is the real time, in which workers count."""
        if self._case is not None and self._case.look_at <= now:
            self._wait_for_stack(self._case, now)
        if self._case is None and self._scan_at is not None and self._scan_at <= now:
            self._scan(now, now_ns)

    def wake_at(self) -> float | None:
        """When to `tend`."""
        return self._scan_at if self._case is None else self._case.look_at

    def _scan(self, now: float, now_ns: int) -> None:
        lost = now_ns / 1e9 - now
        unwatched, self._lost = max(0.0, lost - self._lost), lost
        states, words = self._link.board.states, self._link.board.words
        found: dict[int, tuple[int, float]] = {}
        idle: list[Worker] = []
        for slot, worker in self._pool.workers.items():
            state = states[slot]
            if state == IDLE and worker.pid and not (worker.retiring or worker.stopped):
                idle.append(worker)
            if state != BUSY or worker.killed:
                continue
            record = self._link.board.record(slot)
            begun = words[record + BEGUN]  # before SINCE: the worker writes them the other way round, and seems too young at worst
            known = self._known.get(slot)
            if known is None or known[0] != begun:
                said = now - (now_ns - words[record + SINCE]) / 1e9 + unwatched
                known = begun, self._begin(said, worker, now)
            found[slot] = known
        self._known = found
        self._unseen_since = now if self._looked_at + SCAN > now else None
        times = [self._looked_at + SCAN] if self._looked_at + SCAN > now else []
        if self._look_at_idle(idle, now):
            times.append(now + SCAN)
        if found:
            slot, (begun, since) = min(found.items(), key=lambda item: item[1][1])
            if since + self._timeout <= now:
                self._ask(self._pool.workers[slot], begun, since, now)
                return
            times.append(since + self._timeout)
        self._scan_at = min(times, default=None)

    def _begin(self, said: float, worker: Worker, now: float) -> float:
        """When a connection has begun that the last scan has not seen, where its slot says so."""
        unseen = max(worker.since, self._unseen_since if self._unseen_since is not None else now)
        # A ring is heard a moment after the begin. What is said to be older than that is no worker's word.
        return now if said < unseen - SCAN else min(now, max(said, unseen))

    def _ask(self, worker: Worker, begun: int, since: float, now: float) -> None:
        self._link.board.retire[worker.slot] = 1
        self._link.stacks.begin_dump()
        self._link.signal(worker, Order.DUMP)
        self._case = Case(worker, begun, since, now + ENOUGH, now + LOOK)

    def _wait_for_stack(self, case: Case, now: float) -> None:
        came = self._link.stacks.look()
        # A worker that takes no signals at two looks in a row tells no stack. Of a pool that waits for a dead mount each would
        # else take ENOUGH.
        was_mute, case.mute = case.mute, not (came or case.came) and _takes_no_signals(case.worker.pid)
        if (came or not case.came) and not (was_mute and case.mute) and now < case.until:
            case.came, case.look_at = case.came or came, min(case.until, now + LOOK)
            return
        self._case, self._scan_at = None, now
        board, worker = self._link.board, case.worker
        stack = self._link.stacks.take_dump()
        if self._pool.workers.get(worker.slot) is not worker or worker.killed:
            return
        if board.states[worker.slot] != BUSY or board.words[board.record(worker.slot) + BEGUN] != case.begun:
            if not worker.retiring:
                self._retire(worker, now)
            return
        if self._is_in_accept(worker):
            # Another worker has written into its slot. It has not seen the byte, and is not signalled like one that waits.
            self._known[worker.slot] = case.begun, now
            if not worker.retiring:
                self._retire(worker, now)
            self._link.signal(worker, Order.RETIRE)
            return
        worker.hung, worker.stack = case.begun, stack
        log.event(
            "hung",
            text=stack,
            slot=worker.slot,
            generation=self._link.number,
            pid=worker.pid,
            peer=board.peer(worker.slot),
            duration=now - case.since,
            seconds=self._timeout,
        )
        self._killing.kill(worker, now)


def _takes_no_signals(pid: int) -> bool:
    how = standing(pid)
    return how is not None and (how.sleeps_in_the_kernel or how.stands_still or how.is_deaf_to(stacks.DUMP))
