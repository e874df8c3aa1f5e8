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

from tests.faults.arena import Figures
from tests.faults.campaign import FAULTS, together

COLUMNS = ("fault", "workload", "count", "connections", "failures", "permitted", "worst", "took")
# A fault may use so much of the time that is left; the next ones get what it leaves over.
SHARE = 0.5


class Report:
    """What was run, and what failed."""

    def __init__(self) -> None:
        self.rows: list[Figures] = []

    def add(self, fault: str, run: Callable[[], Figures]) -> None:
        """Run it and print its line."""
        begun = time.monotonic()
        try:
            figures = run()
        except AssertionError as error:
            figures = {"FAILED": str(error)}
        row = {"fault": fault, **figures, "took": round(time.monotonic() - begun, 1)}
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
    return "FAILED" if value is None else str(value)


def main() -> int:
    """Run the faults named (all without any), then all together for what is left of the time."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("fault", nargs="*", choices=[*FAULTS, []], help="all of them when none is named")
    parser.add_argument("--count", type=int, help="how often each fault strikes")
    parser.add_argument("--minutes", type=float, help="how long at most; what the faults leave is for all of them together")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), help="of what is left to chance")
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    end = time.monotonic() + given.minutes * 60 if given.minutes else math.inf
    report = Report()
    for name in given.fault or FAULTS:
        fault = FAULTS[name]
        for workload in fault.workloads:
            now = time.monotonic()
            rounds = fault.share(given.count or fault.full, now + (end - now) * SHARE, given.seed)
            report.add(name, partial(fault.run, rounds, workload))
    if given.minutes and not given.fault:
        report.add("together", partial(together, max(10.0, end - time.monotonic()), given.seed))
    print(report.table())
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
