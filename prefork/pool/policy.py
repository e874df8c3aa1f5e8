"""How many workers to fork and to retire, and when to look again: pure functions over plain values.

What a shortage is decides everything else. A replacement is for a worker that is *blocked* in its handler. One that is busy,
young and runnable only waits for a CPU and is about to be an acceptor again; forking for it makes a saturated machine slower
(measured: 4 clients in a closed loop took the literal rule to 69 workers at 65 us a connection, this one to 10 at 48 us). So:

    shortage = target - idle - starting - (busy workers that are runnable and younger than YOUNG)

and of two looks LOOK_AGAIN apart the smaller shortage is forked. One look is not enough: a worker that computes and then
blocks is still runnable when the master first looks, and no later event tells of it. Hence there is always a next look while
somebody is missing. Places known to be empty (a death, a start, a raised target) are filled at once.

Surplus acceptors are those that were never needed during a whole ``spare_timeout``: the low-water mark of idle workers, kept
exact by asking to be rung below it, not the count at two instants, which makes a steady load flap.

A worker that has reached a limit of its own (connections, age, memory) is *tired*: it serves on until it is told to leave, but
does not count as an acceptor. So its replacement is forked as for anybody who is missing, and it is told to leave when it is
not missed any more: `released`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

LOOK_AGAIN = 0.003
YOUNG = 0.050
# At the ceiling nothing can be done until somebody ends, which is an event; the look only keeps `saturated_seconds` true.
SATURATED_LOOK = 1.0
BACKOFF_BASE = 1.5
BACKOFF_LIMIT = 30.0
# A fork that fails costs next to nothing, and clients wait for it: a want of processes or memory that has gone is noticed soon.
FORK_BACKOFF, FORK_BACKOFF_LIMIT = 0.1, 1.0


@dataclass(frozen=True, slots=True)
class View:
    """What one look saw of one listener's workers. ``vacated``: places known to be empty since the last look."""

    target: int
    idle: int  # in accept(), not asked to leave
    starting: int  # forked or ordered, not in accept() yet
    returning: int  # busy, runnable and young
    busy: int  # serving, not asked to leave; the returning ones included
    room: int  # how many more processes the ceiling leaves to this listener
    vacated: int = 0
    tired: int = 0  # idle, and to be recycled: no acceptors, but clients do not wait for one meanwhile
    leaving: int = 0  # about to go, and to make room


@dataclass(frozen=True, slots=True)
class Memory:
    """What is carried from one look to the next."""

    short: int = 0
    short_at: float | None = None
    low_water: int | None = None  # fewest idle since `window_at`; None when there are no more workers than wanted
    window_at: float = 0.0
    saturated: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do. ``ring_below``: an accept that leaves fewer idle than this is worth waking the master for; 0 is never."""

    fork: int
    retire: int
    look_at: float | None
    ring_below: int


def decide(memory: Memory, view: View, now: float, spare_timeout: float) -> tuple[Memory, Decision]:
    """One look at one listener: what to fork or retire, when to look again, and what to remember."""
    missing = view.target - view.idle - view.starting
    if missing > 0:
        return _short(memory, view, missing, now)
    return _enough(memory, view, now, spare_timeout)


def _short(memory: Memory, view: View, missing: int, now: float) -> tuple[Memory, Decision]:
    shortage = max(0, missing - view.returning)
    settled, next_look = 0, now + LOOK_AGAIN
    short, short_at = shortage, now
    if memory.short_at is not None:
        if now >= memory.short_at + LOOK_AGAIN:
            settled = min(shortage, memory.short)
        else:
            # Woken early, by somebody's death or the other listener: the first look still stands, with the smaller shortage.
            short, short_at = min(shortage, memory.short), memory.short_at
            next_look = memory.short_at + LOOK_AGAIN
    wanted = max(settled, min(shortage, view.vacated))
    fork = min(wanted, max(0, view.room))
    if view.room <= 0:
        return Memory(saturated=shortage > view.tired + view.leaving), Decision(0, 0, now + SATURATED_LOOK, 0)
    if fork:
        # What was forked is `starting` from now on: the next pair of looks begins here.
        short, short_at, next_look = shortage - fork, now, now + LOOK_AGAIN
    return Memory(short=short, short_at=short_at), Decision(fork, 0, next_look, 0)


def _enough(memory: Memory, view: View, now: float, spare_timeout: float) -> tuple[Memory, Decision]:
    needed = view.target - min(view.starting, view.target)
    if view.idle + view.starting + view.busy <= view.target:
        return Memory(), Decision(0, 0, None, needed)
    # More workers than acceptors wanted. No event tells when the busy ones are done, so there is a look at every window's end.
    low = view.idle if memory.low_water is None else min(memory.low_water, view.idle)
    begun = now if memory.low_water is None else memory.window_at
    if now < begun + spare_timeout:
        return Memory(low_water=low, window_at=begun), Decision(0, 0, begun + spare_timeout, max(needed, low))
    retire = max(0, low - view.target)
    left = view.idle - retire
    return Memory(low_water=left, window_at=now), Decision(0, retire, now + spare_timeout, max(needed, left))


def released(view: View, busy: int) -> tuple[int, int]:
    """How many tired workers may leave now: of those that are idle, and of the ``busy`` ones, who leave after their connection."""
    ready = view.idle + view.returning
    if ready >= view.target:
        return min(view.tired, ready + view.tired - view.target), busy
    if view.room <= 0 and not view.starting and not view.leaving:
        # There is no room for a replacement beside anybody: one makes some.
        return (1, 0) if view.tired else (0, min(1, busy))
    return min(view.tired, max(0, ready + view.tired - view.target)), 0


def rooms(max_workers: int, targets: Sequence[int], live: Sequence[int], live_elsewhere: int) -> list[int]:
    """How many more workers each listener may have. ``live_elsewhere``: processes of other generations.

    Each listener's target is reserved for it: one listener's long connections must not take the last place of another. A
    generation may always have its targets, whatever the older ones still hold, so that a reload always gets through.
    """
    free = max_workers - live_elsewhere - sum(live)
    floor = [max(0, target - used) for target, used in zip(targets, live, strict=True)]
    reserved = sum(floor)
    return [max(own, free - (reserved - own)) for own in floor]


def backoff(failures: int) -> float:
    """Seconds to wait after this many failures in a row (1, 2, ...) of what runs somebody's code."""
    return min(BACKOFF_LIMIT, _growth(failures))


def fork_backoff(failures: int) -> float:
    """The same for forks that the kernel has refused."""
    return min(FORK_BACKOFF_LIMIT, FORK_BACKOFF * _growth(failures))


def _growth(failures: int) -> float:
    # The exponent is bounded so that a week of failures does not overflow a float.
    return BACKOFF_BASE ** min(failures, 20)
