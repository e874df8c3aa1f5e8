"""How many workers are forked and retired: examples of one listener, and a simulated daemon with a fake clock that is driven
at random. The simulation's master does what the real one does with a decision; its checks come from the promises, not the code.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from prefork.pool.policy import (
    BACKOFF_LIMIT,
    CALM_LOOK,
    FORK_BACKOFF_LIMIT,
    LOOK_AGAIN,
    SATURATED_LOOK,
    STEADY_LOOK,
    YOUNG,
    Decision,
    Memory,
    Tired,
    View,
    backoff,
    decide,
    fork_backoff,
    released,
    returning,
    rooms,
)

SPARE = 10.0
# select(2) never wakes early; this is how late the simulated master is.
LATE = 0.00002
EPSILON = 1e-6


def view(target: int, idle: int, **more: Any) -> View:
    """A look at a listener with plenty of room."""
    return View(**{"target": target, "idle": idle, "starting": 0, "returning": 0, "busy": 0, "room": 100, **more})


# -- examples


@pytest.mark.parametrize(
    ("seen", "tired", "leave"),
    [
        (view(4, 0), Tired(idle=4), Tired()),  # nobody has come in their place yet
        (view(4, 1), Tired(idle=4), Tired(idle=1)),
        (view(4, 4), Tired(idle=4), Tired(idle=4)),
        (view(4, 3, returning=1), Tired(idle=1), Tired(idle=1)),  # one that is about to be back is as good as here
        (view(4, 4), Tired(idle=1, busy=2), Tired(idle=1, busy=2)),
        (view(4, 3), Tired(busy=1), Tired()),  # its replacement starts
        (view(4, 9), Tired(idle=2), Tired(idle=2)),  # a burst has left more than enough
        (view(4, 4), Tired(), Tired()),
        (view(4, 3), Tired(waiting=1), Tired()),
        (view(4, 0), Tired(waiting=3, busy=2), Tired(waiting=1)),
        # A replacement that serves a client already has come all the same.
        (view(4, 0, come=2, busy=4), Tired(waiting=1, busy=2), Tired(waiting=1, busy=1)),
        (view(4, 0, come=9, busy=9), Tired(idle=1, waiting=1, busy=1), Tired(waiting=1, busy=1)),
    ],
)
def test_tired_workers_leave_as_others_come_in_their_place(seen: View, tired: Tired, leave: Tired) -> None:
    assert released(seen, tired) == leave


def test_at_the_ceiling_a_tired_worker_makes_room_for_its_replacement() -> None:
    full = view(4, 0, tired=4, room=0)
    assert released(full, Tired(idle=4, busy=2)) == Tired(idle=1)
    assert released(full, Tired(idle=4, waiting=1, busy=2)) == Tired(waiting=1), "one that accepts nothing is missed least"
    assert released(view(4, 0, room=0), Tired(busy=3)) == Tired(busy=1), "one that is busy will do, when all are"
    assert released(view(4, 0, room=0, starting=1), Tired(idle=3)) == Tired()
    assert released(view(4, 0, leaving=1, room=0), Tired(idle=3, busy=2)) == Tired(), "one is on its way already"
    memory, _ = decide(Memory(), full, 1.0, SPARE)
    assert not memory.at_ceiling, "a replacement comes for each"
    memory, _ = decide(Memory(), view(4, 0, tired=3, leaving=1, room=0), 1.0, SPARE)
    assert not memory.at_ceiling, "room is being made"
    memory, _ = decide(Memory(), view(4, 0, tired=3, busy=1, room=0), 1.0, SPARE)
    assert (memory.at_ceiling, memory.saturated) == (True, False), "those that are to be recycled accept"


@given(
    target=st.integers(1, 20),
    idle=st.integers(0, 40),
    returning=st.integers(0, 20),
    tired=st.builds(Tired, st.integers(0, 20), st.integers(0, 20), st.integers(0, 20)),
    come=st.integers(0, 20),
)
def test_recycling_never_leaves_fewer_acceptors_than_it_found_or_than_are_wanted(
    target: int, idle: int, returning: int, tired: Tired, come: int
) -> None:
    may = released(view(target, idle, returning=returning, come=come), tired)
    assert min(may.idle, may.waiting, may.busy) >= 0
    assert may.idle <= tired.idle
    assert may.waiting <= tired.waiting
    assert may.busy <= tired.busy
    assert idle + returning + tired.idle - may.idle >= min(target, idle + returning + tired.idle)
    if idle >= target:
        assert may == tired, "no recycled worker waits when nobody is missing"
    assert may.waiting == tired.waiting or not may.busy, "who waits goes before who serves"


def test_a_pool_that_starts_is_filled_at_once() -> None:
    _, decision = decide(Memory(), view(8, 0, vacated=8), 1.0, SPARE)
    assert decision.fork == 8


def test_a_blocked_worker_is_replaced_at_the_second_look() -> None:
    blocked = view(4, 3, busy=1)
    memory, first = decide(Memory(), blocked, 1.0, SPARE)
    assert first == Decision(fork=0, retire=0, look_at=1.0 + LOOK_AGAIN, ring_below=0)
    _, second = decide(memory, blocked, 1.0 + LOOK_AGAIN + LATE, SPARE)
    assert second.fork == 1


def test_of_two_looks_the_smaller_shortage_is_forked_and_the_rest_a_look_later() -> None:
    memory, _ = decide(Memory(), view(4, 3, busy=1), 1.0, SPARE)
    memory, second = decide(memory, view(4, 0, busy=4), 1.004, SPARE)
    _, third = decide(memory, view(4, 0, starting=1, busy=4), 1.008, SPARE)
    assert (second.fork, third.fork) == (1, 3)


def test_a_worker_that_computes_and_then_blocks_is_replaced_without_any_further_event() -> None:
    memory, first = decide(Memory(), view(4, 3, busy=1, returning=1), 1.0, SPARE)
    memory, second = decide(memory, view(4, 3, busy=1), 1.004, SPARE)
    _, third = decide(memory, view(4, 3, busy=1), 1.008, SPARE)
    assert (first.fork, second.fork, third.fork) == (0, 0, 1)
    assert first.look_at is not None
    assert second.look_at is not None


def test_a_look_forced_early_is_not_the_second_look_and_does_not_put_it_off() -> None:
    blocked = view(4, 3, busy=1)
    memory, _ = decide(Memory(), blocked, 1.0, SPARE)
    memory, early = decide(memory, blocked, 1.001, SPARE)
    assert early == Decision(fork=0, retire=0, look_at=1.0 + LOOK_AGAIN, ring_below=0)
    assert decide(memory, blocked, 1.0 + LOOK_AGAIN + LATE, SPARE)[1].fork == 1


@given(at=st.floats(0.0, 1e7))
def test_a_master_that_looks_exactly_on_time_gets_its_second_look(at: float) -> None:
    blocked = view(4, 3, busy=1)
    memory, first = decide(Memory(), blocked, at, SPARE)
    assert first.look_at is not None
    assert decide(memory, blocked, first.look_at, SPARE)[1].fork == 1


def test_a_dead_worker_is_replaced_at_once_even_between_two_looks() -> None:
    memory, _ = decide(Memory(), view(4, 3, busy=1), 1.0, SPARE)
    _, decision = decide(memory, view(4, 2, busy=1, vacated=1), 1.001, SPARE)
    assert decision.fork == 1


def test_a_death_that_leaves_enough_acceptors_forks_nobody() -> None:
    assert decide(Memory(), view(4, 4, vacated=1), 1.0, SPARE)[1].fork == 0


def test_at_the_ceiling_nobody_is_forked_and_looks_come_ever_more_seldom() -> None:
    memory, now, waits = Memory(), 1.0, []
    for _ in range(12):
        memory, decision = decide(memory, view(4, 0, busy=4, room=0, vacated=2), now, SPARE)
        assert (decision.fork, decision.retire, decision.ring_below, memory.saturated) == (0, 0, 0, True)
        assert decision.look_at is not None
        waits.append(decision.look_at - now)
        now = decision.look_at
    assert waits == pytest.approx([min(SATURATED_LOOK, LOOK_AGAIN * 2**look) for look in range(12)])


def test_at_the_ceiling_the_accept_that_takes_the_last_acceptor_rings_once_looks_are_rare() -> None:
    memory, now, rings = Memory(), 1.0, []
    for _ in range(8):
        memory, decision = decide(memory, view(4, 3, busy=1, room=0), now, SPARE)
        assert (memory.at_ceiling, memory.saturated) == (True, False)
        assert decision.look_at is not None
        rings.append(decision.ring_below)
        now = decision.look_at
    assert rings == [0, 0, 0, 0, 0, 1, 1, 1]
    memory, decision = decide(memory, view(4, 0, busy=4, room=0), now - 0.1, SPARE)
    assert (memory.saturated, decision.ring_below) == (True, 0)
    assert decision.look_at == pytest.approx(now - 0.1 + STEADY_LOOK)


@pytest.mark.parametrize(
    ("seen", "clients_wait"),
    [
        (view(4, 0, busy=4, room=0), True),
        (view(4, 1, busy=3, room=0), False),
        (view(4, 1, busy=3, room=0, waiting=5), False),  # the next look tells
        (view(4, 0, tired=1, busy=3, room=0), False),
        (view(4, 0, busy=4, returning=4, room=0), False),
        (view(4, 0, busy=4, returning=4, room=0, waiting=4), False),
        (view(4, 0, busy=4, returning=4, room=0, waiting=60), True),  # computing without an end
        (view(4, 0, busy=3, starting=1, room=0), False),
        (view(4, 0, busy=3, leaving=1, room=0), False),
        (view(4, 0, busy=3, leaving=1, room=0, waiting=2), True),
    ],
)
def test_saturated_is_no_acceptor_left_and_more_clients_than_are_about_to_be_served(seen: View, clients_wait: bool) -> None:
    memory, _ = decide(Memory(), seen, 1.0, SPARE)
    assert memory.saturated == clients_wait
    assert memory.at_ceiling or not clients_wait


def test_busy_workers_that_are_about_to_be_back_are_no_ceiling() -> None:
    memory, _ = decide(Memory(), view(4, 0, busy=4, returning=4, room=0), 1.0, SPARE)
    assert not memory.at_ceiling


def test_workers_that_start_are_not_forked_again() -> None:
    memory, _ = decide(Memory(), view(4, 1, starting=3), 1.0, SPARE)
    assert decide(memory, view(4, 1, starting=3), 1.004, SPARE)[1].fork == 0


def test_who_takes_an_acceptor_below_the_target_rings_even_while_others_start() -> None:
    # Three of five have started, four are wanted: the accept that leaves one idle makes somebody missing.
    assert decide(Memory(), view(4, 3, starting=2), 1.0, SPARE)[1].ring_below == 2
    # Of four two have: each accept does, and what is asked for now will be right when all have started.
    assert decide(Memory(), view(4, 2, starting=2), 1.0, SPARE)[1].ring_below == 4


def test_surplus_that_was_not_needed_for_a_whole_window_goes() -> None:
    memory, first = decide(Memory(), view(2, 9), 1.0, SPARE)
    assert (first.retire, first.look_at) == (0, 1.0 + SPARE)
    _, second = decide(memory, view(2, 9), 1.0 + SPARE, SPARE)
    assert second.retire == 7


@given(spare_timeout=st.floats(1e-9, 1), idle=st.integers(3, 9), busy=st.integers(0, 5))
def test_surplus_is_not_looked_for_without_a_pause_however_short_the_time_is(spare_timeout: float, idle: int, busy: int) -> None:
    memory, now, looks = Memory(), 0.0, 0
    while now < 10.0:
        memory, decision = decide(memory, view(2, idle, busy=busy, room=50), now, spare_timeout)
        looks += 1
        assert looks <= 102
        assert decision.look_at is not None
        assert decision.look_at > now
        now = decision.look_at


def test_surplus_that_was_needed_for_a_moment_stays_for_another_window() -> None:
    memory, first = decide(Memory(), view(2, 9), 1.0, SPARE)
    assert first.ring_below == 9, "the accept that leaves 8 has to be heard of"
    memory, _ = decide(memory, view(2, 2, busy=7), 3.0, SPARE)
    memory, second = decide(memory, view(2, 9), 1.0 + SPARE, SPARE)
    assert second.retire == 0
    assert decide(memory, view(2, 9), 1.0 + 2 * SPARE, SPARE)[1].retire == 7


def test_busy_surplus_is_looked_at_again_without_any_event() -> None:
    # No event tells that 7 handlers are done; without a look they would stay for ever.
    assert decide(Memory(), view(2, 2, busy=7), 1.0, SPARE)[1].look_at == 1.0 + SPARE


def steady(idle_at_looks: list[int]) -> tuple[Memory, float, list[float], list[int]]:
    """Looks at a load that blocks nobody: what is remembered, the time, how long after each look the next came, and who rang."""
    memory, now, waits, rings = Memory(), 1.0, [], []
    for idle in idle_at_looks:
        memory, decision = decide(memory, view(8, idle, busy=8 - idle, returning=8 - idle, accepted=True), now, SPARE)
        assert decision.look_at is not None
        assert decision.fork == 0
        waits.append(decision.look_at - now)
        rings.append(decision.ring_below)
        now = decision.look_at
    return memory, now, waits, rings


def test_looks_at_a_load_that_blocks_nobody_come_ever_more_seldom_and_end_with_it() -> None:
    memory, now, waits, rings = steady([7, 8, 6, 8, 7, 8, 1, 7, 8])
    doubled = [LOOK_AGAIN * 2**look for look in range(8)]
    assert waits == pytest.approx([*doubled, CALM_LOOK])
    assert doubled[-1] == pytest.approx(CALM_LOOK)
    assert rings == [0, 0, 0, 0, 0, 4, 1, 3, 4], "after STEADY_LOOK an accept that leaves fewer than half of the idle ones"
    assert decide(memory, view(8, 8), now, SPARE) == (Memory(), Decision(fork=0, retire=0, look_at=None, ring_below=8))


def test_where_nobody_is_idle_looks_do_not_become_so_rare_that_somebody_has_to_ring() -> None:
    _, _, waits, rings = steady([0] * 9)
    assert waits[-2:] == pytest.approx([STEADY_LOOK, STEADY_LOOK])
    assert rings == [0] * 9
    _, _, waits, rings = steady([8] * 9 + [0])
    assert waits[-1] == pytest.approx(STEADY_LOOK)
    assert rings[-1] == 0


def test_who_rings_in_a_calm_load_has_it_looked_at_more_often_again_and_rings_only_once() -> None:
    memory, now, waits, _ = steady([8] * 8)
    assert waits[-1] == pytest.approx(CALM_LOOK)
    rung_at = now - CALM_LOOK / 2
    memory, decision = decide(memory, view(8, 3, busy=5, returning=5, accepted=True), rung_at, SPARE)
    assert decision.look_at == pytest.approx(rung_at + STEADY_LOOK)
    assert decision.ring_below == 0
    _, decision = decide(memory, view(8, 8, accepted=True), rung_at + STEADY_LOOK, SPARE)
    assert decision.ring_below == 4


def test_in_a_calm_load_acceptors_that_block_are_missed_once_fewer_than_half_are_left() -> None:
    memory, now, _, rings = steady([8] * 8)
    assert rings[-1] == 4
    # The fifth that blocks rings.
    memory, first = decide(memory, view(8, 3, busy=5, accepted=True), now - CALM_LOOK / 2, SPARE)
    assert first.look_at is not None
    assert first.look_at == pytest.approx(now - CALM_LOOK / 2 + LOOK_AGAIN)
    assert decide(memory, view(8, 3, busy=5), first.look_at, SPARE)[1].fork == 5


def test_in_a_steady_load_a_worker_that_blocks_is_replaced_two_looks_later() -> None:
    memory = Memory(wait=STEADY_LOOK)
    memory, first = decide(memory, view(8, 7, busy=1), 1.0, SPARE)
    assert first.look_at == 1.0 + LOOK_AGAIN
    assert decide(memory, view(8, 7, busy=1), first.look_at, SPARE)[1].fork == 1


@pytest.mark.parametrize(
    ("runnable", "fresh", "asleep", "back"),
    [(3, 0, 5, 3), (0, 1, 0, 1), (0, 6, 2, 6), (0, 2, 6, 0), (1, 3, 4, 1), (2, 3, 3, 5)],
)
def test_fresh_workers_are_about_to_be_back_unless_most_are_found_asleep(runnable: int, fresh: int, asleep: int, back: int) -> None:
    assert returning(runnable, fresh, asleep) == back


def test_the_places_of_the_dead_are_filled_and_the_next_accept_rings_without_another_look() -> None:
    assert decide(Memory(), view(8, 6, vacated=2), 1.0, SPARE) == (Memory(), Decision(fork=2, retire=0, look_at=None, ring_below=8))
    # Somebody else is missing, too, or may come back: that takes looks.
    for seen in (view(8, 5, vacated=2), view(8, 6, busy=1, returning=1, vacated=2), view(8, 6, vacated=2, room=1)):
        decision = decide(Memory(), seen, 1.0, SPARE)[1]
        assert (decision.look_at is not None, decision.fork) == (True, 2 if seen.idle == 5 else 1)


def test_a_death_among_more_workers_than_wanted_does_not_end_their_window() -> None:
    memory, _ = decide(Memory(), view(2, 4, busy=1), 1.0, SPARE)
    memory, decision = decide(memory, view(2, 1, busy=3, vacated=1), 2.0, SPARE)
    assert (decision.fork, decision.look_at) == (1, 1.0 + SPARE)
    assert decide(memory, view(2, 4), 1.0 + SPARE, SPARE)[1].retire == 0, "one idle worker was all there was in this window"


def test_a_pool_at_rest_is_left_alone() -> None:
    assert decide(Memory(), view(4, 4), 1.0, SPARE) == (Memory(), Decision(fork=0, retire=0, look_at=None, ring_below=4))


@given(
    clients=st.integers(1, 20),
    target=st.integers(1, 10),
    times=st.lists(st.floats(0.0001, YOUNG - 0.004), min_size=20, max_size=60),
)
def test_a_steady_load_that_never_blocks_forks_nobody(clients: int, target: int, times: list[float]) -> None:
    daemon = Daemon([target], 1000)
    daemon.be_ready()
    pool = daemon.pools[0]
    for seconds in times:  # each round: as many clients as can be are served, at the same time
        for _ in range(min(clients, pool.count("idle"))):
            daemon.accept(pool, runnable=True)
        daemon.elapse(seconds)
        for worker in pool.of("busy"):
            daemon.finish(pool, worker)
    assert len(pool.workers) == target


# -- rooms and back-off

limits = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 40)), min_size=1, max_size=5)


@given(limits=limits, elsewhere=st.integers(0, 200), spare=st.integers(0, 50))
def test_a_generation_may_always_have_its_targets(limits: list[tuple[int, int]], elsewhere: int, spare: int) -> None:
    targets, live = [list(each) for each in zip(*limits, strict=True)]
    for room, target, used in zip(rooms(sum(targets) + spare, targets, live, elsewhere), targets, live, strict=True):
        assert room >= target - used


@given(limits=limits, spare=st.integers(0, 50))
def test_no_listener_can_take_a_place_that_another_ones_target_needs(limits: list[tuple[int, int]], spare: int) -> None:
    targets, live = [list(each) for each in zip(*limits, strict=True)]
    ceiling = sum(max(pair) for pair in limits) + spare  # a state that can be reached
    for place, room in enumerate(rooms(ceiling, targets, live, 0)):
        after = [used + (room if place == other else 0) for other, used in enumerate(live)]
        assert sum(max(pair) for pair in zip(targets, after, strict=True)) <= ceiling
        taken = sum(max(pair) for pair in zip(targets, live, strict=True)) - max(targets[place], live[place])
        assert after[place] == ceiling - taken, "no place that nobody needs is withheld"


def test_a_listener_full_of_long_connections_leaves_the_other_its_acceptors() -> None:
    assert rooms(10, [2, 2], [8, 0], 0) == [0, 2]
    assert rooms(10, [2, 2], [2, 2], 0) == [6, 6]


def test_a_reload_gets_through_however_many_old_workers_hold_connections() -> None:
    assert rooms(10, [2, 2], [0, 0], 10) == [2, 2]


def test_the_back_off_grows_up_to_its_limit_and_never_overflows() -> None:
    waits = [backoff(failures) for failures in (1, 2, 3, 5, 8, 9, 100, 10**9)]
    assert waits[:3] == [1.5, 2.25, 3.375]
    assert waits == sorted(waits)
    assert waits[-1] == BACKOFF_LIMIT


def test_a_fork_is_tried_again_within_a_second() -> None:
    waits = [fork_backoff(failures) for failures in (1, 2, 3, 5, 6, 100, 10**9)]
    assert waits[:3] == pytest.approx([0.15, 0.225, 0.3375])
    assert waits == sorted(waits)
    assert waits[4] == waits[-1] == FORK_BACKOFF_LIMIT == 1.0


# -- the simulation


@dataclass(eq=False)
class Worker:
    """A worker process: starting, idle, busy or leaving."""

    state: str = "starting"
    since: float = 0.0
    runnable: bool = False


@dataclass
class SimulatedPool:
    """One listener's workers, what its master remembers, and what the checks need to know of the past."""

    target: int
    workers: list[Worker] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)
    look_at: float | None = None
    ring_below: int = 0
    vacated: int = 0
    accepted: bool = False  # somebody was, since the last look
    room: int = 0  # at the last look
    looks: list[tuple[float, int]] = field(default_factory=list)  # when, and how many were still wanted after it
    idle_was: list[tuple[float, int]] = field(default_factory=list)

    def of(self, state: str) -> list[Worker]:
        return [worker for worker in self.workers if worker.state == state]

    def count(self, state: str) -> int:
        return len(self.of(state))

    @property
    def missing(self) -> int:
        return self.target - self.count("idle") - self.count("starting")

    def fewest_idle_since(self, at: float) -> int:
        """The fewest idle workers at any moment since then."""
        before = [idle for when, idle in self.idle_was if when <= at][-1:]
        return min(before + [idle for when, idle in self.idle_was if when > at])


