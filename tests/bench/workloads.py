"""Loads under which servers are compared: they run in turn, interleaved, and each round gives a ratio.

The machine's speed changes from minute to minute, and a server's turn is short: what counts is the median of the rounds' ratios,
of CPU rather than of time.
"""

import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.cpu import Account
from tests.bench.load import BenchError, Generator, Seen, together
from tests.bench.peers import PEERS, Peer, Running, Wish
from tests.bench.settings import Settings

# A server that has nothing to do uses less than this between two looks.
QUIET_NS, LOOK, QUIET_DEADLINE = 100_000, 0.02, 1.0
WARM = 200
LATE_CLIENTS = 64
# When a pool has to have grown to what a handler that waits needs.
GROWN = 1.0
MEBIBYTE = 1 << 20
DEFAULTS = Wish()
# Of silent connections: so many at a time, and the memory that is not theirs.
HOLD_STEP, SPARE_MEMORY = 1000, 2 << 30


@dataclass(slots=True)
class Place:
    """Where benchmarks run: a folder for what is built, the load generator, how much of everything, whom to tell of progress."""

    folder: Path
    generator: Generator
    settings: Settings
    say: Callable[[str], object]

    def peers(self, handler: str = "echo", holding: int = 0) -> list[Peer]:
        """Those to be compared who have this handler, are installed, and can hold so many connections; prefork always."""
        wanted = self.settings.peers
        return [
            peer
            for peer in PEERS.values()
            if (peer.name == "prefork" or wanted is None or peer.name in wanted)
            and handler in peer.handlers
            and (peer.holds is None or holding <= peer.holds)
            and peer.missing() is None
        ]


@dataclass(frozen=True, slots=True)
class Turn:
    """One server's turn. ``cpu_us``: of its whole tree, microseconds for each connection (round trip, MiB). Latencies are in
    microseconds; ``generator_us`` and ``generator_busy`` are the load generator's own CPU, and its share of a core; ``others``
    is what neither of the two used of the machine, in cores: a run beside other work shows it.
    """

    cpu_us: float
    rate: float
    latency: dict[str, float]
    late_p99: float
    connections: int
    seconds: float
    generator_us: float
    generator_busy: float
    others: float
    errors: dict[str, int]


@dataclass(slots=True)
class Compared:
    """A workload's turns by server, and figures of it that goals or readers ask for."""

    unit: str
    turns: dict[str, list[Turn]] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "unit": self.unit,
            "turns": {name: [asdict(turn) for turn in turns] for name, turns in self.turns.items()},
            "figures": self.figures,
        }


