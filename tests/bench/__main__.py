"""``python -m tests.bench [BENCHMARK ...]``: what prefork costs, beside what a user would take instead, and what it has to reach.

All benchmarks without a name; ``saturated`` is every one whose name begins so. Progress goes to standard error, the tables to
standard output. Nothing else should run on the machine: the column "others" shows what did.
"""

import argparse
import compileall
import resource
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import prefork
from tests.bench import cpu, load, plot
from tests.bench.load import BenchError, Generator
from tests.bench.measures import MEASURES
from tests.bench.peers import PEERS
from tests.bench.report import Report, command_line
from tests.bench.settings import FULL, SMOKE, Settings
from tests.bench.workloads import WORKLOADS, Place

BENCHMARKS = (*WORKLOADS, *MEASURES)


def chosen(words: Sequence[str]) -> list[str]:
    """The benchmarks that are named, in their order. ValueError for a name that is nobody's."""
    for word in words:
        if not any(_meant(word, name) for name in BENCHMARKS):
            raise ValueError(f"{word!r} is none of {', '.join(BENCHMARKS)}, nor the beginning of one")
    return [name for name in BENCHMARKS if not words or any(_meant(word, name) for word in words)]


def _meant(word: str, name: str) -> bool:
    return name == word or name.startswith(f"{word}_")


@contextmanager
def place(settings: Settings) -> Iterator[Place]:
    """A folder with the load generator in it, which goes at the end with all that was built there.

    prefork is compiled first, as pip does it: where Python writes no bytecode each start of a checkout would do that, and leave
    2 MB of what it needed for it in every process.
    """
    compileall.compile_dir(Path(prefork.__file__).parent, quiet=1)
    with tempfile.TemporaryDirectory(prefix="prefork-bench-") as folder:
        yield Place(Path(folder), Generator(load.build(Path(folder)), settings.reset), settings, _say)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def begin(settings: Settings) -> Report:
    """A report of nothing yet: who takes part, who can't."""
    peers = [peer for name, peer in PEERS.items() if name == "prefork" or settings.peers is None or name in settings.peers]
    missing = {peer.name: reason for peer in peers if (reason := peer.missing()) is not None}
    with cpu.account() as account:
        accounting = account.kind
    versions = {peer.name: peer.version() for peer in peers if peer.name not in missing}
    return Report(command_line(), settings, accounting, versions, missing)


def run(name: str, where: Place, report: Report) -> None:
    """One benchmark, into the report; one that can't be had leaves its reason there."""
    try:
        if name in WORKLOADS:
            report.compared[name] = (WORKLOADS[name].what.format(held=where.settings.held), WORKLOADS[name].run(where))
        else:
            figures, notes = MEASURES[name].run(where)
            report.measured[name] = (MEASURES[name].what.format(held=where.settings.held), figures)
            if notes:
                report.notes[name] = notes
    except BenchError as error:
        report.notes[name] = [f"FAILED: {error}"]


def main() -> int:
    """Run what is named and tell. 1 when something could not be measured, or a client got bytes that it had not sent."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__.partition("\n\n")[2])
    parser.add_argument("benchmark", nargs="*", help=f"of: {', '.join(BENCHMARKS)}")
    parser.add_argument("--rounds", type=int, help=f"turns of each server (default {FULL.rounds})")
    parser.add_argument("--seconds", type=float, help=f"of each turn (default {FULL.seconds:g})")
    parser.add_argument("--peers", type=lambda text: tuple(text.split(",")), help=f"only these of {', '.join(PEERS)}")
    parser.add_argument("--close", choices=["fin", "rst"], default="fin", help="how clients close")
    parser.add_argument("--held", type=int, help=f"how many ten thousand are (default {FULL.held})")
    parser.add_argument("--smoke", action="store_true", help="as little as possible of everything: to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write an SVG there")
    parser.add_argument("--markdown", action="store_true", help="print tables as Markdown")
    given = parser.parse_args()
    try:
        names = chosen(given.benchmark)
    except ValueError as error:
        parser.error(str(error))
    if unknown := set(given.peers or ()) - set(PEERS):
        parser.error(f"--peers: {', '.join(sorted(unknown))}: none of {', '.join(PEERS)}")
    changes = {key: getattr(given, key) for key in ("rounds", "seconds", "peers", "held") if getattr(given, key) is not None}
    settings = replace(SMOKE if given.smoke else FULL, reset=given.close == "rst", **changes)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # servers hold ten thousand connections
    report = begin(settings)
    with place(settings) as where:
        for name in names:
            _say(f"-- {name}")
            run(name, where, report)
            for note in report.notes.get(name, ()):
                _say(f"{name}: {note}")
    print(report.markdown() if given.markdown else report.text(), end="")
    if given.json:
        given.json.write_text(report.as_json())
    if given.plot:
        given.plot.write_text(plot.svg(report.compared, f"{report.date}; clients close with {report.closing}; log scale"))
    for where_wrong, count in report.failed_clients.items():
        _say(f"{where_wrong}: {count} clients got bytes that they had not sent")
    failed = any(note.startswith("FAILED") for notes in report.notes.values() for note in notes)
    return 1 if failed or report.failed_clients else 0


if __name__ == "__main__":
    sys.exit(main())
