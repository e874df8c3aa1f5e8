"""Stops: processes that somebody stops (SIGSTOP) and continues. Nobody fails of it, and nobody is punished for it."""

import os
import re
import signal
import time

from tests.faults import strikes
from tests.faults.arena import Arena, Fault, Figures, Rounds, Strike, arena

PUNISHED = re.compile(r".* (died|is killed|a new fork server).*")


def workers(rounds: Rounds, workload: str) -> Figures:
    """Workers are stopped and continued: they end what they were doing."""
    return _stopped(rounds, workload, strikes.stop_worker)


def fork_server(rounds: Rounds, workload: str) -> Figures:
    """The fork server is stopped and continued before the master's patience is over."""
    return _stopped(rounds, workload, strikes.stop_fork_server)


def _stopped(rounds: Rounds, workload: str, strike: Strike) -> Figures:
    with arena(workload, rounds=rounds) as ring:
        for _ in rounds:
            strike(ring)
        _nobody_was_punished(ring)
    return ring.figures


def fork_server_for_long(rounds: Rounds, workload: str) -> Figures:
    """The fork server is stopped for so long that the master replaces it."""
    with arena(workload, rounds=rounds) as ring:
        for _ in rounds:
            generation = ring.generation()
            strikes.stop_fork_server_for_long(ring)
            ring.replaced(generation)
    return ring.figures


def master(rounds: Rounds, workload: str) -> Figures:
    """The master is stopped for so many seconds, in the middle of a reload and while connections of the last one drain: longer
    than either may take, and none of that time counts.
    """
    with arena(workload, rounds=rounds, boot_timeout=1.5, drain_timeout=rounds.count - 1) as ring:
        generation = ring.generation()
        strikes.hup(ring)
        ring.replaced(generation)
        strikes.hup(ring)
        # The second answer comes after the signal was obeyed. A master that had not heard it would sleep until the drain's end, as
        # planned, whether it is stopped or not.
        for _ in range(2):
            ring.server.status()
        os.kill(ring.server.pid, signal.SIGSTOP)
        for _ in rounds:
            time.sleep(1.0)
        os.kill(ring.server.pid, signal.SIGCONT)
        ring.replaced(generation + 1)
        assert ring.generation() == generation + 2
        _nobody_was_punished(ring)
    return ring.figures


def _nobody_was_punished(ring: Arena) -> None:
    ring.recovered()
    found = PUNISHED.search(ring.log())
    assert found is None, found[0]


FAULTS = {
    "stopped_workers": Fault(workers, 60),
    "stopped_fork_server": Fault(fork_server, 60),
    "stopped_fork_server_for_long": Fault(fork_server_for_long, 15),
    "stopped_master": Fault(master, 120, 4),
}
