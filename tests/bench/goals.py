"""What prefork has to reach on two cores, and where its figures come from: "BENCHMARK: FIGURE"."""

from collections.abc import Mapping
from dataclasses import dataclass

ACCEPTORS = 100
PACED, SATURATED = ("paced_3000", "paced_8000"), ("saturated_1", "saturated_4", "saturated_64")


@dataclass(frozen=True, slots=True)
class Goal:
    """``limit`` is the most, or (``least``) the least that each of ``figures`` may be."""

    what: str
    limit: float
    figures: tuple[str, ...]
    unit: str = ""
    least: bool = False

    @property
    def wanted(self) -> str:
        """The limit as people write it."""
        return f"{'≥' if self.least else '≤'} {self.limit:g}{self.unit and ' ' + self.unit}"

    def reached(self, value: float) -> bool:
        """Whether this is good enough."""
        return value >= self.limit if self.least else value <= self.limit


@dataclass(frozen=True, slots=True)
class Judged:
    """A goal beside what was measured: the figures that there are."""

    goal: Goal
    values: dict[str, float]

    @property
    def verdict(self) -> str:
        """reached, missed, or not measured."""
        if not self.values:
            return "not measured"
        return "reached" if all(map(self.goal.reached, self.values.values())) else "missed"


def _of(benchmarks: tuple[str, ...], figure: str) -> tuple[str, ...]:
    return tuple(f"{name}: {figure}" for name in benchmarks)


GOALS = (
    Goal("CPU per short connection, prefork / bare Python loop, paced", 0.90, _of(PACED, "cpu / bare")),
    Goal("the same, saturated", 1.00, _of(SATURATED, "cpu / bare")),
    Goal("CPU per short connection, prefork / Go, paced", 0.80, _of(PACED, "cpu / go")),
    Goal("the same, saturated", 1.10, _of(SATURATED, "cpu / go")),
    Goal("worker processes under 4 saturating clients, workers = 8", 16, ("workers: worker processes, at most",)),
    Goal(
        "a handler that sleeps 5 ms, 64 clients: throughput after 1 s / 64 fixed workers",
        0.95,
        ("sleep: grown / bare",),
        least=True,
    ),
    Goal("short connections a second, prefork / C floor", 0.75, _of(SATURATED, "rate / floor"), least=True),
    Goal("p99 latency, 4 clients, 3,000/s, prefork / bare Python loop", 1.25, ("paced_3000: p99 / bare",)),
    Goal("CPU per round trip on long connections, prefork / bare Python loop", 1.03, ("trips: cpu / bare",)),
    Goal("acceptors restored after a SIGKILL, median", 5, ("restored: after a SIGKILL, ms median",), "ms"),
    Goal("the same, p99", 25, ("restored: after a SIGKILL, ms p99",), "ms"),
    Goal(
        "acceptors restored after an accept whose handler blocks, median",
        10,
        ("restored: after a blocking accept, ms median",),
        "ms",
    ),
    Goal("the same, p99", 30, ("restored: after a blocking accept, ms p99",), "ms"),
    Goal("500 clients at once on 8 acceptors, each held: all being served", 1.5, ("held_500: all served prefork",), "s"),
    Goal("10,000 connections held: memory of everything", 13, ("ten_thousand: memory of everything at 10000, GB",), "GB"),
    Goal("the same: a new client's first echo, median", 20, ("ten_thousand: a new client's first echo at 10000 median, ms",), "ms"),
    Goal(
        "the same: master's CPU with all silent", 0.5, ("ten_thousand: master's CPU with 10000 silent, % of a core",), "% of a core"
    ),
    Goal(
        "master's CPU per event, 10,000 workers / 10",
        2,
        (
            "ten_thousand: master's CPU per acceptor taken, at 10000 / at 10",
            "ten_thousand: master's CPU per acceptor killed, at 10000 / at 10",
        ),
    ),
    Goal("idle, 100 acceptors, 60 s: CPU of the whole tree", 20, ("idle: CPU of the whole tree, ms",), "ms"),
    Goal(
        "the same: wake-ups of idle workers",
        0,
        ("idle: wake-ups of workers by their context switches", "idle: system calls of workers by strace"),
    ),
    Goal("start to ready, echo, 8 workers", 0.35, ("start: start to ready, s median",), "s"),
    Goal("reload to committed", 0.25, ("start: reload to committed, s median",), "s"),
    Goal("master's own memory (PSS)", 18, (f"memory: master of {ACCEPTORS}, MB",), "MB"),
    Goal("idle worker's own memory (PSS), one of 100", 1.2, (f"memory: idle worker of {ACCEPTORS}, MB",), "MB"),
    Goal("forks under a steady load, after 2 s, in 60 s", 3, ("forks: forks, saturated", "forks: forks, paced")),
)


def judge(figures: Mapping[str, float]) -> list[Judged]:
    """Each goal beside those of its figures that were measured."""
    return [Judged(goal, {name: figures[name] for name in goal.figures if name in figures}) for goal in GOALS]
