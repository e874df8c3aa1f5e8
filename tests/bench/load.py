"""The load generator, load.c, and what it saw."""

import json
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import watch

SOURCE = Path(__file__).with_name("load.c")
# It ends by itself: each connection has a time limit.
PATIENCE = 600.0


class BenchError(Exception):
    """A figure that can't be had: what has happened instead."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What the clients saw. Times in seconds, latencies in microseconds by percentile ("p50", "p90", "p99", "max").

    ``connections`` were served in full, ``errors`` counts the others by class. ``latency`` counts from the moment at which a
    connection was due, ``late`` is how long after it the generator began. ``cpu`` is its own. ``slices`` are the
    connections in each ``slice`` seconds.
    """

    connections: int
    trips: int
    seconds: float
    cpu: float
    latency: dict[str, float]
    errors: dict[str, int]
    late: dict[str, float] = field(default_factory=dict)
    slice: float = 0.1
    slices: tuple[int, ...] = ()

    @property
    def rate(self) -> float:
        """Connections a second."""
        return self.connections / self.seconds if self.seconds else 0.0

    @property
    def busy(self) -> float:
        """The generator's share of one core: near 1 it was the limit, and not the server."""
        return self.cpu / self.seconds if self.seconds else 0.0


def together(parts: Sequence[Seen]) -> Seen:
    """Several runs as one: sums, and the latencies of the run whose median is the middle one."""
    errors: Counter[str] = Counter()
    for part in parts:
        errors.update(part.errors)
    middle = sorted(parts, key=lambda part: part.latency.get("p50", 0.0))[len(parts) // 2]
    return Seen(
        sum(part.connections for part in parts),
        sum(part.trips for part in parts),
        sum(part.seconds for part in parts),
        sum(part.cpu for part in parts),
        middle.latency,
        dict(errors),
        middle.late,
    )


def build(folder: Path) -> Path:
    """The program, compiled. AssertionError or SkipTest without a compiler."""
    watch.needs("cc")
    program = folder / "load"
    subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-std=gnu11", "-o", program, SOURCE], check=True)
    return program


@dataclass(frozen=True, slots=True)
class Generator:
    """``program`` run against a port of 127.0.0.1. ``reset``: clients close with RST, else with FIN."""

    program: Path
    reset: bool = False

    def command(self, port: int, **options: float | bool) -> list[str]:
        """The command line: an option that is True is a flag."""
        wanted = {"port": port, "reset": self.reset, **options}
        words = [f"--{name}" if value is True else f"--{name}={value}" for name, value in wanted.items() if value is not False]
        return [str(self.program), *words]

    def run(self, port: int, **options: float | bool) -> Seen:
        """Run it to its end. Raises BenchError."""
        command = self.command(port, **options)
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False, stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            raise BenchError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}")
        return _seen(done.stdout)

    @contextmanager
    def holding(self, port: int, connections: int, clients: int = 64) -> Iterator["Held"]:
        """So many connections, each served once, silent during the block, and served once more at its end.

        ``clients`` of them are begun at a time. Raises BenchError when not all were served.
        """
        command = self.command(port, hold=True, connections=connections, clients=clients, timeout=60)
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                first = json.loads(process.stdout.readline() or "{}")
                if first.get("held") != connections:
                    process.stdin.close()
                    raise BenchError(f"{connections} connections were to be held: {first}, {process.stdout.read()}")
                held = Held(process.pid, first["seconds"])
                yield held
                process.stdin.close()
                held.seen = _seen(process.stdout.read())
                if held.seen.errors:
                    raise BenchError(f"of {connections} held connections some have failed: {held.seen.errors}")
            finally:
                process.kill()


@dataclass(slots=True)
class Held:
    """Connections that are held: by which process, and how long it took until all were served."""

    pid: int
    took: float
    seen: Seen | None = None


def _seen(text: str) -> Seen:
    facts: dict[str, Any] = json.loads(text)
    return Seen(**{**facts, "slices": tuple(facts["slices"])})
