"""Storms: what an operator may ask for, much too often: no client fails of it."""

import json
import signal
import tempfile
import time
from pathlib import Path

from prefork.testing import serve
from tests import watch
from tests.faults import strikes
from tests.faults.arena import (
    AND_FULL,
    Fault,
    Figures,
    Rounds,
    Strike,
    arena,
    clients,
    figures_of_ends,
    never_connected,
    note_end,
    serving,
)
from tests.load import Load


def steady(rounds: Rounds, workload: str) -> Figures:
    """A constant load, a second each: next to nobody is forked, and the pool does not inflate."""
    with arena(workload, workers=8, rounds=rounds, spare_timeout=2) as ring:
        time.sleep(1.0)
        early = ring.server.status()["totals"]["forked"]
        for _ in rounds:
            time.sleep(1.0)
        status = ring.server.status()
        ring.figures |= {
            "forks_after_first_second": status["totals"]["forked"] - early,
            "workers_under_load": len(status["workers"]),
        }
    return ring.figures


def reloads(rounds: Rounds, workload: str) -> Figures:
    """One SIGHUP after the other."""
    with arena(workload, rounds=rounds) as ring:
        for _ in rounds:
            generation = ring.generation()
            strikes.hup(ring)
            ring.replaced(generation)
    return ring.figures


def upgrades(rounds: Rounds, workload: str) -> Figures:
    """One upgrade after the other: the pid stays."""
    with arena(workload, rounds=rounds) as ring:
        for _ in rounds:
            generation = ring.generation()
            strikes.usr2(ring)
            ring.replaced(generation)
            watch.until("the upgrade has ended", lambda: ring.server.status()["state"] == "running")
    return ring.figures


def canaries(rounds: Rounds, workload: str) -> Figures:
    """Reloads to code that crashes, on trial: each takes itself back, at the cost of the connections that crashed."""
    with arena(workload, rounds=rounds, canary=60) as ring:
        for _ in rounds:
            strikes.crashing_code(ring)
            status = ring.recovered()
            assert status["reload"]["result"] == "rolled back", status["reload"]
    return ring.figures


def refused(rounds: Rounds, workload: str) -> Figures:
    """Reloads that are refused, because the import raises or hangs: the generation that serves stays."""
    with arena(workload, rounds=rounds, boot_timeout=1.5) as ring:
        generation = ring.generation()
        for number in rounds:
            (strikes.import_hangs if number % 2 else strikes.import_error)(ring)
        assert ring.generation() == generation
    return ring.figures


def hup_storm(rounds: Rounds, workload: str) -> Figures:
    """SIGHUP faster than anybody can reload."""
    return _storm(rounds, workload, strikes.hup)


def scaling(rounds: Rounds, workload: str) -> Figures:
    """TTIN and TTOU at random, faster than anybody can fork."""
    return _storm(rounds, workload, strikes.ttin, strikes.ttou)


def _storm(rounds: Rounds, workload: str, *signals: Strike) -> Figures:
    """Signals coalesce: nothing is said of how many of them were heard. Now and then a pause in which the daemon can follow."""
    with arena(workload, rounds=rounds) as ring:
        for number in rounds:
            ring.chance.choice(signals)(ring)
            time.sleep(ring.chance.choice((0.0, 0.001, 0.01)))
            if number % 50 == 0:
                ring.recovered()
    return ring.figures


def rotation(rounds: Rounds, workload: str) -> Figures:
    """The log is rotated, with a line for each connection: none is lost."""
    with arena(workload, rounds=rounds, logged=True) as ring:
        for _ in rounds:
            ring.rotate()
            watch.until("there is a new file", (ring.folder / "access").exists)
        ring.end_load()
        # A worker writes its line after it has counted.
        watch.until("a line for each connection", lambda: ring.accesses().count(" ok after ") >= ring.connections)
        lines = ring.accesses().count(" ok after ")
        assert lines == ring.connections, f"{lines} lines of {ring.connections} connections"
    return ring.figures


