"""The log's lines: whole, told apart, and never in the way."""

import array
import ast
import json
import os
import re
import resource
import socket
import string
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import prefork
from prefork import log
from prefork.config import Config
from prefork.errors import ConfigError
from prefork.log import EVENTS, RESERVED, Level, Output, Sink, formats, prints, sink
from prefork.log.events import ALWAYS, sentence, template
from tests import log_schema


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
def _fresh_log(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    plain = Sink()
    state = {"_role": "master", "_sinks": {"": plain}, "_output": Output(Level.INFO, "text", plain, None), "_files": {}}
    for name, value in state.items():
        monkeypatch.setattr(log, name, value)
    yield
    log.finish()
    plain.close()


def use(**settings: Any) -> None:
    log.use(Config(module="echo:loop", **settings))


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
        use(log_level="debug", access_log="-")
        log.event(name, **fields_of(name))
        line = stderr.line()
        assert f" {EVENTS[name][0].name} master[" in line
        for value in fields_of(name).values():
            assert (str(value) if isinstance(value, str) else "1.2") in line


def test_every_event_is_logged_somewhere_with_the_fields_that_its_sentence_needs() -> None:
    logged: set[str] = set()
    for path in Path(prefork.__file__).parent.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] == "event" and call.args):
                continue
            if not isinstance(call.args[0], ast.Constant):
                continue  # passed on
            name = ast.literal_eval(call.args[0])
            given = {keyword.arg for keyword in call.keywords}
            logged.add(name)
            assert None in given or set(fields_of(name)) <= given, f"{path}:{call.lineno}"
            assert not (given - {"text"}) & RESERVED, f"{path}:{call.lineno}"
    # The log's own three: what it could not write, what handlers print, and what they give to `logging`.
    assert logged | {"dropped", "output", "record"} == set(EVENTS)


@pytest.mark.parametrize("name", EVENTS)
def test_one_of_a_kind_is_told_in_the_singular(name: str) -> None:
    fields = {field: spec or "" for _, field, spec, _ in string.Formatter().parse(EVENTS[name][1]) if field is not None}
    told = sentence(name, {field: 1 if "|" in fields[field] else 1.5 if fields[field] else "x" for field in fields})
    assert not re.search(r"\b1 \w+s\b", told)
    for noun in ("connections", "acceptors", "workers", "lines", "crashes", "failures", "reports", "tracebacks"):
        assert f"}} {noun}" not in EVENTS[name][1], "a number stands before it"


def test_many_of_a_kind_are_told_in_the_plural() -> None:
    assert sentence("not_left", {"count": 1, "generation": 3, "who": "x"}) == (
        "1 worker of generation 3 was asked to leave and has not left: x"
    )
    assert sentence("not_left", {"count": 0, "generation": 3, "who": "x"}) == (
        "0 workers of generation 3 were asked to leave and have not left: x"
    )
    assert template("not_left") == "{count} workers of generation {generation} were asked to leave and have not left: {who}"


