"""What a run tells."""

import json
from dataclasses import replace
from xml.etree import ElementTree as ET

import pytest

from tests.bench import plot
from tests.bench.__main__ import BENCHMARKS, chosen
from tests.bench.goals import GOALS, judge
from tests.bench.report import Report, number
from tests.bench.settings import FULL
from tests.bench.workloads import Compared, Turn, ratios


def turn(cpu_us: float, rate: float = 1000.0, p99: float = 200.0, busy: float = 0.5) -> Turn:
    latency = {"p50": 100.0, "p90": 150.0, "p99": p99, "max": 300.0}
    return Turn(cpu_us, rate, latency, 0.0, 1000, 1.0, 20.0, busy, 0.1, {})


def report() -> Report:
    turns = {"prefork": [turn(40), turn(90), turn(44)], "bare": [turn(value, busy=1.0) for value in (50, 60, 80)]}
    made = Report("python -m tests.bench", FULL, "a clock", {"prefork": "1", "bare": "3"}, {"go": "go is not installed"})
    made.compared = {name: ("words < & >", Compared("connection", turns, ratios(turns))) for name in ("paced_3000", "saturated_1")}
    made.measured = {"workers": ("workers", {"worker processes, at most": 17})}
    made.notes = {"idle": ["strace is not installed"]}
    return made


def test_ratios_are_medians_of_the_rounds() -> None:
    figures = report().compared["paced_3000"][1].figures
    assert figures["cpu / bare"] == 0.8  # of 0.8, 1.5, 0.55; not 44 / 60
    assert (figures["cpu prefork"], figures["cpu bare"]) == (44, 60)


def test_goals_are_judged_by_what_was_measured() -> None:
    verdicts = {one.goal.what: one.verdict for one in report().judged}
    assert verdicts["CPU per short connection, prefork / bare Python loop, paced"] == "reached"
    assert verdicts["worker processes under 4 saturating clients, workers = 8"] == "missed"
    assert verdicts["idle, 100 acceptors, 60 s: CPU of the whole tree"] == "not measured"


@pytest.mark.parametrize(("value", "verdict"), [(0.75, "reached"), (0.74, "missed")])
def test_what_has_to_be_large_is_judged_so(value: float, verdict: str) -> None:
    judged = {one.goal.what: one for one in judge({"saturated_1: rate / floor": value})}
    assert judged["short connections a second, prefork / C floor"].verdict == verdict


def test_one_figure_of_several_misses_a_goal() -> None:
    (judged,) = (one for one in judge({"paced_3000: cpu / bare": 0.9, "paced_8000: cpu / bare": 0.91}) if one.values)
    assert judged.verdict == "missed"


def test_goals_are_about_benchmarks_that_there_are() -> None:
    assert {figure.partition(": ")[0] for goal in GOALS for figure in goal.figures} <= set(BENCHMARKS)


def test_text_markdown_json_and_plot_tell_the_same() -> None:
    made = report()
    for page in (made.text(), made.markdown()):
        for words in ("go is not installed", "strace is not installed", "0.80x", "the limit", made.date, "missed"):
            assert words in page
    assert "| bare | 60.0 | 50.0-80.0 | 0.80x |" in made.markdown()
    facts = json.loads(made.as_json())
    assert facts["workloads"]["paced_3000"]["turns"]["bare"][2]["cpu_us"] == 80
    assert facts["clients_close_with"] == "FIN"
    root = ET.fromstring(plot.svg(made.compared, "a <caption>"))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"a <caption>", "words < & >", "prefork", "60.0", "44.0"} <= set(texts)


def test_a_busy_machine_is_told() -> None:
    made = report()
    made.compared["paced_3000"][1].turns["bare"] = [replace(turn(50), others=1.5)] * 9
    assert "the machine was busy with something else" in made.text()
    assert "busy with something else" not in report().text()


def test_numbers_are_short() -> None:
    assert [number(value) for value in (0, 0.1234, 1.234, 12.34, 123.4, 12345.6)] == ["0", "0.12", "1.23", "12.3", "123", "12,346"]


def test_benchmarks_are_chosen_by_name_or_by_how_it_begins() -> None:
    assert chosen([]) == list(BENCHMARKS)
    assert chosen(["idle", "saturated", "storm_500"]) == ["saturated_1", "saturated_4", "saturated_64", "storm_500", "idle"]
    with pytest.raises(ValueError, match="'satur' is none of"):
        chosen(["satur"])