@dataclass(frozen=True, slots=True)
class Workload:
    """``load``: what the generator does in one turn, from the settings; with ``repeated`` again, until the turn's time is over.

    ``units``: what of `Seen` is counted, each a ``unit``. ``beside``: with the settings' number of silent connections.
    ``holding``: how many a server must be able to hold to take part. ``alone``: each turn gets a freshly started server.
    """

    what: str
    load: Callable[[Settings], dict[str, float | bool]]
    unit: str = "connection"
    units: str = "connections"
    repeated: bool = False
    beside: bool = False
    holding: int = 0
    alone: bool = False
    wish: Wish = DEFAULTS
    figures: Callable[[dict[str, list[Seen]]], dict[str, float]] | None = None

    def run(self, place: Place) -> Compared:
        """Every server's turns. Raises BenchError when one does not start."""
        settings = place.settings
        peers = place.peers(self.wish.handler, self.holding)
        result = Compared(self.unit, {peer.name: [] for peer in peers})
        all_seen: dict[str, list[Seen]] = {peer.name: [] for peer in peers}
        with ExitStack() as stack:
            started: dict[str, Running] = {}
            if not self.alone:
                for peer in peers:
                    started[peer.name] = stack.enter_context(self._warm(peer, place))
            for number in range(settings.rounds):
                first = number % len(peers)  # who follows whom should not always be the same
                for peer in peers[first:] + peers[:first]:
                    with ExitStack() as own:
                        running = started.get(peer.name) or own.enter_context(self._warm(peer, place))
                        turn, seen = self._turn(running, place)
                    place.say(f"round {number + 1} {peer.name}: {turn.cpu_us:.1f} us, {turn.rate:.0f}/s {turn.errors or ''}")
                    result.turns[peer.name].append(turn)
                    all_seen[peer.name].append(seen)
        result.figures = ratios(result.turns) | (self.figures(all_seen) if self.figures else {})
        return result

    @contextmanager
    def _warm(self, peer: Peer, place: Place) -> Iterator[Running]:
        with peer.running(place.folder, self.wish) as running:
            http = self.wish.handler == "http"
            # One client: a pool is as large afterwards as it was.
            seen = place.generator.run(running.port, clients=1, connections=place.settings.size(WARM), http=http)
            if seen.errors:
                raise BenchError(f"{peer.name} has errors before it has any load: {seen.errors}")
            yield running

    def _turn(self, running: Running, place: Place) -> tuple[Turn, Seen]:
        with ExitStack() as stack:
            if self.beside:
                hold(place, running.port, place.settings.held, stack)
            _until_quiet(running.account)
            machine, used = machine_busy(), running.account.usage_ns()
            begun = time.monotonic()
            parts = [place.generator.run(running.port, **self.load(place.settings))]
            while self.repeated and time.monotonic() - begun < place.settings.seconds:
                parts.append(place.generator.run(running.port, **self.load(place.settings)))
            _until_quiet(running.account)
            took = time.monotonic() - begun
            used, machine = running.account.usage_ns() - used, machine_busy() - machine
        seen = together(parts) if self.repeated else parts[0]
        units = getattr(seen, self.units) or 1  # nobody was served: the errors tell
        return (
            Turn(
                cpu_us=used / 1e3 / units,
                rate=units / seen.seconds if seen.seconds else 0.0,
                latency=seen.latency,
                late_p99=seen.late.get("p99", 0.0),
                connections=seen.connections,
                seconds=seen.seconds,
                generator_us=seen.cpu * 1e6 / units,
                generator_busy=seen.busy,
                others=max(0.0, (machine - used / 1e9 - seen.cpu) / took),
                errors=seen.errors,
            ),
            seen,
        )


def ratios(turns: dict[str, list[Turn]]) -> dict[str, float]:
    """What prefork is to each peer: medians of the rounds' ratios of CPU, rate and p99 latency, and the medians themselves."""
    figures = {}
    ours = turns.get("prefork", [])
    for name, theirs in turns.items():
        for what, value in (("cpu", _cpu), ("rate", _rate), ("p99", _p99)):
            figures[f"{what} {name}"] = statistics.median(map(value, theirs))
            rounds = [value(a) / value(b) for a, b in zip(ours, theirs, strict=True) if value(b)]
            if name != "prefork" and rounds:
                figures[f"{what} / {name}"] = statistics.median(rounds)
    return figures


def _cpu(turn: Turn) -> float:
    return turn.cpu_us


def _rate(turn: Turn) -> float:
    return turn.rate


def _p99(turn: Turn) -> float:
    return turn.latency.get("p99", 0.0)


class NoMemoryError(BenchError):
    """Of the connections that were to be held, ``held`` are; there is no memory for more."""

    def __init__(self, connections: int, held: int, taken: int, left: int) -> None:
        super().__init__(
            f"{connections} more connections can't be held: {held} have taken {taken / 1e9:.1f} GB, {left / 1e9:.1f} GB are left"
        )
        self.held = held


def hold(place: Place, port: int, connections: int, stack: ExitStack) -> float:
    """Hold so many silent connections until ``stack`` is closed. Returns the seconds until all were served.

    They come by HOLD_STEP, and no more than there is memory for: NoMemoryError, before the kernel has to kill somebody.
    """
    took, before = 0.0, available()
    for first in range(0, connections, HOLD_STEP):
        left = available()
        if first and (before - left) / first * HOLD_STEP > left - SPARE_MEMORY:
            raise NoMemoryError(connections, first, before - left, left)
        size = min(HOLD_STEP, connections - first)
        took += stack.enter_context(place.generator.holding(port, size)).took
    return took


