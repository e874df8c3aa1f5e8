"""The faults, each against a daemon under load whose clients are counted. One function each, used with small counts by the
suite and with full counts by ``python -m tests.faults``. Each returns its figures and raises AssertionError when a promise
does not hold.
"""

import json
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from prefork.testing import Server, serve
from tests import watch
from tests.load import Load

Figures = dict[str, Any]
HANDLERS = Path(__file__).parents[1] / "handlers"


def _balance(server: Server, load: Load, figures: Figures, kills: int = 0, elsewhere: int = 0) -> None:
    """What the clients counted is what the daemon counted, once all is quiet."""
    totals = watch.quiet(server)
    figures |= {"connections": load.connections, "failures": load.classes, "worst": load.worst, "totals": totals}
    assert watch.identity_holds(totals), totals
    failures = len(load.failures)
    assert failures <= kills, f"{load.classes} with {kills} kills"
    if kills == 0:
        assert totals["accepted"] == totals["ok"] == load.connections + elsewhere, (totals, load.connections, elsewhere)
    else:
        assert load.connections <= totals["accepted"] <= load.connections + failures, (totals, load.connections, failures)
    assert load.refused == 0, f"{load.refused} refused"


def _machine(server: Server) -> Figures:
    """Descriptors and memory of master and workers."""
    pids = [w["pid"] for w in watch.workers(server, "idle", "busy")]
    shares = [watch.pss_kib(pid) for pid in pids]
    return {
        "workers": len(pids),
        "processes": len(watch.family(server.pid)) + 1,
        "master_fds": len(watch.descriptors(server.pid)),
        "worker_fds": sorted({len(watch.descriptors(pid)) for pid in pids}),
        "master_pss_kib": watch.pss_kib(server.pid),
        "worker_pss_kib": round(statistics.mean(shares)),
    }


def steady(seconds: float = 3.0, workers: int = 8) -> Figures:
    """A constant load of four clients in a closed loop: nobody is lost, next to nobody forked, the pool does not inflate."""
    figures: Figures = {}
    with serve("echo:loop", workers=workers, spare_timeout=max(2.0, seconds / 6)) as server:
        watch.settled(server, workers)
        figures["before"] = _machine(server)
        with Load(server.address, clients=4) as load:
            time.sleep(1.0)
            early = server.status()["totals"]["forked"]
            time.sleep(seconds)
            late = server.status()["totals"]["forked"]
            figures["forks_after_first_second"] = late - early
            figures["workers_under_load"] = len(watch.workers(server))
        _balance(server, load, figures)
        watch.settled(server, workers)
        figures["after"] = _machine(server)
        assert figures["after"]["master_fds"] == figures["before"]["master_fds"]
        assert figures["after"]["worker_fds"] == figures["before"]["worker_fds"]
    return figures


def reloads(count: int = 10, handler: str = "echo:loop") -> Figures:
    """One SIGHUP after the other under load: nobody is lost and nothing is left over."""
    figures: Figures = {}
    with serve(handler, workers=4, folder=HANDLERS, spare_timeout=1) as server:
        watch.settled(server, 4)
        figures["before"] = _machine(server)
        with Load(server.address, clients=4) as load:
            for generation in range(2, count + 2):
                os.kill(server.pid, signal.SIGHUP)
                watch.until(f"generation {generation}", partial(_at, server, generation))
        _balance(server, load, figures)
        watch.until("the old generations have gone", lambda: len(watch.family(server.pid)) == 5)
        watch.settled(server, 4)
        figures["after"] = _machine(server)
        assert figures["after"]["processes"] == figures["before"]["processes"], figures
        assert figures["after"]["master_fds"] == figures["before"]["master_fds"], figures
        assert figures["after"]["master_pss_kib"] < figures["before"]["master_pss_kib"] + 2048, figures
    return figures


