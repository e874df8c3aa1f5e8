"""What a run has shown: text and Markdown for people, JSON for machines, a plot."""

import json
import os
import platform
import re
import statistics
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.goals import Judged, judge
from tests.bench.peers import PEERS, interpreter
from tests.bench.settings import Settings
from tests.bench.workloads import Compared, Turn

# Above this share of a core the load generator is what holds up the rest: then a rate is a lower limit, and CPU still counts.
GENERATOR_LIMIT = 0.9
# Cores: above this figures are those of a busy machine.
OTHERS_LIMIT = 0.1
HEADS = ("server", "CPU us", "min-max", "prefork is", "a second", "p50", "p90", "p99", "max us", "generator", "others", "errors")
Rows = list[tuple[str, ...]]


@dataclass(slots=True)
class Report:
    """``compared`` and ``measured`` by benchmark; ``notes`` is what went wrong, or what can't be known here, by benchmark."""

    command: str
    settings: Settings
    accounting: str
    versions: dict[str, str]
    skipped: dict[str, str]
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S %z"))
    machine: dict[str, Any] = field(default_factory=lambda: _machine())  # noqa: PLW0108 - defined below
    compared: dict[str, tuple[str, Compared]] = field(default_factory=dict)
    measured: dict[str, tuple[str, dict[str, float]]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)

    @property
    def figures(self) -> dict[str, float]:
        """Everything that was measured, as "BENCHMARK: FIGURE"."""
        all_of = {name: compared.figures for name, (_, compared) in self.compared.items()}
        all_of |= {name: figures for name, (_, figures) in self.measured.items()}
        return {f"{name}: {key}": value for name, figures in all_of.items() for key, value in figures.items()}

    @property
    def judged(self) -> list[Judged]:
        """Goals beside what was measured; nothing is, when it was only to be seen that all runs."""
        return judge({} if self.settings.shrink > 1 else self.figures)

    @property
    def failed_clients(self) -> dict[str, int]:
        """Clients that saw wrong bytes, by benchmark and server: no server may."""
        return {
            f"{name} {server}": wrong
            for name, (_, compared) in self.compared.items()
            for server, turns in compared.turns.items()
            if (wrong := sum(turn.errors.get(kind, 0) for turn in turns for kind in ("wrong bytes", "more than sent")))
        }

    def as_json(self) -> str:
        """For machines."""
        facts = {
            **{key: getattr(self, key) for key in ("date", "command", "machine", "accounting", "versions", "skipped")},
            "settings": asdict(self.settings),
            "interpreter": interpreter(),
            "interpreter_build": _build(),
            "clients_close_with": self.closing,
            "workloads": {name: {"what": what, **compared.as_json()} for name, (what, compared) in self.compared.items()},
            "measures": {name: {"what": what, "figures": figures} for name, (what, figures) in self.measured.items()},
            "goals": [
                {"what": one.goal.what, "goal": one.goal.wanted, "measured": one.values, "verdict": one.verdict}
                for one in self.judged
            ],
            "notes": self.notes,
        }
        return json.dumps(facts, indent=1, ensure_ascii=False) + "\n"

    @property
    def closing(self) -> str:
        """How clients close."""
        return "RST" if self.settings.reset else "FIN"

    @property
    def others(self) -> str:
        """What others did meanwhile; an empty text when nothing was compared."""
        used = [turn.others for _, compared in self.compared.values() for turns in compared.turns.values() for turn in turns]
        if not used:
            return ""
        middle = statistics.median(used)
        busy = "; the machine was busy with something else" if middle > OTHERS_LIMIT else ""
        return f"neither servers nor clients: {middle:.2f} cores{busy}"

    def text(self) -> str:
        """All of it, for a terminal."""
        return self._pages(_columns, "\n{}: {}\n")

    def markdown(self) -> str:
        """All of it, for a README or a note."""
        return self._pages(_markdown, "\n### {}: {}\n\n")

    def _pages(self, table: Any, title: str) -> str:
        parts = ["\n".join(f"{key}: {value}{'  ' if table is _markdown else ''}" for key, value in self.head()) + "\n"]
        if len(self.compared) > 1:
            parts += [title.format("summary", "us of CPU for each connection, round trip, MiB, request"), table(self._summary())]
        for name, (what, compared) in self.compared.items():
            parts.append(title.format(name, f"{what}; CPU for each {compared.unit}"))
            parts.append(table([HEADS, *_servers(compared)]))
        for name, (what, figures) in self.measured.items():
            parts.append(title.format(name, what))
            parts.append(table([("figure", "value"), *((key, number(value)) for key, value in figures.items())]))
        if goals := self._goals():
            parts.append(title.format("goals", "on two cores, as medians of one interleaved run"))
            parts.append(table([("what", "goal", "measured", "verdict"), *goals]))
        parts += [f"\n{name}: {note}\n" for name, notes in self.notes.items() for note in notes]
        return "".join(parts)

    def head(self) -> list[tuple[str, str]]:
        """When, where, and of what."""
        at = self.machine
        return [
            ("date", self.date),
            ("command", self.command),
            ("machine", f"{at['cores']} cores, {at['cpu']}, Linux {at['kernel']}, {at['memory_gb']:.0f} GB, load {at['load']:.2f}"),
            ("Python", f"{interpreter()}, {_build()}"),
            ("clients", f"on the same machine, close with {self.closing}"),
            ("turns", f"{self.settings.rounds} rounds, in each {self.settings.seconds:g} s for each server"),
            *([("others", self.others)] if self.others else []),
            ("CPU", f"of the whole process tree: {self.accounting}"),
            *((name, f"{PEERS[name].what}: {version}") for name, version in self.versions.items()),
            *((name, f"left out: {reason}") for name, reason in self.skipped.items()),
        ]

    def _summary(self) -> Rows:
        servers = dict.fromkeys(name for _, compared in self.compared.values() for name in compared.turns)
        rows: Rows = [("server", *self.compared)]
        for server in servers:
            medians = (compared.figures.get(f"cpu {server}") for _, compared in self.compared.values())
            rows.append((server, *("" if median is None else number(median) for median in medians)))
        return rows

    def _goals(self) -> Rows:
        rows: Rows = []
        for judged in self.judged:
            if not judged.values:
                continue
            several = len(judged.values) > 1
            values = [
                f"{number(value)}{f' ({_short(name, judged.values)})' if several else ''}" for name, value in judged.values.items()
            ]
            rows.append((judged.goal.what, judged.goal.wanted, ", ".join(values), judged.verdict))
        return rows


