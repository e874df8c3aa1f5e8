"""Text of others on a terminal: no control character, no line of its own, and what can be read stays as it is."""

import json
import unicodedata
from typing import Any

import click
from hypothesis import given
from hypothesis import strategies as st

from prefork.ops import status as status_page
from prefork.printable import one_line, printable
from prefork.system import systemd

EVIL = "\x1b]0;OWNED\x07\x1b[2J\x9b31m\u202eevil\u2066\x00\r\nforged line\u2028\x85"


@given(st.text() | st.text(alphabet=st.characters(categories=("Cc", "Cf", "Zl", "Zp", "Zs", "Cs"))))
def test_no_text_steers_a_terminal(text: str) -> None:
    shown = printable(text)
    assert not {c for c in shown if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Cs")} - {"\n", "\t"}
    assert shown.count("\n") == text.count("\n")
    assert "\n" not in one_line(text)
    assert printable(shown) == shown


@given(st.text(alphabet=st.characters(categories=("L", "M", "N", "P", "S"))))
def test_what_can_be_printed_stays_as_it_is(word: str) -> None:
    text = f'Traceback:\n  File "x.py"\n\t{word} {word}\n'
    assert printable(text) == text


def test_the_table_shows_whatever_a_daemon_answers_as_text() -> None:
    state = {"target": 1, "starting": 0, "idle": 1, "busy": 0, "retiring": 0, "paused": 0}
    worker = dict.fromkeys(("pid", "slot", "generation", "connections"), 1) | dict.fromkeys(("since", "rss", "cpu"))
    found: dict[str, Any] = {
        "name": EVIL,
        "module": EVIL,
        "version": EVIL,
        "pid": 1,
        "state": EVIL,
        "uptime": 1.0,
        "generation": EVIL,
        "reload": {"at": 0.0, "result": EVIL, "reason": "first\nTraceback " + EVIL},
        "backoff": {"until": 0.0, "reason": EVIL},
        "max_workers": 1,
        **dict.fromkeys(("saturated_seconds", "stalled_seconds"), 0),
        **dict.fromkeys(("saturated_since", "stalled_since", "ceiling_since")),
        "listeners": [{"address": EVIL, "queue": None, "queue_limit": None, "workers": state}],
        "totals": dict.fromkeys(("accepted", "serving", "ok", "error", "killed", "rejected", "forked", "exited"), EVIL),
        "duration": {"p50": None},
        "workers": [worker | {"listener": EVIL, "state": EVIL, "peer": EVIL}],
        "overdue": [{"pid": 1, "generation": 1, "slot": 1, "seconds": 2.0, "what": EVIL}],
        "deaths": [{"at": 0.0, "pid": 1, "generation": 1, "slot": 1, "cause": EVIL, "peer": EVIL, "stack": EVIL}],
    }
    shown = click.unstyle(status_page.table(found))
    assert "evil" in shown
    assert [line for line in shown.split("\n") if not line.isprintable()] == []
    assert [line for line in shown.split("\n") if line.startswith("forged")] == []
    assert "Traceback" not in shown
    assert json.dumps(found).isprintable()


def test_the_service_managers_status_line_holds_no_control_character() -> None:
    assert systemd.line(f"reload refused: {EVIL}\nTraceback (most recent call last):\nE: {EVIL}").isprintable()