def recycling(count: int = 100) -> Figures:
    """Workers that are recycled after every ten connections or so, under load: nobody is lost and nothing is left over."""
    figures: Figures = {}
    with serve("echo:loop", workers=4, max_connections=10, max_connections_jitter=5, spare_timeout=1) as server:
        watch.settled(server, 4)
        figures["before"] = _machine(server)
        with Load(server.address, clients=4) as load:
            watch.until("so many were recycled", lambda: server.status()["totals"]["exited"] >= count, deadline=20 + count / 10)
        _balance(server, load, figures)
        watch.settled(server, 4)
        figures["after"] = _machine(server)
        assert figures["after"]["processes"] == figures["before"]["processes"], figures
        assert figures["after"]["master_fds"] == figures["before"]["master_fds"], figures
    return figures


def addresses(count: int = 10) -> Figures:
    """So many reloads, each adding or removing an address, under load on the one that stays and on those that come and go."""
    figures: Figures = {"connections_elsewhere": 0, "turned_away_elsewhere": 0}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prefork.toml"
        stays, comes = f"127.0.0.1:{watch.free_port()}", watch.free_port()

        def reload(*addresses: str) -> None:
            file.write_text("bind = " + json.dumps(addresses))
            answer = server.command("reload")
            assert answer["ok"], answer

        file.write_text("bind = " + json.dumps([stays]))
        others = [(f"127.0.0.1:{comes}", ("127.0.0.1", comes)), (f"unix:{folder}/socket", f"{folder}/socket")]
        with serve("echo:loop", workers=2, bind=[], spare_timeout=1, arguments=("--config", str(file))) as server:
            watch.settled(server, 2)
            figures["before"] = _machine(server)
            with Load(server.address, clients=2) as load:
                for number in range(count // 2):
                    text, address = others[number % 2]
                    reload(stays, text)
                    with Load(address, clients=1) as other:
                        watch.until("the other address serves", lambda other=other: other.connections > 3)  # type: ignore[misc]
                        reload(stays)
                    # Who comes while an address is removed is refused, or turned away in the handshake: never connected.
                    lost = [kind for _, kind, _ in other.failures if not kind.startswith("connect")]
                    assert not lost, lost
                    figures["connections_elsewhere"] += other.connections
                    figures["turned_away_elsewhere"] += other.refused + len(other.failures)
            _balance(server, load, figures, elsewhere=figures["connections_elsewhere"])
            watch.until("the old generations have gone", lambda: len(watch.family(server.pid)) == 3)
            figures["after"] = _machine(server)
            assert figures["after"]["master_fds"] == figures["before"]["master_fds"], figures
    return figures


def _all_gone(pids: list[int]) -> bool:
    return all(map(watch.is_gone, pids))


def _at(server: Server, generation: int) -> bool:
    status = server.status()
    return bool(status["generation"] == generation and status["state"] == "running")


def kill_workers(count: int = 20, interval: float = 0.05, workers: int = 8, seed: int = 0) -> Figures:
    """SIGKILL to a random worker every 50 ms under load: at most one error for each kill, and the place is filled again."""
    figures: Figures = {"restored": []}
    chance = random.Random(seed)
    kills: list[float] = []
    with serve("echo:loop", workers=workers) as server:
        watch.settled(server, workers)
        figures["before"] = _machine(server)
        with Load(server.address, clients=4) as load:
            for _ in range(count):
                time.sleep(interval)
                victim = chance.choice([w["pid"] for w in watch.workers(server, "idle", "busy")])
                kills.append(time.monotonic())
                os.kill(victim, signal.SIGKILL)
                figures["restored"].append(_time_to_restore(server, victim, workers))
        _balance(server, load, figures, kills=count)
        for at, kind, _ in load.failures:
            assert any(kill <= at <= kill + load.timeout for kill in kills), f"{kind} without a kill"
        watch.until("every place is filled", lambda: server.status()["listeners"][0]["workers"]["idle"] >= workers)
        figures["after"] = _machine(server)
        assert figures["after"]["master_fds"] == figures["before"]["master_fds"], figures
    restored = figures.pop("restored")
    figures["restored_median"], figures["restored_worst"] = statistics.median(restored), max(restored)
    return figures


def _time_to_restore(server: Server, victim: int, workers: int) -> float:
    """Seconds until as many live workers as wanted are idle, or busy and about to be back."""
    begun = time.monotonic()

    def restored() -> bool:
        pids = [w["pid"] for w in server.status()["workers"] if w["state"] in ("idle", "busy")]
        return victim not in pids and len(pids) >= workers

    watch.until("the killed worker is replaced", restored)
    return time.monotonic() - begun


def kill_fork_server(count: int = 3) -> Figures:
    """SIGKILL to the fork server under load: its workers serve on until the next generation is ready; nobody is lost."""
    figures: Figures = {}
    with serve("slowimport:loop", workers=4, spare_timeout=1, folder=HANDLERS, environment={"IMPORT_SECONDS": "1"}) as server:
        watch.settled(server, 4)
        figures["before"] = _machine(server)
        with Load(server.address, clients=2, rate=1000) as load:
            for _ in range(count):
                generation = server.status()["generation"]
                os.kill(watch.fork_server(server), signal.SIGKILL)
                watch.until("a new fork server", partial(_at, server, generation + 1))
        _balance(server, load, figures)
        watch.until("the orphans have gone", lambda: len(watch.family(server.pid)) == 5)
        figures["after"] = _machine(server)
        assert figures["after"]["master_fds"] == figures["before"]["master_fds"], figures
    return figures


def kill_master(count: int = 1) -> Figures:
    """SIGKILL to the master under load: every idle process is gone within a second, and the port is free."""
    gone: list[float] = []
    free: list[float] = []
    for _ in range(count):
        with serve("echo:loop", workers=8) as server, Load(server.address, clients=4) as load:
            watch.until("the load runs", partial(_runs, load))
            pids = [child.pid for child in watch.family(server.pid)]
            server.process.kill()
            server.process.wait()
            begun = time.monotonic()
            watch.until("every process is gone", partial(_all_gone, pids), 5.0)
            gone.append(time.monotonic() - begun)
            with serve("echo:loop", bind=f"{server.address[0]}:{server.address[1]}"):
                free.append(time.monotonic() - begun)
            load.stop()
        assert gone[-1] < 1.0, f"{gone[-1]:.3f} s until the last process had gone"
    return {"gone_worst": max(gone), "next_daemon_ready_worst": max(free)}


def stops(count: int = 3, handler: str = "echo:loop") -> Figures:
    """Graceful stops under full load: nobody whom the kernel had connected is cut; refused ones are counted apart."""
    figures: Figures = {"connections": 0, "refused": 0, "turned_away": 0, "slowest_stop": 0.0}
    for _ in range(count):
        with serve(handler, workers=4) as server, Load(server.address, clients=4, timeout=0.5) as load:
            watch.until("the load runs", partial(_runs, load))
            begun = time.monotonic()
            server.stop()
            figures["slowest_stop"] = max(figures["slowest_stop"], time.monotonic() - begun)
            load.stop()
            # Who is turned away in the handshake was never connected.
            lost = [kind for _, kind, _ in load.failures if not kind.startswith("connect")]
            assert not lost, lost
            accepted = int(server.log().rpartition("stopped: ")[2].split()[0])
            assert accepted == load.connections, f"{accepted} accepted, {load.connections} answered"
            figures["connections"] += load.connections
            figures["refused"] += load.refused
            figures["turned_away"] += len(load.failures)
    return figures


def _runs(load: Load) -> bool:
    return load.connections > 50


FAULTS: dict[str, Callable[..., Figures]] = {
    "steady": steady,
    "reloads": reloads,
    "recycling": recycling,
    "addresses": addresses,
    "kill_workers": kill_workers,
    "kill_fork_server": kill_fork_server,
    "kill_master": kill_master,
    "stops": stops,
}