def _short(name: str, names: Sequence[str] | dict[str, float]) -> str:
    """What tells this figure from the others of the goal: the benchmark, or the figure."""
    benchmark, _, figure = name.partition(": ")
    return figure if len({other.partition(": ")[0] for other in names}) == 1 else benchmark


def number(value: float) -> str:
    """Three digits that count, and no exponent."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def _servers(compared: Compared) -> Rows:
    rows = []
    for name, turns in compared.turns.items():
        used = [turn.cpu_us for turn in turns]
        ratio = compared.figures.get(f"cpu / {name}")
        errors: dict[str, int] = {}
        for turn in turns:
            for kind, count in turn.errors.items():
                errors[kind] = errors.get(kind, 0) + count
        busy = _median(turns, "generator_busy")
        rows.append(
            (
                name,
                number(statistics.median(used)),
                f"{number(min(used))}-{number(max(used))}",
                "" if ratio is None else f"{ratio:.2f}x",
                number(_median(turns, "rate")),
                *(number(statistics.median(turn.latency.get(key, 0.0) for turn in turns)) for key in ("p50", "p90", "p99", "max")),
                f"{number(_median(turns, 'generator_us'))} us, {busy:.0%}{' (the limit)' if busy > GENERATOR_LIMIT else ''}",
                f"{_median(turns, 'others'):.2f}",
                ", ".join(f"{count} {kind}" for kind, count in errors.items()) or "0",
            )
        )
    return rows


def _median(turns: list[Turn], what: str) -> float:
    return float(statistics.median(getattr(turn, what) for turn in turns))


def _columns(rows: Rows) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "".join(f"{line}\n" for line in lines)


def _markdown(rows: Rows) -> str:
    head, *rest = ("| " + " | ".join(row) + " |\n" for row in rows)
    return "".join([head, "|" + " --- |" * len(rows[0]) + "\n", *rest])


def _machine() -> dict[str, Any]:
    """What it was measured on."""
    cpuinfo, meminfo = Path("/proc/cpuinfo").read_text(), Path("/proc/meminfo").read_text()
    model = re.search(r"^model name\s*: (.*)$", cpuinfo, re.MULTILINE)
    total = re.search(r"^MemTotal: *(\d+)", meminfo, re.MULTILINE)
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": model[1] if model else platform.machine(),
        "kernel": platform.release(),
        "memory_gb": int(total[1]) * 1024 / 1e9 if total else 0.0,
        "load": os.getloadavg()[0],
    }


def _build() -> str:
    """How this interpreter was compiled, as far as it makes it faster or slower."""
    flags = str(sysconfig.get_config_var("CONFIG_ARGS") or "")
    fast = [flag for flag in ("--enable-optimizations", "--with-lto", "--enable-shared") if flag in flags]
    return f"configured with {' '.join(fast)}" if fast else "configured without --enable-optimizations"


def command_line() -> str:
    """How this run was started."""
    return " ".join(["python -m tests.bench", *sys.argv[1:]])