class Daemon:
    """A master with a clock that only `elapse` moves. It checks its decisions as it carries them out."""

    def __init__(self, targets: list[int], max_workers: int) -> None:
        self.now = 1000.0
        self.max_workers = max_workers
        self.pools = [SimulatedPool(target, vacated=target) for target in targets]
        for pool in self.pools:
            self.note(pool)
            self.look(pool)

    def live(self) -> int:
        return sum(len(pool.workers) for pool in self.pools)

    def note(self, pool: SimulatedPool) -> None:
        pool.idle_was = [*pool.idle_was[-500:], (self.now, pool.count("idle"))]

    def returning(self, pool: SimulatedPool) -> int:
        return sum(worker.runnable and self.now - worker.since < YOUNG for worker in pool.of("busy"))

    def look(self, pool: SimulatedPool) -> None:
        live = [len(each.workers) for each in self.pools]
        pool.room = rooms(self.max_workers, [each.target for each in self.pools], live, 0)[self.pools.index(pool)]
        idle, starting, busy = (pool.count(state) for state in ("idle", "starting", "busy"))
        back = self.returning(pool)
        counts = {"starting": starting, "returning": back, "busy": busy, "room": pool.room, "vacated": pool.vacated}
        seen = view(pool.target, idle, accepted=pool.accepted, **counts)
        pool.memory, decision = decide(pool.memory, seen, self.now, SPARE)
        self.check_forks(pool, seen, decision)
        assert not pool.memory.saturated or (idle == 0 and pool.room <= 0), "the next client is served at once"
        assert pool.memory.at_ceiling or pool.room > 0 or pool.missing <= back, "somebody is missing, and nobody can be forked"
        assert decision.retire == 0 or idle - decision.retire >= pool.target
        assert decision.retire <= max(0, pool.fewest_idle_since(self.now - SPARE + EPSILON) - pool.target), "they were needed"
        pool.vacated, pool.accepted, pool.look_at, pool.ring_below = 0, False, decision.look_at, decision.ring_below
        pool.workers += [Worker() for _ in range(decision.fork)]
        for worker in pool.of("idle")[: decision.retire]:
            worker.state = "leaving"
        self.note(pool)

    def check_forks(self, pool: SimulatedPool, seen: View, decision: Decision) -> None:
        if decision.fork:
            assert decision.fork <= seen.room
            assert seen.idle + seen.starting + seen.returning + decision.fork <= pool.target, "somebody is about to be back"
        if decision.fork > seen.vacated:
            earlier = [wanted for at, wanted in pool.looks if at <= self.now - LOOK_AGAIN + EPSILON][-1:]
            since = [wanted for at, wanted in pool.looks if at > self.now - LOOK_AGAIN + EPSILON]
            assert earlier, "no look before this one"
            assert decision.fork <= min(earlier + since), "wanted at this look only"
        wanted = max(0, pool.missing - seen.returning)
        if seen.room > 0:
            assert decision.fork >= min(seen.vacated, wanted, seen.room), "a place known to be empty is filled at once"
        pool.looks = [*pool.looks[-50:], (self.now, wanted - decision.fork)]

    # -- what happens

    def elapse(self, seconds: float) -> None:
        """Let time pass, with the looks that are due."""
        end = self.now + seconds
        while due := [pool for pool in self.pools if pool.look_at is not None and pool.look_at + LATE <= end]:
            pool = min(due, key=lambda each: each.look_at or 0.0)
            assert pool.look_at is not None
            self.now = max(self.now, pool.look_at + LATE)
            self.look(pool)
        self.now = end

    def accept(self, pool: SimulatedPool, *, runnable: bool, which: int = 0) -> None:
        idle = pool.of("idle")
        worker = idle[which % len(idle)]
        worker.state, worker.since, worker.runnable, pool.accepted = "busy", self.now, runnable, True
        self.note(pool)
        if pool.count("idle") < pool.ring_below:
            self.look(pool)

    def finish(self, pool: SimulatedPool, worker: Worker) -> None:
        worker.state = "idle"  # and nobody is told
        self.note(pool)

    def ready(self, pool: SimulatedPool, worker: Worker) -> None:
        worker.state = "idle"
        self.note(pool)
        self.look(pool)

    def end(self, pool: SimulatedPool, worker: Worker) -> None:
        pool.workers.remove(worker)
        pool.vacated += worker.state != "leaving"
        self.note(pool)
        self.look(pool)

    def be_ready(self) -> None:
        """Everybody who starts has started, everybody who leaves has left."""
        for pool in self.pools:
            for worker in pool.of("leaving"):
                self.end(pool, worker)
            for worker in pool.of("starting"):
                self.ready(pool, worker)