@pytest.mark.parametrize("name", EVENTS)
def test_no_event_has_a_field_that_every_line_has(name: str) -> None:
    assert not set(fields_of(name)) & RESERVED


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


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize("character", ["x", "\x1b", "é", "😀", "\u2028"])
@pytest.mark.parametrize("where", ["logger", "message", "text"])
def test_no_part_of_a_record_makes_a_line_of_its_own(where: str, character: str, log_format: str) -> None:
    long, forged = character * (9000 // len(json.dumps(character)[1:-1])), "2026-01-01 00:00:00.000 INFO master[1]: stopped"
    value = f"{long}{forged}"
    given = {"logger": "mine", "message": "said", "text": "more", where: value}
    with captured() as stderr:
        use(log_format=log_format)
        log.record(Level.INFO, given["logger"], f"{given['message']}\n{given['text']}")
        lines = "".join(stderr.writes()).split("\n")[:-1]
        assert all(len(line.encode()) < sink.PIPE_BUF for line in lines)
        if log_format == "text":
            assert [line for line in lines if not line.startswith("    ")] == lines[:1]
            told = "".join(line.removeprefix("    ") for line in lines)
        else:
            entries = list(log_schema.read("\n".join(lines) + "\n"))
            assert {entry["event"] for entry in entries} == {"record"}
            told = entries[0]["message"] + "".join(entry["text"] for entry in entries)
        if where == "logger":
            assert forged not in told  # so much of a name is not told
        else:
            assert forged in told


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_an_empty_record_is_a_line(log_format: str) -> None:
    with captured() as stderr:
        use(log_format=log_format)
        for message in ("", "\n\n"):
            log.record(Level.INFO, "", message)
        assert len("".join(stderr.writes()).splitlines()) == 2


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_only_events_of_the_level_and_above_are_written(level: str) -> None:
    with captured() as stderr:
        use(log_level=level)
        for name in ("booting", "listening", "saturated", "bug"):
            log.event(name, **fields_of(name))
        written = [line.split()[2] for line in stderr.writes()]
        assert written == ["DEBUG", "INFO", "WARNING", "ERROR"][("debug", "info", "warning", "error").index(level) :]


def test_changing_the_role_keeps_the_level() -> None:
    with captured() as stderr:
        use(log_level="error")
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
        assert "1 log line could not be written" in stderr.line()


# -- JSON


def values_for(name: str) -> dict[str, Any]:
    """Fields of the kinds that the program gives: numbers, text, and objects of any kind."""
    kinds: dict[str, Any] = {"outcome": "ok", "stream": "stdout", "duration": 0.25, "seconds": 1.5}
    numbers = {key for key, kind in log_schema.FIELDS.items() if kind is log_schema.WHOLE}
    return {key: kinds.get(key, 7 if key in numbers else ValueError(f"<{key}>")) for key in fields_of(name)}


@pytest.mark.parametrize("name", EVENTS)
def test_every_event_is_a_json_object_of_the_documented_shape(name: str) -> None:
    with captured() as stderr:
        use(log_level="debug", log_format="json", access_log="-")
        given = values_for(name)
        log.event(name, text="Traceback\n" if name == "handler_error" else "", **given)
        [entry] = log_schema.read(stderr.line())
        assert (entry["event"], entry["level"], entry["process"]) == (name, EVENTS[name][0].name.lower(), os.getpid())
        own = given.pop("line", None)
        assert entry["message"] == (str(own) if own is not None else sentence(name, given))
        for key, value in given.items():
            assert entry[key] == (value if isinstance(value, int | float) else str(value))


@pytest.mark.parametrize("raw", ["a\nb", "\x1b[2J", "\udcff", "\u2028", "\x9b", '"\\', "é 😀", "\0"])
def test_no_text_breaks_a_json_line_or_steers_a_terminal(raw: str) -> None:
    with captured() as stderr:
        use(log_format="json")
        log.event("bug", where=raw, text=f"one\n{raw}")
        line = stderr.line()
        assert line.isascii()
        assert line[:-1].isprintable()
        [entry] = log_schema.read(line)
        expected = "\\udcff" if raw == "\udcff" else raw
        assert (entry["where"], entry["text"]) == (expected, f"one\n{expected}".rstrip("\n"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_json_does_not_know_are_text(value: float) -> None:
    with captured() as stderr:
        use(log_format="json")
        log.event("stopped", accepted=value, killed=True)
        entry = json.loads(stderr.line(), parse_constant=pytest.fail)
        assert (entry["accepted"], entry["killed"]) == (str(value), True)


def test_a_long_traceback_is_whole_in_a_file_and_in_parts_on_a_pipe(tmp_path: Path) -> None:
    text = "".join(f'line {number} "{chr(233) * (number % 50)}"\n' for number in range(500)).rstrip("\n")
    with captured() as stderr:
        use(log_format="json")
        log.event("bug", where="x", text=text)
        writes = stderr.writes()
        assert all(len(write) <= 4096 and write.endswith("\n") for write in writes)
        entries = list(log_schema.read("".join(writes)))
        assert [entry["part"] for entry in entries] == list(range(1, len(entries) + 1))
        assert {entry["parts"] for entry in entries} == {len(entries)}
        assert "".join(entry["text"] for entry in entries) == text
    use(log_format="json", log_file=str(tmp_path / "log"))
    log.event("bug", where="x", text=text)
    log.finish()
    [entry] = log_schema.read((tmp_path / "log").read_text())
    assert entry["text"] == text
    assert "part" not in entry


# -- what they are called


def test_connections_and_prints_are_logged_whatever_the_level() -> None:
    assert set(EVENTS) >= ALWAYS
    with captured() as stderr:
        use(log_level="error", access_log="-")
        log.event("access", **fields_of("access"))
        log._output.printed("stderr", ["printed"])
        access, printed = stderr.writes()
        assert " INFO master" in access
        assert printed.endswith(f" WARNING master[{os.getpid()}]: stderr: printed\n")


def test_connections_are_not_logged_unless_somebody_asked() -> None:
    with captured() as stderr:
        use()
        assert not log.access_is_logged()
        log.event("access", **fields_of("access"))
        assert stderr.writes() == []


def test_the_access_log_may_be_the_log_or_a_file_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "access"
    with captured() as stderr:
        use(access_log=str(path), log_format="json")
        log.event("access", **fields_of("access"))
        assert stderr.writes() == []
        use(log_file=str(path), access_log=str(path))
        assert log._output.access is log._output.log
        log.finish()
        assert json.loads(path.read_text())["event"] == "access"
        assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("key", "word"), [("access_log", "- for the log"), ("log_file", "stderr")])
def test_a_link_that_is_not_followed_is_refused_with_what_works(key: str, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_owner", os.geteuid())
    with pytest.raises(ConfigError, match=rf"^{key} = '/dev/stdout': a symbolic link, .* or {word}$"):
        use(**{key: "/dev/stdout"})


# -- terminals and the journal


@contextmanager
def terminal() -> Iterator[int]:
    """A terminal as standard error; the other end, which does not block."""
    master, slave = os.openpty()
    os.set_blocking(master, False)
    try:
        with descriptor_2(slave):
            yield master
    finally:
        os.close(master)
        os.close(slave)


@pytest.mark.parametrize(
    ("environment", "log_format", "coloured"),
    [
        ({"TERM": "xterm"}, "text", True),
        ({"TERM": "xterm", "NO_COLOR": ""}, "text", True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, "text", False),
        ({"TERM": "dumb"}, "text", False),
        ({"TERM": "xterm"}, "json", False),
    ],
)
def test_levels_are_coloured_on_a_terminal_only_and_by_consent(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], log_format: str, *, coloured: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with terminal() as screen:
        use(log_format=log_format)
        log.event("bug", where="x")
        shown = os.read(screen, 4096).decode()
        assert ("\x1b[1;31mERROR\x1b[0m master[" in shown) == coloured
        assert ("\x1b" in shown) == coloured


def test_levels_are_coloured_nowhere_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with captured() as stderr:
        use()
        log.event("bug", where="x")
        assert "\x1b" not in stderr.line()
    use(log_file=str(tmp_path / "log"))
    log.event("bug", where="x")
    log.finish()
    assert "\x1b" not in (tmp_path / "log").read_text()


def test_a_terminal_that_is_stopped_makes_nobody_wait() -> None:
    with terminal() as screen:
        use()
        for _ in range(3000):
            log.event("bug", where="x" * 100)
        assert log._sinks[""].dropped > 0
        while True:
            try:
                os.read(screen, 65536)
            except BlockingIOError:
                break
        log.event("bug", where="again")
        assert b" could not be written" in os.read(screen, 65536)


@contextmanager
def journal(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A stream socket as standard error that is named as the journal's, and its other end."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    found = os.fstat(theirs.fileno())
    monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
    with ours, theirs, descriptor_2(theirs.fileno()):
        yield ours


def test_the_journal_is_told_the_priority_of_each_line_and_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with journal(monkeypatch) as end:
        use(log_level="debug")
        for name in ("booting", "listening", "saturated"):
            log.event(name, **fields_of(name))
        log.event("bug", where="x", text="Traceback\n  File\n")
        lines = end.recv(65536).decode().splitlines()
        me = f"master[{os.getpid()}]: "
        assert lines[0] == f"<7>{me}generation <generation> starts: <module>"
        assert [line[:3] for line in lines] == ["<7>", "<6>", "<4>", "<3>", "<3>", "<3>"]
        assert lines[3:] == [f"<3>{me}internal error in the x, please report it", "<3>    Traceback", "<3>      File"]


def test_the_journal_is_told_the_priority_of_json_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with journal(monkeypatch) as end:
        use(log_format="json")
        log.event("bug", where="x", text="y" * 10_000)
        lines = end.recv(65536).decode().splitlines()
        assert {line[:3] for line in lines} == {"<3>"}
        assert all(len(line) < 4096 for line in lines)
        assert len(list(log_schema.read("".join(line[3:] + "\n" for line in lines)))) == 3


class Journal:
    """A journal's two sockets, of which standard error is connected to the first."""

    def __init__(self, folder: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.bind(str(folder / "stdout"))
        listener.listen()
        client = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        client.connect(str(folder / "stdout"))
        self.stream = stack.enter_context(listener.accept()[0])
        self.stream.setblocking(False)
        self.entries = stack.enter_context(self.opened())
        found = os.fstat(client.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
        stack.enter_context(descriptor_2(client.fileno()))

    def opened(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        sock.bind(str(self.folder / "socket"))
        sock.setblocking(False)
        return sock

    def entry(self) -> dict[str, str]:
        """The next one, as its fields."""
        data, found = self.entries.recv(1 << 20), {}
        while data:
            line, _, data = data.partition(b"\n")
            name, equals, value = line.partition(b"=")
            if not equals:
                length = int.from_bytes(data[:8], "little")
                value, data = data[8 : 8 + length], data[8 + length + 1 :]
            found[name.decode()] = value.decode()
        return found


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[ExitStack], Journal]:
    # Standard error is pytest's between a fixture and its test.
    return lambda stack: Journal(tmp_path, stack, monkeypatch)


def test_the_journal_gets_fields(opened: Callable[[ExitStack], Journal]) -> None:
    with ExitStack() as stack:
        journald = opened(stack)
        use()
        log.event("fork_failed", reason="no memory", failures=3, seconds=0.5)
        assert journald.entry() == {
            "MESSAGE": "master: fork failed: no memory; 3 in a row, next try in 0.5 s",
            "PRIORITY": "3",
            "SYSLOG_IDENTIFIER": "prefork",
            "PREFORK_EVENT": "fork_failed",
            "PREFORK_ROLE": "master",
            "PREFORK_REASON": "no memory",
            "PREFORK_FAILURES": "3",
            "PREFORK_SECONDS": "0.5",
        }
        log.event("bug", where="x", text="Traceback\n  File\x1b\nKeyError\n")
        message = journald.entry()["MESSAGE"]
        assert message == "master: internal error in the x, please report it\n    Traceback\n      File\\x1b\n    KeyError"
        with pytest.raises(BlockingIOError):
            journald.stream.recv(1)


def test_a_record_of_logging_is_an_entry_of_the_journal(opened: Callable[[ExitStack], Journal]) -> None:
    with ExitStack() as stack:
        journald = opened(stack)
        use()
        log.record(Level.ERROR, "mine.part", "it failed\nTraceback:\n  File x\n<0>KeyError\x1b\n")
        entry = journald.entry()
        assert entry["MESSAGE"] == "master: mine.part: it failed\n    Traceback:\n      File x\n    <0>KeyError\\x1b"
        assert (entry["PRIORITY"], entry["PREFORK_EVENT"], entry["PREFORK_LOGGER"]) == ("3", "record", "mine.part")


def test_json_is_the_message_of_the_journals_entry(opened: Callable[[ExitStack], Journal]) -> None:
    with ExitStack() as stack:
        journald = opened(stack)
        use(log_format="json")
        log.event("bug", where="a\nb", text="y" * 10_000)
        entry = journald.entry()
        [document] = log_schema.read(entry["MESSAGE"] + "\n")
        assert (document["event"], document["where"], len(document["text"])) == ("bug", "a\nb", 10_000)
        assert (entry["PRIORITY"], entry["PREFORK_WHERE"]) == ("3", "a\nb")


def test_a_text_that_no_datagram_takes_comes_in_parts(opened: Callable[[ExitStack], Journal]) -> None:
    with ExitStack() as stack:
        journald = opened(stack)
        use()
        log.event("bug", where="x", text="z" * 100_000)
        entries = [journald.entry() for _ in range(3)]
        assert [entry["PREFORK_PART"] + "/" + entry["PREFORK_PARTS"] for entry in entries] == [f"{n}/3" for n in range(1, 4)]
        assert sum(entry["MESSAGE"].count("z") for entry in entries) == 100_000


def test_a_journal_that_is_full_makes_nobody_wait_and_is_told_of_what_it_missed(opened: Callable[[ExitStack], Journal]) -> None:
    with ExitStack() as stack:
        journald = opened(stack)
        use()
        for _ in range(2000):
            log.event("bug", where="x" * 1000)
        dropped = log._sinks[""].dropped
        assert dropped > 0
        empty(journald.entries)
        log.event("bug", where="again")
        assert journald.entry()["MESSAGE"] == f"master: {dropped} log lines could not be written"
        assert journald.entry()["PREFORK_WHERE"] == "again"


def test_a_journal_that_has_been_opened_anew_is_found_again(opened: Callable[[ExitStack], Journal]) -> None:
    with ExitStack() as stack:
        journald = opened(stack)
        use()
        journald.entries.close()
        log.event("bug", where="lost")
        (journald.folder / "socket").unlink()
        with journald.opened() as journald.entries:
            log.event("bug", where="found")
            assert journald.entry()["PREFORK_COUNT"] == "1"
            assert journald.entry()["PREFORK_WHERE"] == "found"
        # Without one there is the stream.
        (journald.folder / "socket").unlink()
        for where in ("lost", "text"):
            log.event("bug", where=where)
        assert (
            journald.stream.recv(4096).decode().splitlines()[-1].startswith(f"<3>master[{os.getpid()}]: internal error in the text")
        )


@pytest.mark.parametrize("named", ["", "1:2", "nonsense"])
def test_another_standard_error_is_not_the_journal(monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    with captured() as stderr:
        monkeypatch.setenv("JOURNAL_STREAM", named)
        use()
        log.event("bug", where="x")
        assert re.match(r"\d{4}-", stderr.line())


def empty(end: socket.socket) -> None:
    """Read all that waits there."""
    while True:
        try:
            end.recv(1 << 20)
        except BlockingIOError:
            return


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_a_socket_that_nobody_empties_makes_nobody_wait(kind: socket.SocketKind) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    ours.setblocking(False)
    with ours, theirs, descriptor_2(theirs.fileno()):
        use()
        written = 0
        while not log._sinks[""].dropped:
            written += 1
            log.event("listening", address="x" * 1000)
        log.event("listening", address="also lost")
        empty(ours)
        log.event("listening", address="first")
        lines = ours.recv(1 << 20).decode().splitlines()
        assert re.search(r"\d+ log lines? could not be written$", lines[-2])
        assert lines[-1].endswith("listening on first")


# -- files


def messages(path: Path) -> list[str]:
    return [line.partition("]: ")[2] or line for line in path.read_text().splitlines()]


def to_a_file(path: Path) -> Output:
    """Lines are written to it by this process itself."""
    file = Sink(str(path))
    file.open(create=True)
    return Output(Level.INFO, "text", file, None)


def test_a_line_that_was_torn_is_ended_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = to_a_file(path)
    log.event("listening", address="one")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, before[1]))
    try:
        log.event("listening", address="torn")
        log.event("listening", address="lost")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    log.event("listening", address="two")
    log.event("listening", address="three")
    log.log.close()
    first, torn, *rest = messages(path)
    assert first == "listening on one"
    assert len(torn) == 20
    assert rest == ["2 log lines could not be written", "listening on two", "listening on three"]


def test_a_line_that_another_process_tore_is_ended_too(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = to_a_file(path)
    log.event("listening", address="one")
    pid = os.fork()
    if pid == 0:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20,) * 2)
            log.event("listening", address="torn")
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    log.event("listening", address="two")
    log.log.close()
    assert [len(line) if at == 1 else line for at, line in enumerate(messages(path))] == [
        "listening on one",
        20,
        "listening on two",
    ]


# -- prints


class Told:
    """What a stream tells."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.calls = 0

    def __call__(self, stream: str, lines: list[str]) -> None:
        assert stream == "stdout"
        self.lines += lines
        self.calls += 1


@contextmanager
def printing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Told]:
    """The streams that fork servers and workers have, for this process."""
    with ExitStack() as stack:
        for name in ("stdout", "stderr", "__stdout__", "__stderr__"):
            stack.callback(setattr, sys, name, getattr(sys, name))
        monkeypatch.setattr(prints, "_installed", [])
        told = Told()
        prints.install(told)
        yield told


def test_each_whole_line_is_told_once_and_the_rest_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with printing(monkeypatch) as told:
        print("one", 2)
        print("begun", end="", flush=True)
        assert told.lines == ["one 2"]
        print(" and ended\r\ntwo\n\nthree", end="")
        assert told.lines == ["one 2", "begun and ended", "two", ""]
        prints.finish()
        prints.finish()
        assert told.lines[4:] == ["three"]


def test_the_streams_are_what_programs_expect_of_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    with printing(monkeypatch) as told:
        sys.stdout.buffer.write(b"by\xff")
        sys.stdout.buffer.write(memoryview(b"tes\n"))
        sys.stdout.write("\udc80 \u2028 \U0001f600\n")
        sys.stdout.writelines(["a\n", "b\n"])
        assert told.lines == ["by\\xfftes", "\\udc80 \u2028 \U0001f600", "a", "b"]
        assert (sys.stdout.fileno(), sys.stderr.fileno(), sys.stdout.isatty()) == (1, 2, False)
        assert (sys.stdout.encoding, sys.stdout.writable(), sys.stdout.readable()) == ("utf-8", True, False)
        sys.stdout.close()
        with pytest.raises(ValueError, match="closed file"):
            print("closed")
        prints.finish()


def test_lines_that_are_printed_together_are_told_together(monkeypatch: pytest.MonkeyPatch) -> None:
    with printing(monkeypatch) as told:
        sys.stdout.write("one\ntwo\nthree\n")
        assert (told.lines, told.calls) == (["one", "two", "three"], 1)


@pytest.mark.parametrize("character", ["x", "é", "日", "😀"])
def test_a_line_without_end_is_told_in_pieces_that_cut_no_character(monkeypatch: pytest.MonkeyPatch, character: str) -> None:
    text = "." + character * 50_000
    with printing(monkeypatch) as told:
        for at in range(0, len(text), 1000):
            sys.stdout.write(text[at : at + 1000])
        sys.stdout.write(text)
        prints.finish()
        assert "".join(told.lines) == text * 2
        assert all(len(line.encode()) <= prints.LONGEST for line in told.lines)


def test_a_fork_does_not_tell_again_what_its_parent_has_begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with printing(monkeypatch) as told:
        print("begun", end="")
        pid = os.fork()
        if pid == 0:
            try:
                print("child")
                prints.finish()
                (tmp_path / "told").write_text(repr(told.lines))
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        assert (tmp_path / "told").read_text() == "['child']"
        prints.finish()
        assert told.lines == ["begun"]


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize("character", ["x", "\x00", "é", "\u202e", "😀", "\U000e0001"])
def test_a_long_print_is_in_pieces_that_a_pipe_takes_whole(log_format: str, character: str) -> None:
    with captured() as stderr:
        use(log_format=log_format)
        log.configure(role=f"gen {1 << 31} worker {1 << 20}")
        log._output.printed("stdout", [character * 5000, "short"])
        written = "".join(stderr.writes())
        lines = written.splitlines() if log_format == "text" else [json.dumps(entry) for entry in log_schema.read(written)]
        assert all(len(line.encode()) < sink.PIPE_BUF for line in lines)
        shown = "".join(line.partition("stdout: ")[2] for line in lines) if log_format == "text" else ""
        told = "".join(json.loads(line)["message"] for line in lines) if log_format == "json" else ""
        assert shown + told == ((character if character.isprintable() or told else repr(character)[1:-1]) * 5000) + "short"


@pytest.mark.parametrize("printed", [b"x", b"x\n"], ids=["one line", "many lines"])
def test_what_is_printed_at_once_takes_no_memory_of_its_own_length(printed: bytes) -> None:
    """Nor does it take the square of it in time: whatever is copied again and again would be seen as memory here."""
    size = [0]

    def say(_stream: str, lines: list[str]) -> None:
        size[0] += sum(map(len, lines))

    data = printed * ((4 << 20) // len(printed))
    lines = prints.Lines(1, "stdout", say)
    tracemalloc.start()
    try:
        assert lines.write(data) == len(data)
        lines.finish()
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size[0] == data.count(b"x")
    assert most < 2 << 20, f"{most} bytes at once"


def test_a_long_text_is_cut_without_copying_what_is_left_of_it() -> None:
    text = "x" * (4 << 20)
    tracemalloc.start()
    try:
        assert sum(map(len, formats.cut(text, 4096))) == len(text)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 1 << 18, f"{most} bytes at once"


def test_all_kinds_of_buffers_can_be_printed() -> None:
    told: list[str] = []
    lines = prints.Lines(1, "stdout", lambda _stream, more: told.extend(more))
    wide = memoryview(array.array("I", [int.from_bytes(b"abc\n", sys.byteorder)] * 2))
    for buffer, length in ((b"", 0), (memoryview(b"1-2-\n-")[::2], 3), (bytearray(b"\n"), 1), (wide, 8)):
        assert lines.write(buffer) == length
    assert told == ["12", "", "abc", "abc"]


def test_pieces_are_as_long_as_may_be() -> None:
    assert list(formats.cut("", 10)) == [""]
    assert list(formats.cut("x" * 20, 10)) == ["x" * 8, "x" * 8, "x" * 4]
    assert "".join(formats.cut("\x00" * 7, 8)) == "\x00" * 7
    assert list(formats.cut("x" * 8, 10)) == ["x" * 8]


def test_events_and_their_fields_are_those_that_were_promised() -> None:
    told = {
        name: list(dict.fromkeys(field for _, field, _, _ in string.Formatter().parse(words) if field))
        for name, (_, words) in EVENTS.items()
    }
    assert told == log_schema.EVENT_FIELDS
