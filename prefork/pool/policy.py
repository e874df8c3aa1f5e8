"""How many workers to fork and to retire, and when to look again: pure functions over plain values.

What a shortage is decides everything else. A replacement is for a worker that is *blocked* in its handler. One that is busy and
about to be an acceptor again needs none, and forking for it makes a saturated machine slower: its processes find their caches
cold. So:

    shortage = target - idle - starting - returning

`returning` says who is about to be back. Of two looks LOOK_AGAIN apart the smaller shortage is forked. One look is not enough: a
worker that computes and then blocks is still runnable when the master first looks, and no later event tells of it. Hence there
is always a next look while somebody is missing. Places known to be empty (a death, a start, a raised target) are filled at once;
when these were all, nobody is missing.

Under a load that takes and gives back acceptors all the time every accept would be worth a look, and a look has cold caches (300
us at 3,000 connections a second: a tenth of what those cost). So looks come ever more seldom while nobody is blocked, and meanwhile
nobody rings. From STEADY_LOOK on whoever takes the acceptor by which fewer than half of the idle ones are left does, and looks
become rarer still, up to CALM_LOOK. If somebody has rung, or nobody is idle, it is STEADY_LOOK again, and no ring. Once a look
finds that nobody was accepted since the last one, it was the last, and the next accept rings.

Surplus acceptors are those that were never needed during a whole ``spare_timeout`` (SHORTEST_WINDOW at least): the low-water mark
of idle workers, kept exact by asking to be rung below it, not the count at two instants, which makes a steady load flap.

A worker that has reached a limit of its own (connections, age, memory) is *tired*: it does not count as an acceptor, so its
replacement is forked as for any worker that is missing. It leaves when its replacement is there: `released`. Until then a worker
that is too old or too large serves on, and one that has served its last connection waits. What serves or waits is no acceptor that
could be missed, so it leaves for each replacement that comes, whether that is idle or has a client already.

At the ceiling nobody is forked, so fewer than ``target`` can wait in accept(). That alone hurts no client. The listener is
*saturated* once no acceptor is left, so that clients wait (`unserved`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

LOOK_AGAIN, STEADY_LOOK, CALM_LOOK = 0.002, 0.032, 0.256
# A busy worker may be about to be back as long as it is runnable and has been busy for less than YOUNG, or less than FRESH anyhow.
YOUNG, FRESH = 0.050, 0.0006
# At the ceiling nothing can be done until somebody ends, which is an event. But no event tells that a worker is idle again: looks
# that come ever more seldom, up to this, keep `saturated_seconds` true to a half of what it has added.
SATURATED_LOOK = 1.0
# Surplus acceptors are looked for at most ten times a second, however short `spare_timeout` is: each time costs a look.
SHORTEST_WINDOW = 0.1
BACKOFF_BASE = 1.5
BACKOFF_LIMIT = 30.0
# A fork that fails costs next to nothing, and clients wait for it: a want of processes or memory that has gone is noticed soon.
FORK_BACKOFF, FORK_BACKOFF_LIMIT = 0.1, 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What one look saw of one listener's workers. ``vacated``: places known to be empty since the last look."""

    target: int
    idle: int  # in accept(), not asked to leave
    starting: int  # forked or ordered, not in accept() yet
    returning: int  # busy, and about to be back
    busy: int  # serving, not asked to leave; the returning ones included
    room: int  # how many more processes the ceiling leaves to this listener
    vacated: int = 0
    come: int = 0  # have reached accept() since the last look
    tired: int = 0  # in accept(), and to be recycled: no acceptors, but clients do not wait for one meanwhile
    leaving: int = 0  # about to go, and to make room
    waiting: int = 0  # clients in the queue; told at the ceiling only
    accepted: bool = False  # somebody was, since the last look


