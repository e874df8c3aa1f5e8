"""The log's lines: whole, told apart, and never in the way."""

import ast
import os
import re
import socket
import string
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import prefork
from prefork import log
from prefork.log import EVENTS, Level


class Lines:
    """What arrives on descriptor 2, as messages: each is one write(2)."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end

    def writes(self) -> list[str]:
        found = []
        while True:
            try:
                found.append(self.end.recv(1 << 20).decode())
            except BlockingIOError:
                return found

    def line(self) -> str:
        [written] = self.writes()
        return written


@pytest.fixture(autouse=True)
def _fresh_log(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_level", Level.INFO), ("_role", "master"), ("_dropped", 0)):
        monkeypatch.setattr(log, name, value)


@contextmanager
def descriptor_2(replacement: int) -> Iterator[None]:
    """Another file as standard error. Not a fixture: pytest puts its own there between a test's set-up and its call."""
    saved = os.dup(2)
    os.dup2(replacement, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


@contextmanager
def captured() -> Iterator[Lines]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    ours.setblocking(False)
    with ours, theirs, descriptor_2(theirs.fileno()):
        yield Lines(ours)


@contextmanager
def broken() -> Iterator[None]:
    """Every write to descriptor 2 fails: a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    try:
        with descriptor_2(write):
            yield
    finally:
        os.close(write)


def fields_of(name: str) -> dict[str, Any]:
    """A value for each field of the event's sentence: a number where the sentence formats one."""
    parts = [(field, spec) for _, field, spec, _ in string.Formatter().parse(EVENTS[name][1]) if field is not None]
    return {field: 1.25 if spec else f"<{field}>" for field, spec in parts}


def test_a_line_tells_when_how_bad_who_and_what() -> None:
    with captured() as stderr:
        log.configure(role="gen 3 worker 7")
        log.event("listening", address="127.0.0.1:7000")
        stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}"
        assert re.fullmatch(rf"{stamp} INFO gen 3 worker 7\[{os.getpid()}\]: listening on 127\.0\.0\.1:7000\n", stderr.line())


@pytest.mark.parametrize("name", EVENTS)
def test_an_event_is_one_write_that_tells_all_its_fields(name: str) -> None:
    with captured() as stderr:
        log.configure(level="debug")
        log.event(name, **fields_of(name))
        line = stderr.line()
        assert f" {EVENTS[name][0].name} master[" in line
        for value in fields_of(name).values():
            assert (str(value) if isinstance(value, str) else "1.2") in line


def test_every_event_is_logged_somewhere_with_the_fields_that_its_sentence_needs() -> None:
    logged: set[str] = set()
    for path in Path(prefork.__file__).parent.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(call, ast.Call) and ast.unparse(call.func) in {"log.event", "event"}):
                continue
            name = ast.literal_eval(call.args[0])
            given = {keyword.arg for keyword in call.keywords}
            logged.add(name)
            assert None in given or set(fields_of(name)) <= given, f"{path}:{call.lineno}"
    assert logged == set(EVENTS)


def test_a_traceback_is_in_the_same_write_indented() -> None:
    with captured() as stderr:
        log.event("bug", where="worker", text="Traceback:\n  File x\nValueError: y\n")
        head, *rest = stderr.line().splitlines()
        assert head.endswith("internal error in the worker, please report it")
        assert rest == ["    Traceback:", "      File x", "    ValueError: y"]


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("a\nb", r"a\nb"),
        ("a\r\x1b[2Jb", r"a\r\x1b[2Jb"),
        ("a\0b\x7f", r"a\x00b\x7f"),
        ("a\u202eb\u2028c\x85d", r"a\u202eb\u2028c\x85d"),
        ("\udcff", r"\udcff"),
        ("é 日本 😀", "é 日本 😀"),
        ('it\'s a \\ "quote"', 'it\'s a \\ "quote"'),
    ],
)
def test_what_users_send_neither_forges_lines_nor_steers_a_terminal(raw: str, shown: str) -> None:
    with captured() as stderr:
        log.event("control_refused", reason=raw)
        assert stderr.line().endswith(f"control client refused: {shown}\n")


def test_a_traceback_can_not_forge_lines_either() -> None:
    with captured() as stderr:
        log.event("bug", where="x", text="one\x1b[31m\r2026-01-01 00:00:00.000 INFO master[1]: stopped\x0btwo")
        _, *rest = stderr.line().split("\n")[:-1]
        assert rest == [r"    one\x1b[31m", "    2026-01-01 00:00:00.000 INFO master[1]: stopped", "    two"]


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_only_events_of_the_level_and_above_are_written(level: str) -> None:
    with captured() as stderr:
        log.configure(level=level)
        for name in ("booting", "listening", "saturated", "bug"):
            log.event(name, **fields_of(name))
        written = [line.split()[2] for line in stderr.writes()]
        assert written == ["DEBUG", "INFO", "WARNING", "ERROR"][("debug", "info", "warning", "error").index(level) :]


def test_changing_the_role_keeps_the_level() -> None:
    with captured() as stderr:
        log.configure(level="error")
        log.configure(role="other")
        log.event("listening", address="x")
        assert stderr.writes() == []


def test_an_unknown_event_or_a_forgotten_field_is_a_key_error() -> None:
    with captured() as stderr:
        with pytest.raises(KeyError):
            log.event("no_such_event")
        with pytest.raises(KeyError, match="address"):
            log.event("listening")
        assert stderr.writes() == []


def test_lines_that_could_not_be_written_are_counted_and_told_once() -> None:
    with captured() as stderr:
        with broken():
            for _ in range(3):
                log.event("listening", address="lost")
        log.event("listening", address="first")
        told, line = stderr.line().splitlines()
        assert told.endswith(": 3 log lines could not be written")
        assert line.endswith("listening on first")
        log.event("listening", address="second")
        assert len(stderr.line().splitlines()) == 1


def test_no_standard_error_at_all_does_not_stop_the_daemon() -> None:
    with captured() as stderr:
        working = os.dup(2)
        os.close(2)
        try:
            log.event("listening", address="nowhere")
        finally:
            os.dup2(working, 2)
            os.close(working)
        log.event("listening", address="somewhere")
        assert "1 log lines could not be written" in stderr.line()
