"""``python -m tests.faults [FAULT ...] [--minutes M] [--count N] [--seed S]``: the faults with full counts, one after the other,
then all of them at random together. A line of JSON for each, and a table at the end.
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable
from functools import partial

from tests.faults.arena import Figures, Rounds
from tests.faults.campaign import FAULTS, together

TOGETHER = "together"
# Of all at once, when no minutes are given.
ALL_AT_ONCE = 60.0
COLUMNS = ("fault", "workload", "count", "planned", "connections", "failures", "permitted", "worst", "took", "FAILED")


class Report:
    """What was run, and what failed."""

    def __init__(self) -> None:
        self.rows: list[Figures] = []

    def add(self, fault: str, workload: str, planned: float, run: Callable[[], Figures]) -> None:
        """Run it and print its line."""
        begun = time.monotonic()
        row: Figures = {"fault": fault, "workload": workload, "planned": planned}
        try:
            row |= run()
        except Exception as error:  # whatever it is: it is told, and the other faults still have their turn
            row["FAILED"] = f"{type(error).__name__}: {error}"
        row["took"] = round(time.monotonic() - begun, 1)
        print(json.dumps(row), flush=True)
        self.rows.append(row)

    @property
    def failed(self) -> bool:
        """Whether a promise did not hold."""
        return any("FAILED" in row for row in self.rows)

    def table(self) -> str:
        """For people."""
        cells = [COLUMNS, *([_cell(row.get(column)) for column in COLUMNS] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
        total = sum(row.get("connections", 0) for row in self.rows)
        return "\n".join([*lines, f"{total} connections, {'FAILED' if self.failed else 'all promises held'}"])


def _cell(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{count} {kind}" for kind, count in value.items()) or "0"
    return "" if value is None else str(value).partition("\n")[0][:40]


def main() -> int:
    """Run the faults named (all without any), then all together for what is left of the time."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    choices = [*FAULTS, TOGETHER, []]
    parser.add_argument("fault", nargs="*", choices=choices, help=f"all of them when none is named; {TOGETHER}: all at once")
    parser.add_argument("--count", type=int, help="how often each fault strikes")
    parser.add_argument("--minutes", type=float, help="about how long; what the faults leave is for all of them together")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), help="of what is left to chance")
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    end = time.monotonic() + given.minutes * 60 if given.minutes else math.inf
    report = Report()
    runs = [(name, workload) for name in given.fault or FAULTS if name != TOGETHER for workload in FAULTS[name].workloads]
    for number, (name, workload) in enumerate(runs):
        # What one does not need of its share of the time is for those after it, the last of which is all of them together.
        now = time.monotonic()
        deadline = now + (end - now) / (len(runs) + 1 - number)
        fault = FAULTS[name]
        rounds = Rounds(fault.share(given.count or fault.full), deadline, given.seed, alone=True)
        report.add(name, workload, rounds.count, partial(fault.run, rounds, workload))
    if TOGETHER in given.fault or (given.minutes and not given.fault):
        seconds = round(max(0.0, end - time.monotonic()) if given.minutes else ALL_AT_ONCE, 1)
        report.add(TOGETHER, "", seconds, partial(together, seconds, given.seed))
    print(report.table())
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