indices = st.integers(0, 1000)


class DaemonMachine(RuleBasedStateMachine):
    """Two listeners under one ceiling, and whatever workers and clients do to them."""

    daemon: Daemon

    @initialize(first=st.integers(1, 6), second=st.integers(1, 6), spare=st.integers(0, 20))
    def start(self, first: int, second: int, spare: int) -> None:
        self.daemon = Daemon([first, second], first + second + spare)

    def pool(self, index: int, state: str) -> SimulatedPool | None:
        """One of the listeners that have a worker in this state."""
        pools = [pool for pool in self.daemon.pools if pool.of(state)]
        return pools[index % len(pools)] if pools else None

    def some(self, state: str) -> bool:
        return self.pool(0, state) is not None

    @precondition(lambda self: self.some("idle"))
    @rule(index=indices, times=st.integers(1, 8), runnable=st.booleans())
    def clients_come(self, index: int, times: int, runnable: bool) -> None:
        pool = self.pool(index, "idle")
        assert pool is not None
        for _ in range(min(times, pool.count("idle"))):
            if pool.of("idle"):
                self.daemon.accept(pool, runnable=runnable, which=index)

    @precondition(lambda self: self.some("busy"))
    @rule(index=indices, runnable=st.booleans())
    def a_handler_blocks_or_computes(self, index: int, runnable: bool) -> None:
        pool = self.pool(index, "busy")
        assert pool is not None
        pool.of("busy")[index % pool.count("busy")].runnable = runnable

    @precondition(lambda self: self.some("busy"))
    @rule(index=indices, times=st.integers(1, 8))
    def handlers_return(self, index: int, times: int) -> None:
        pool = self.pool(index, "busy")
        assert pool is not None
        for worker in pool.of("busy")[:times]:
            self.daemon.finish(pool, worker)

    @precondition(lambda self: self.some("starting"))
    @rule(index=indices)
    def a_worker_is_ready(self, index: int) -> None:
        pool = self.pool(index, "starting")
        assert pool is not None
        self.daemon.ready(pool, pool.of("starting")[0])

    @rule()
    def all_are_ready(self) -> None:
        self.daemon.be_ready()

    @rule(index=indices)
    def a_worker_dies_or_leaves(self, index: int) -> None:
        pool = self.daemon.pools[index % len(self.daemon.pools)]
        if pool.workers:
            self.daemon.end(pool, pool.workers[index % len(pool.workers)])

    @rule(index=indices)
    def somebody_makes_the_master_look(self, index: int) -> None:
        self.daemon.look(self.daemon.pools[index % len(self.daemon.pools)])

    @rule(seconds=st.sampled_from([0.0005, 0.001, LOOK_AGAIN, 0.02, 0.06, 1.1, SPARE / 2, SPARE + 0.1]))
    def time_passes(self, seconds: float) -> None:
        self.daemon.elapse(seconds)

    @rule(index=indices)
    def all_handlers_block_and_acceptors_are_back_within_three_looks(self, index: int) -> None:
        pool = self.daemon.pools[index % len(self.daemon.pools)]
        for worker in pool.of("busy"):
            worker.runnable = False
        for _ in range(3):
            if pool.missing > 0:
                assert pool.look_at is not None
                self.daemon.elapse(max(0.0, pool.look_at - self.daemon.now) + LATE * 2)
        assert pool.missing <= 0 or pool.room <= 0

    @rule()
    def it_grows_quiet_and_surplus_is_gone_within_two_windows(self) -> None:
        for pool in self.daemon.pools:
            for worker in pool.of("busy"):
                self.daemon.finish(pool, worker)
        self.daemon.be_ready()
        self.daemon.elapse(2 * SPARE + 0.1)
        for pool in self.daemon.pools:
            assert pool.count("idle") + pool.count("starting") == pool.target

    @invariant()
    def never_more_than_the_ceiling(self) -> None:
        if hasattr(self, "daemon"):
            assert self.daemon.live() <= self.daemon.max_workers

    @invariant()
    def whoever_is_missing_is_looked_for_again(self) -> None:
        for pool in self.daemon.pools if hasattr(self, "daemon") else []:
            if pool.missing > 0:
                assert pool.look_at is not None
                blocked = pool.looks[-1][1] > 0
                steady = CALM_LOOK if pool.ring_below else STEADY_LOOK
                patience = SATURATED_LOOK if pool.room <= 0 else LOOK_AGAIN if blocked else steady
                assert pool.look_at - self.daemon.now <= patience + EPSILON

    @invariant()
    def the_next_accept_rings_unless_there_is_another_look(self) -> None:
        for pool in self.daemon.pools if hasattr(self, "daemon") else []:
            wanted = pool.target - pool.count("starting")  # who has started rings by itself
            assert pool.ring_below >= wanted or (pool.look_at is not None and pool.look_at - self.daemon.now <= SPARE)


TestDaemon = DaemonMachine.TestCase
TestDaemon.settings = settings(max_examples=300, stateful_step_count=40)