def recycling(rounds: Rounds, workload: str) -> Figures:
    """Workers are recycled after every ten connections or so; a round is a worker that has left."""
    with arena(workload, rounds=rounds, max_connections=10, max_connections_jitter=5) as ring:
        for number in rounds:
            watch.until("another one has left", lambda most=number: ring.server.status()["totals"]["exited"] > most)  # type: ignore[misc]
    return ring.figures


def spoilt(rounds: Rounds, workload: str) -> Figures:
    """Handlers that block or replace SIGTERM, leave an alarm, close every descriptor; then a reload: their workers leave."""
    with arena(workload, rounds=rounds) as ring:
        for _ in rounds:
            for _ in range(4):
                strikes.spoil_worker(ring)
            generation = ring.generation()
            strikes.hup(ring)
            ring.replaced(generation)
    return ring.figures


def addresses(rounds: Rounds, workload: str) -> Figures:
    """Reloads that add and remove an address, each a round, under load on the one that stays and on those that come and go."""
    elsewhere = {"connections": 0, "turned_away": 0}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prefork.toml"
        stays, comes = f"127.0.0.1:{watch.free_port()}", watch.free_port()
        others = [(f"127.0.0.1:{comes}", ("127.0.0.1", comes)), (f"unix:{folder}/socket", f"{folder}/socket")]
        file.write_text("bind = " + json.dumps([stays]))
        with arena(workload, workers=2, rounds=rounds, bind=[], arguments=("--config", str(file))) as ring:

            def reload(*addresses: str) -> None:
                file.write_text("bind = " + json.dumps(addresses))
                answer = ring.server.command("reload")
                assert answer["ok"], answer

            for number in rounds:
                text, address = others[number % 2]
                reload(stays, text)
                with Load(address, clients=1) as other:
                    watch.until("the other address serves", lambda other=other: other.connections > 3)  # type: ignore[misc]
                    reload(stays)
                ring.own += [True] * other.connections
                elsewhere["connections"] += other.connections
                elsewhere["turned_away"] += other.refused + len(never_connected(other))
    return ring.figures | {"elsewhere": elsewhere}


def graceful_stops(rounds: Rounds, workload: str) -> Figures:
    """Stops under full load: nobody whom the kernel had connected is cut; refused ones are counted apart."""
    figures = figures_of_ends(workload) | {"slowest_stop": 0.0}
    for _ in rounds:
        with (
            serve("echo:loop", workers=4) as server,
            clients(server.address, workload, timeout=watch.DEADLINE, connect_timeout=0.5) as loads,
        ):
            serving(server, loads)
            begun = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            watch.logged(server, "stopping")
            for load in loads:
                if load.held:
                    load.end_soon()
            assert server.process.wait(watch.DEADLINE) == 0
            figures["slowest_stop"] = max(figures["slowest_stop"], round(time.monotonic() - begun, 3))
            note_end(figures, loads)
            accepted = server.log().rpartition("stopped: ")[2].split()[0]
            answered = sum(load.connections for load in loads)
            assert int(accepted) == answered, f"{accepted} accepted, {answered} answered"
    return figures


FAULTS = {
    "steady": Fault(steady, 60, 2, AND_FULL),
    "reloads": Fault(reloads, 500, 10, AND_FULL),
    "upgrades": Fault(upgrades, 100, 2, AND_FULL),
    "canaries": Fault(canaries, 34, 2, ("short", "full", "mixed")),
    "hup_storm": Fault(hup_storm, 2000, 50, AND_FULL),
    "refused": Fault(refused, 100, 2, AND_FULL),
    "scaling": Fault(scaling, 2000, 100, AND_FULL),
    "rotation": Fault(rotation, 200, 5),
    "recycling": Fault(recycling, 1000, 100, ("short", "full", "mixed")),
    "spoilt": Fault(spoilt, 50, 2),
    "addresses": Fault(addresses, 100, 4),
    "graceful_stops": Fault(graceful_stops, 50, 3, AND_FULL),
}
