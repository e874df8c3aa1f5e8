"""Kills: at most one client for each worker that is killed, and nobody for anything else."""

import signal
import statistics
import time
from functools import partial

import psutil

from prefork.testing import serve
from tests import watch
from tests.faults import strikes
from tests.faults.arena import AND_FULL, Arena, Fault, Figures, Rounds, arena, clients, figures_of_ends, note_end, serving

IMPORT_TAKES_A_SECOND = "import time\ntime.sleep(1)\n"
# The longest that a client may wait while such a fork server is replaced, and that what has to end with its master may take.
LONGEST_WAIT, LONGEST_END = 0.2, 1.0


def workers(rounds: Rounds, workload: str) -> Figures:
    """SIGKILL to a random worker, and its place is filled again."""
    restored = []
    # A ceiling: a slot that is not free again when its worker was reaped is missed soon.
    with arena(workload, workers=8, rounds=rounds, max_workers=24) as ring:
        for _ in rounds:
            strikes.kill_worker(ring)
            restored.append(_time_to_restore(ring))
            time.sleep(ring.chance.uniform(0, 0.02))  # at any moment of a connection
    return ring.figures | {"restored_median": round(statistics.median(restored), 4), "restored_worst": round(max(restored), 4)}


def _time_to_restore(ring: Arena) -> float:
    """Seconds until no victim is in the status and there are as many workers as wanted, idle or busy and about to be back."""
    begun = time.monotonic()

    def restored() -> bool:
        pids = [worker["pid"] for worker in watch.workers(ring.server, "idle", "busy")]
        return len(pids) >= ring.workers and not set(pids) & set(ring.victims[-1:])

    watch.until("the killed worker is replaced", restored)
    return time.monotonic() - begun


def _left(family: list[psutil.Process], most: int) -> bool:
    """Whether no more than so many of these processes are left."""
    return sum(not watch.is_gone(process.pid) for process in family) <= most


def segfaults(rounds: Rounds, workload: str) -> Figures:
    """A handler that runs into a segmentation fault takes its own connection with it and nobody else's."""
    with arena(workload, rounds=rounds) as ring:
        for _ in rounds:
            strikes.segfault(ring)
            assert all(not answered for answered in ring.own)
    return ring.figures


def fork_server(rounds: Rounds, workload: str) -> Figures:
    """SIGKILL, or SIGSEGV, to the fork server, whose import takes a second: its workers serve on, and nobody waits for it."""
    with arena(workload, rounds=rounds, first=IMPORT_TAKES_A_SECOND) as ring:
        for _ in rounds:
            # Without a fork server nobody can be forked: the acceptors have to last.
            generation = ring.recovered()["generation"]
            (strikes.segv_fork_server if rounds.done % 4 == 3 else strikes.kill_fork_server)(ring)
            ring.replaced(generation)
    assert ring.figures["worst"] < LONGEST_WAIT or not rounds.alone, ring.figures
    return ring.figures


def master(rounds: Rounds, workload: str) -> Figures:
    """SIGKILL, or SIGSEGV, to the master: idle processes go at once, busy ones after their connection, and the port is free."""
    figures = figures_of_ends(workload)
    idle_gone, all_gone, free = [0.0], [0.0], [0.0]
    for _ in rounds:
        with serve("echo:loop", workers=4) as server, clients(server.address, workload) as loads:
            serving(server, loads)
            held = [load for load in loads if load.held]
            family = watch.family(server.pid)
            # Busy workers and their fork server stay until the connections end.
            most = sum(load.clients + 1 for load in held)
            server.process.send_signal(signal.SIGSEGV if rounds.done % 4 == 3 else signal.SIGKILL)
            server.process.wait()
            begun = time.monotonic()
            watch.until("idle ones have gone", partial(_left, family, most))
            idle_gone.append(time.monotonic() - begun)
            watch.until("the port is free", partial(watch.is_free, server.address[1]))
            free.append(time.monotonic() - begun)
            note_end(figures, loads)
            begun = time.monotonic()
            watch.until("every process has gone", partial(_left, family, 0))
            all_gone.append(time.monotonic() - begun)
        took = idle_gone[-1], all_gone[-1], free[-1]
        assert max(took) < LONGEST_END or not rounds.alone, took
    longest = {"idle_gone": max(idle_gone), "all_gone": max(all_gone), "port_free": max(free)}
    return figures | {key: round(value, 3) for key, value in longest.items()}


FAULTS = {
    "killed_workers": Fault(workers, 1000, 30, AND_FULL),
    "segfaults": Fault(segfaults, 200, 3),
    "killed_fork_server": Fault(fork_server, 100),
    "killed_master": Fault(master, 20),
}
