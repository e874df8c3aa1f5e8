"""All faults by their names, and all strikes at random together. The suite, CI and ``python -m tests.faults`` run the same code
with other counts.
"""

import random
import time
from concurrent.futures import ThreadPoolExecutor

from tests.faults import hostile, kills, machine, stops, storms
from tests.faults.arena import Arena, Fault, Figures, Rounds, arena
from tests.faults.strikes import STRIKES, crashing_code

FAULTS: dict[str, Fault] = {**storms.FAULTS, **kills.FAULTS, **stops.FAULTS, **machine.FAULTS, **hostile.FAULTS}
# So many threads strike at once.
STRIKERS = 3


def together(seconds: float, seed: int, workload: str = "mixed") -> Figures:
    """All strikes, at random moments and several at a time, for so long."""
    deadline = time.monotonic() + seconds
    with arena(workload, workers=8, rounds=Rounds(0, seed=seed), boot_timeout=1.5) as ring:
        with ThreadPoolExecutor(STRIKERS) as pool:
            strikers = [pool.submit(_strike, ring, random.Random(seed + number), deadline) for number in range(STRIKERS)]
        for striker in strikers:
            striker.result()
    return ring.figures | {"count": len(ring.struck), "seed": seed}


def _strike(ring: Arena, chance: random.Random, deadline: float) -> None:
    # Without a canary, code that crashes would stay.
    strikes = [strike for strike in STRIKES.values() if strike is not crashing_code]
    while time.monotonic() < deadline:
        chance.choice(strikes)(ring)
        time.sleep(chance.choice((0.0, 0.01, 0.1)))
