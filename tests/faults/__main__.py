"""``python -m tests.faults [FAULT ...] [--count N] [--seconds S]``: the faults with the counts that you say, and their figures."""

import argparse
import inspect
import json
import sys
import time

from tests.faults.campaign import FAULTS


def main() -> int:
    """Run the faults named (all without any) and print a line of JSON for each."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("fault", nargs="*", choices=[*FAULTS, []], help="all of them when none is named")
    parser.add_argument("--count", type=int, help="how often the fault strikes")
    parser.add_argument("--seconds", type=float, help="how long a fault without a count lasts")
    given = parser.parse_args()
    failed = 0
    for name in given.fault or FAULTS:
        wanted = {"count": given.count, "seconds": given.seconds}
        known = inspect.signature(FAULTS[name]).parameters
        begun = time.monotonic()
        try:
            figures = FAULTS[name](**{key: value for key, value in wanted.items() if key in known and value is not None})
        except AssertionError as error:
            failed += 1
            figures = {"FAILED": str(error)}
        print(json.dumps({"fault": name, "took": round(time.monotonic() - begun, 1), **figures}), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
