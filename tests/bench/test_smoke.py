"""Every benchmark runs, and every byte is right: no figure is asserted, as this machine may be anything."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import watch
from tests.bench.__main__ import BENCHMARKS, begin, place, run
from tests.bench.goals import GOALS
from tests.bench.peers import PEERS
from tests.bench.settings import SMOKE
from tests.bench.workloads import Place


@pytest.fixture
def where() -> Iterator[Place]:
    with place(SMOKE) as made:
        yield made


@pytest.mark.parametrize("name", PEERS)
def test_no_peer_is_missing_in_ci(name: str) -> None:
    if (reason := PEERS[name].missing()) is not None:
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    assert PEERS[name].version()


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_benchmark_runs(name: str, where: Place) -> None:
    report = begin(SMOKE)
    run(name, where, report)
    assert not any(note.startswith("FAILED") for note in report.notes.get(name, ())), report.notes
    assert not report.failed_clients
    for _, compared in report.compared.values():
        assert all(turns for turns in compared.turns.values())
        assert not any(turn.errors for turn in compared.turns["prefork"]), compared.turns["prefork"]
    # What goals ask for is what is measured, under that name.
    wanted = {
        figure.replace("10000", str(SMOKE.held)) for goal in GOALS for figure in goal.figures if figure.startswith(f"{name}: ")
    }
    assert wanted <= set(report.figures)


@pytest.mark.slow
def test_the_command_measures_and_tells(tmp_path: Path) -> None:
    watch.needs("cc")
    command = [sys.executable, "-m", "tests.bench", "--smoke", "--peers=bare", "saturated", "memory"]
    files = [f"--json={tmp_path / 'json'}", f"--plot={tmp_path / 'plot.svg'}"]
    done = subprocess.run([*command, *files], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "saturated_64: short connections" in done.stdout
    facts = json.loads((tmp_path / "json").read_text())
    assert set(facts["workloads"]["saturated_4"]["turns"]) == {"prefork", "bare"}
    assert (tmp_path / "plot.svg").read_text().startswith("<svg")


def test_the_command_refuses_names_that_are_nobodys() -> None:
    command = [sys.executable, "-m", "tests.bench", "nothing"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "'nothing' is none of" in done.stderr