def available() -> int:
    """MemAvailable in bytes."""
    found = re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None
    return int(found[1]) * 1024


def _until_quiet(account: Account) -> None:
    """Until the server has done what was left to do after the last client had gone; at most a second, as some never rest."""
    end, last = time.monotonic() + QUIET_DEADLINE, account.usage_ns()
    while time.monotonic() < end:
        time.sleep(LOOK)
        before, last = last, account.usage_ns()
        if last - before < QUIET_NS:
            return


def machine_busy() -> float:
    """CPU seconds of the whole machine so far, of everybody."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _idle, _iowait, irq, softirq = map(int, file.readline().split()[1:8])
    return (user + nice + system + irq + softirq) / 100


def _grown(seen: dict[str, list[Seen]]) -> dict[str, float]:
    """Throughput once the first second has passed, prefork / the fixed number of workers."""
    rounds = [_after(a) / _after(b) for a, b in zip(seen["prefork"], seen.get("bare", []), strict=False) if _after(b)]
    return {"grown / bare": statistics.median(rounds)} if rounds else {}


def _all_served(seen: dict[str, list[Seen]]) -> dict[str, float]:
    """Seconds from the first connect until all were served."""
    return {f"all served {name}": statistics.median(one.seconds for one in turns) for name, turns in seen.items()}


def _after(seen: Seen) -> float:
    # The last slice is not a whole one, and clients that have no next connection are no load.
    first, last = round(GROWN / seen.slice), len(seen.slices) - 2
    counted = seen.slices[first:last]
    return sum(counted) / len(counted) if counted else 0.0


def _storm(clients: int, *, keep: bool) -> Callable[[Settings], dict[str, float | bool]]:
    return lambda settings: {"clients": settings.size(clients), "connections": settings.size(clients), "keep": keep, "timeout": 30}


def _short(**options: float | bool) -> Callable[[Settings], dict[str, float | bool]]:
    return lambda settings: {**options, "seconds": settings.seconds}


WORKLOADS = {
    "saturated_1": Workload("short connections, 1 client in a closed loop", _short(clients=1)),
    "saturated_4": Workload("short connections, 4 clients in a closed loop", _short(clients=4)),
    "saturated_64": Workload("short connections, 64 clients in a closed loop", _short(clients=64)),
    "paced_3000": Workload("short connections, 3,000 a second, at most 4 at a time", _short(clients=4, rate=3000)),
    "paced_8000": Workload("short connections, 8,000 a second, at most 16 at a time", _short(clients=16, rate=8000)),
    "trips": Workload(
        "1,000 round trips a connection, 4 clients",
        lambda settings: {"clients": 4, "trips": settings.size(1000), "seconds": settings.seconds},
        unit="round trip",
        units="trips",
    ),
    "mebibyte": Workload("1 MiB there and back, 4 clients", _short(clients=4, size=MEBIBYTE), unit="MiB"),
    "storm_500": Workload("500 clients at once, each leaves when it is served", _storm(500, keep=False), repeated=True),
    "storm_5000": Workload("5,000 clients at once, each leaves when it is served", _storm(5000, keep=False), repeated=True),
    "held_500": Workload(
        "500 clients at once, each stays until all are served",
        _storm(500, keep=True),
        holding=500,
        alone=True,
        wish=Wish(max_workers=600),
        figures=_all_served,
    ),
    "among_10000": Workload(
        "short connections, 4 clients in a closed loop, beside {held:,} that are silent",
        _short(clients=4),
        beside=True,
        holding=10_000,
        alone=True,
        wish=Wish(max_workers=10_100),
    ),
    "http": Workload(
        "GET, 4 clients in a closed loop, a connection for each",
        _short(clients=4, http=True),
        unit="request",
        wish=Wish(handler="http"),
    ),
    "sleep": Workload(
        f"a handler that sleeps 5 ms, {LATE_CLIENTS} clients; bare has {LATE_CLIENTS} workers",
        lambda settings: {"clients": LATE_CLIENTS, "seconds": GROWN + settings.seconds},
        alone=True,
        wish=Wish(handler="late", fixed=LATE_CLIENTS),
        figures=_grown,
    ),
}
