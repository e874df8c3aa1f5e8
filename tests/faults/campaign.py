"""All faults by their names, and all strikes on one daemon: at random and together (``python -m tests.faults``, by hand), or each
in its turn (CI).
"""

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from tests.faults import distance, hostile, kills, machine, mix, stops, storms
from tests.faults.arena import Arena, Fault, Figures, Rounds, Strike, arena

FAULTS: dict[str, Fault] = {**storms.FAULTS, **kills.FAULTS, **stops.FAULTS, **machine.FAULTS, **hostile.FAULTS, **distance.FAULTS}
# So many threads strike at once.
STRIKERS = 4
# Acceptors may be missing for long when a fork server could not be replaced several times in a row.
PATIENCE = 60.0


def together(seconds: float, seed: int, workload: str | None = None) -> Figures:
    """All strikes, at random moments and several at a time, for so long. The load is the seed's unless it is given.

    But for the master's SIGKILL, after which there is no daemon any more (`tests.faults.kills.master`).
    """
    return _struck(seed, lambda ring, strikes: _strike_at_random(ring, strikes, seconds, seed), workload, alone=True)


def in_turn(seed: int) -> Figures:
    """Each strike once, the daemon recovered before the next one. The seed says which daemon it is; nothing else is left to it."""
    return _struck(seed, _strike_in_turn)


def _struck(
    seed: int, strike: Callable[[Arena, list[Strike]], None], workload: str | None = None, *, alone: bool = False
) -> Figures:
    with mix.prepared(seed, workload) as preparation:
        kind = {"seed": seed, "exact": preparation.exact, "log": preparation.log, "left_out": preparation.left_out}
        with arena(
            preparation.workload,
            rounds=Rounds(0, seed=seed, alone=alone),
            workers=mix.WORKERS,
            module=mix.MODULE,
            place=preparation.place,
            exact=preparation.exact,
            patience=PATIENCE,
            environment=preparation.environment,
            **preparation.options,
        ) as ring:
            ring.figures |= kind
            for prepare in preparation.begin:
                prepare(ring)
            strike(ring, preparation.strikes)
            for finish in (*preparation.end, mix.permit_crashes, mix.tell_events):
                finish(ring)
    return ring.figures | {"count": len(ring.history), "overlapping": _overlapping(ring)}


def _strike_in_turn(ring: Arena, strikes: list[Strike]) -> None:
    for strike in sorted(strikes, key=lambda strike: strike.name):
        strike(ring)
        ring.recovered()


def _strike_at_random(ring: Arena, strikes: list[Strike], seconds: float, seed: int) -> None:
    deadline = time.monotonic() + seconds
    failed = threading.Event()

    def strike(chance: random.Random) -> None:
        # Each in its turn, in another order each time: none is left out for long.
        try:
            while True:
                for one in chance.sample(strikes, len(strikes)):
                    if failed.is_set() or time.monotonic() > deadline:
                        return
                    one(ring)
                    time.sleep(chance.choice((0.0, 0.01, 0.1)))
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(STRIKERS) as pool:
        strikers = [pool.submit(strike, random.Random(seed + number)) for number in range(STRIKERS)]
    for striker in strikers:
        striker.result()


def _overlapping(ring: Arena) -> int:
    """How many strikes have begun while another one was under way."""
    until, found = 0.0, 0
    for blow in sorted(ring.history):
        found += blow.begun < until
        until = max(until, blow.ended)
    return found