@dataclass(frozen=True, slots=True)
class Memory:
    """What is carried from one look to the next. ``wait``: how long after this one that is to be; ``due``: when."""

    wait: float = 0.0
    due: float = 0.0
    short: int = 0
    short_at: float | None = None
    low_water: int | None = None  # fewest idle since `window_at`; None when there are no more workers than wanted
    window_at: float = 0.0
    at_ceiling: bool = False  # fewer than wanted can wait in accept(), and none may be forked
    saturated: bool = False  # and none is left, so clients wait


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do. ``ring_below``: an accept that leaves fewer idle than this is worth waking the master for; 0 is never."""

    fork: int
    retire: int
    look_at: float | None
    ring_below: int


def returning(runnable: int, fresh: int, asleep: int) -> int:
    """How many busy workers are about to be back: of those that are younger than YOUNG and ``runnable``, ``fresh``, or ``asleep``.

    A fresh one that waits, for the client's next byte, say, is about to be back when most that have just begun are: at a handler
    that blocks, more are found asleep than fresh. (Measured, 64 clients in a closed loop, 8 acceptors: without the fresh ones 72
    workers at 49 us of CPU a connection, with them 8 at 23 us. A handler that sleeps 5 ms gets a worker for each client.)
    """
    return runnable + (fresh if fresh >= asleep else 0)


def decide(memory: Memory, view: View, now: float, spare_timeout: float) -> tuple[Memory, Decision]:
    """One look at one listener: what to fork or retire, when to look again, and what to remember."""
    missing = view.target - view.idle - view.starting
    if memory.wait > STEADY_LOOK and now < memory.due:
        memory = replace(memory, wait=STEADY_LOOK / 2)  # somebody has rung, and would at each accept
    if missing <= 0:
        return _enough(memory, view, now, spare_timeout)
    if missing <= min(view.vacated, view.room) and not view.returning:
        # Once these are forked nobody is missing, and nobody was taken by a load that goes on: two looks fewer for each death.
        memory, decision = _enough(memory, replace(view, starting=view.starting + missing), now, spare_timeout)
        return memory, replace(decision, fork=missing)
    return _short(memory, view, missing, now)


def _short(memory: Memory, view: View, missing: int, now: float) -> tuple[Memory, Decision]:
    shortage = max(0, missing - view.returning)
    settled, short, short_at = 0, shortage, now
    wait = LOOK_AGAIN if shortage else _later(memory, view)
    if memory.short_at is not None:
        if now >= memory.short_at + LOOK_AGAIN:
            settled = min(shortage, memory.short)
        else:
            # Woken early, by somebody's death or the other listener: the first look still stands, with the smaller shortage.
            short, short_at = min(shortage, memory.short), memory.short_at
            wait = memory.short_at + LOOK_AGAIN - now
    # Who was needed in this window is not surplus.
    low = None if memory.low_water is None else min(memory.low_water, view.idle)
    wanted = max(settled, min(shortage, view.vacated))
    fork = min(wanted, max(0, view.room))
    if view.room <= 0:
        saturated = unserved(view)
        at_ceiling = saturated or shortage > view.tired + view.leaving
        wait = ever_more_seldom(memory)
        # Whoever takes the last acceptor rings, as soon as looks have become rare.
        ring_below = 1 if wait > STEADY_LOOK and view.idle + view.tired else 0
        memory = Memory(wait, now + wait, low_water=low, window_at=memory.window_at, at_ceiling=at_ceiling, saturated=saturated)
        return memory, Decision(0, 0, memory.due, ring_below)
    if fork:
        # What was forked is `starting` from now on: the next pair of looks begins here.
        short, short_at, wait = shortage - fork, now, LOOK_AGAIN
    return Memory(wait, now + wait, short, short_at, low, memory.window_at), Decision(fork, 0, now + wait, _alarm(wait, view))


def unserved(view: View) -> bool:
    """Whether clients wait: nobody accepts, and no worker is about to, or there are more clients in the queue than such workers."""
    about_to = view.starting + view.returning + view.leaving
    return view.idle + view.tired == 0 and (about_to == 0 or view.waiting > about_to)


def _later(memory: Memory, view: View) -> float:
    """How long to wait while a load goes on and nobody is blocked."""
    return min(CALM_LOOK if view.idle else STEADY_LOOK, max(LOOK_AGAIN, 2 * memory.wait))


def ever_more_seldom(memory: Memory) -> float:
    """How long to wait while nobody may be forked."""
    return min(SATURATED_LOOK, max(LOOK_AGAIN, 2 * memory.wait))


def _alarm(wait: float, view: View) -> int:
    """What `ring_below` is while a load goes on: before a look that is late somebody has to tell when acceptors become few."""
    return max(1, view.idle // 2) if wait > STEADY_LOOK else 0


def _enough(memory: Memory, view: View, now: float, spare_timeout: float) -> tuple[Memory, Decision]:
    # With idle + starting = target every accept leaves somebody missing, and ``target`` is still right when all have started.
    needed = view.target if view.idle + view.starting == view.target else view.target - min(view.starting, view.target)
    wait, look_at = 0.0, None
    if view.accepted:
        wait = _later(memory, view)
        needed, look_at = _alarm(wait, view), now + wait
    if view.idle + view.starting + view.busy <= view.target:
        return Memory(wait, look_at or 0.0), Decision(0, 0, look_at, needed)
    # More workers than acceptors wanted. No event tells when the busy ones are done, so there is a look at every window's end.
    low = view.idle if memory.low_water is None else min(memory.low_water, view.idle)
    begun = now if memory.low_water is None else memory.window_at
    window = max(spare_timeout, SHORTEST_WINDOW)
    retire = 0
    if now >= begun + window:
        retire = max(0, low - view.target)
        low, begun = view.idle - retire, now
    if low > view.target:
        needed = low  # whoever is needed in this window is heard of
    ends = begun + window
    due = min(ends, look_at or ends)
    return Memory(wait, due, low_water=low, window_at=begun), Decision(0, retire, due, needed)


@dataclass(frozen=True, slots=True)
class Tired:
    """Workers that are to be recycled, or how many of each kind may leave now."""

    idle: int = 0  # in accept()
    waiting: int = 0  # they have served their last connection, and accept nothing
    busy: int = 0  # they leave after their connection


def released(view: View, tired: Tired) -> Tired:
    """How many tired workers may leave now."""
    ready = view.idle + view.returning
    if ready < view.target and view.room <= 0 and not view.starting and not view.leaving:
        # There is no room for a replacement beside them: one makes some.
        return Tired(waiting=1) if tired.waiting else Tired(idle=1) if tired.idle else Tired(busy=min(1, tired.busy))
    idle = min(tired.idle, max(0, ready + tired.idle - view.target))
    replaced = max(view.come, ready + tired.waiting + tired.busy - view.target)
    waiting = min(tired.waiting, replaced)
    return Tired(idle, waiting, min(tired.busy, replaced - waiting))


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
