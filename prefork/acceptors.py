"""The acceptors of one listener as their generation sees them: how many are wanted, what the board says of them, what is planned.

Seen and not done: forks, and who is asked to leave, are `prefork.generation`'s. What is seen is gossip where it comes from the
board; whoever is named there and is no worker of ours does not count.
"""

import time
from dataclasses import dataclass

from prefork.config import Config
from prefork.link import Link
from prefork.pool import policy, scoreboard
from prefork.pool.episode import Episodes
from prefork.pool.policy import Memory, View
from prefork.pool.scoreboard import BUSY, FREE, IDLE, LEAVING, PARKED, PAUSED, STARTING, Scoreboard
from prefork.pool.state import Pool
from prefork.system import process

_BUSY = bytes([BUSY])


@dataclass(frozen=True, slots=True)
class Slots:
    """What the listeners of a generation have in common."""

    link: Link
    pool: Pool
    absent: set[int]  # in use, and no acceptors whatever they say: asked to leave, stopped, tired
    tired: set[int]  # those of them that want to be recycled, and were not asked to leave yet


class Acceptors:
    """Those of one listener."""

    def __init__(self, place: int, config: Config, slots: Slots, target: int, now: float) -> None:
        self.place = place
        self.first = place * slots.pool.capacity  # its lowest slot
        self.target = target
        self.vacated = target  # places known to be empty since the last look
        self.come = 0  # workers that have reached accept() since then
        self.look_at: float | None = now
        self.looked_at = 0.0
        self.seen_ns = 0  # the same, as workers' clocks have it
        self.memory = Memory()
        self.ring_below = 0  # what the workers were told
        self.episodes = Episodes()
        self.retired = False  # nobody is forked any more
        self._slots = slots
        self._recycles = bool(config.max_connections or config.max_memory or config.max_lifetime)

    # -- when to look

    def wake(self, at: float) -> None:
        """Look at that time, or before."""
        self.look_at = at if self.look_at is None else min(self.look_at, at)

    def retire(self, now: float) -> None:
        """Nobody is forked here any more, so nobody looks."""
        self.retired, self.look_at = True, None
        self.episodes.stop(now)

    def arm(self, ring_below: int) -> None:
        """Have workers ring whose accept leaves fewer than so many idle; 0 is never."""
        self.ring_below = ring_below
        self._board.order_words[self._board.listener_word(self.place, scoreboard.RING_BELOW)] = ring_below

    # -- what there is

    @property
    def _board(self) -> Scoreboard:
        return self._slots.link.board

    def row(self) -> bytes:
        """The states of the slots that were ever in use."""
        return self._board.row(self.place, self._slots.pool.high[self.place])

    def true_row(self) -> bytes:
        """The row, without the workers that a stray write has put into free slots: they would count as acceptors, for good."""
        pool, row = self._slots.pool, self.row()
        if len(row) - row.count(FREE) > pool.live[self.place]:
            for slot in range(self.first, self.first + len(row)):
                if slot not in pool.workers:
                    self._board.states[slot] = FREE
            row = self.row()
        return row

    def note_tired(self) -> bool:
        """Take in who wants to be recycled: no acceptor from now on. True while somebody does."""
        slots = self._slots
        for slot in self._board.tired_slots(self.place, slots.pool.high[self.place]) if self._recycles else ():
            worker = slots.pool.workers.get(slot)
            if worker is not None and not worker.retiring and slot not in slots.tired:
                slots.tired.add(slot)
                slots.absent.add(slot)
                self.vacated += 1
        return bool(self.tired())

    def tired(self) -> list[int]:
        """The slots of this listener that want to be recycled."""
        return [slot for slot in self._slots.tired if 0 <= slot - self.first < self._slots.pool.capacity]

    def view(self, room: int, row: bytes, since_ns: int | None = None) -> View:
        """What there is of its workers. ``since_ns``: of accepts after it is to be told."""
        slots, first = self._slots, self.first
        others = row.translate(None, _BUSY)  # one pass through a long row
        idle, busy = others.count(IDLE), len(row) - len(others)
        tired = sum(row[slot - first] == IDLE for slot in slots.tired if 0 <= slot - first < len(row))
        starting = others.count(STARTING) + others.count(PARKED) + others.count(PAUSED)
        for slot in slots.absent:
            if 0 <= slot - first < len(row):
                state = row[slot - first]
                idle -= state == IDLE
                busy -= state == BUSY
                starting -= state in (STARTING, PARKED, PAUSED)
        leaving = 0
        if self._recycles or slots.tired:
            states = ((slots.pool.workers[slot], row[slot - first]) for slot in slots.absent if 0 <= slot - first < len(row))
            leaving = sum((worker.retiring and state != BUSY) or state == LEAVING for worker, state in states)
        missing = self.target - idle - starting
        returning, accepted = 0, False
        if missing > 0:
            returning = self._returning(row)
        elif since_ns is not None:
            accepted = bool(self.latest(row, since_ns))
        return View(
            target=self.target,
            idle=idle,
            starting=starting,
            returning=returning,
            busy=busy,
            room=room,
            vacated=self.vacated,
            come=self.come,
            tired=tired,
            leaving=leaving,
            accepted=accepted,
        )

    def _returning(self, row: bytes) -> int:
        """How many workers are busy and about to be back."""
        slots, now_ns = self._slots, time.monotonic_ns()
        young, fresh = int(policy.YOUNG * 1e9), int(policy.FRESH * 1e9)
        runnable = fresh_ones = asleep = 0
        for slot, since in self.latest(row, now_ns - young):
            worker = slots.pool.workers.get(slot)
            if worker is None or not worker.pid or slot in slots.absent or row[slot - self.first : slot - self.first + 1] != _BUSY:
                continue
            if 0 <= now_ns - since < fresh:
                fresh_ones += 1
            elif process.state(worker.pid) == b"R":
                runnable += 1
            else:
                asleep += 1
        return policy.returning(runnable, fresh_ones, asleep)

    def latest(self, row: bytes, after_ns: int) -> list[tuple[int, int]]:
        """The slots that have accepted since then and when, as their workers say; of many only those that the ring knows."""
        board, place, first = self._board, self.place, self.first
        if len(row) <= scoreboard.FEW:
            seen = list(enumerate(board.since(place, len(row)), first))
        else:
            now_ns, others = time.monotonic_ns(), first + scoreboard.LOWEST
            recent = [slot for slot in board.recent(place, now_ns, now_ns - after_ns) if slot >= others]
            seen = [*enumerate(board.since(place, scoreboard.LOWEST), first)]
            seen += [(slot, board.words[board.record(slot) + scoreboard.SINCE]) for slot in recent]
        return [(slot, since) for slot, since in seen if since > after_ns]
