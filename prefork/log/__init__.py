"""The log: the one place that turns events into lines. Code says ``log.event("worker_died", slot=3, ...)``.

`events` names what can happen, `formats` makes lines of it, `sink` gets them out without waiting, `prints` turns what handlers
print into events, `records` what they give to Python's `logging`. Here is what this process logs, how, and where. A line is one
write(2); one that can't be written is counted, and the count is told with the next one that can.

A log file is written by a process of its own (`writer`), to which everybody has a `pipe`: a disk that hangs stops nobody else. The
master starts these processes, before anything depends on them (`files`); its forks find the pipes open.
"""

import errno
import os
import selectors
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from prefork.errors import ConfigError, explained
from prefork.log import formats, prints
from prefork.log.events import ALWAYS, EVENTS, RESERVED, Level, sentence
from prefork.log.files import FLUSH, LEAVE, RELOAD, START, CarriedLog, LogFile, Says
from prefork.log.formats import Entry
from prefork.log.pipe import Pipe
from prefork.log.sink import Sink
from prefork.log.writer import Ask
from prefork.system import forks, process, readable

__all__ = ["ALWAYS", "EVENTS", "RESERVED", "Level", "Output", "Sink", "event"]

# Of a logger's name so many bytes are told.
LOGGER = 256
_STREAM_LEVELS = {"stdout": Level.INFO, "stderr": Level.WARNING}


class Settings(Protocol):
    """The part of `prefork.config.Config` that the log reads."""

    @property
    def log_level(self) -> str: ...
    @property
    def log_format(self) -> str: ...
    @property
    def log_file(self) -> str: ...
    @property
    def access_log(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Output:
    """What is logged, how, and where. ``access`` is None when connections are not."""

    level: Level
    format: str
    log: Sink
    access: Sink | None

    def event(self, name: str, /, *, text: str = "", **fields: Any) -> None:
        """Log the event ``name``. Raises KeyError when it, or one of its fields, is unknown: that is a bug of ours."""
        level, _ = EVENTS[name]
        if level >= self.level or name in ALWAYS:
            sink = self.access if name == "access" else self.log
            if sink is not None:
                self._write(sink, [_entry(name, level, sentence(name, fields), text, fields)])

    def printed(self, stream: str, lines: list[str]) -> None:
        """Log what a handler has printed: all of it with one write, where that is possible."""
        level = _STREAM_LEVELS[stream]
        entries = []
        for line in lines:
            for piece in formats.cut(line, self.log.room - formats.OVERHEAD):
                fields = {"stream": stream, "line": piece}
                entries.append(_entry("output", level, sentence("output", fields), "", fields))
        self._write(self.log, entries)

    def record(self, level: Level, logger: str, message: str) -> None:
        """Log what user code has given to `logging`: the first line, and below it, as the text, what follows."""
        logger = next(formats.cut(logger, LOGGER))
        first, *more = message.strip("\n").split("\n", 1)
        line, *rest = formats.cut(first, self.log.room // 2)  # each part of a text comes with it
        text = "\n".join(["".join(rest), *more] if rest else more)
        fields = {"logger": logger, "line": line}
        self._write(self.log, [_entry("record", level, EVENTS["record"][1].format_map(fields), text, fields)])

    def missing(self, sink: Sink, count: int) -> bytes:
        """The line that tells how many lines it lacks."""
        fields = {"count": count}
        return b"".join(self._render(sink, _entry("dropped", EVENTS["dropped"][0], sentence("dropped", fields), "", fields)))

    def _write(self, sink: Sink, entries: Sequence[Entry]) -> None:
        sink.settle()
        told = sink.dropped
        lines = [line for entry in entries for line in self._render(sink, entry)]
        if told:
            lines[:0] = [self.missing(sink, told)]
        lost = sink.write(lines)
        # The first line was the one that tells.
        sink.dropped = told + lost - 1 if told and lost == len(lines) else lost

    def _render(self, sink: Sink, entry: Entry) -> list[bytes]:
        if sink.native:
            return formats.as_entries(entry, json_message=self.format == "json")
        lines = self._lines(sink, entry)
        if self.format == "text" and sink.most is not None and not sink.journal:
            lines = [piece for line in lines for piece in formats.pieces(line, sink.most)]
        return [(line + "\n").encode("utf-8", "backslashreplace") for line in lines]

    def _lines(self, sink: Sink, entry: Entry) -> list[str]:
        if self.format == "json":
            if sink.journal:
                return formats.as_journal_json(entry, sink.room)
            return formats.as_json(entry, sink.most)
        if sink.journal:
            return formats.as_journal(entry)
        return formats.as_text(entry, coloured=sink.terminal and colours_wanted())


def _entry(name: str, level: Level, message: str, text: str, fields: dict[str, Any]) -> Entry:
    return Entry(name, level, message, text, fields, _role if isinstance(_role, str) else _role(), os.getpid(), time.time())


def colours_wanted() -> bool:
    """https://no-color.org: set, and not empty."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


# What this process is called in its lines.
_role: str | Callable[[], str] = "master"
# Every sink that is open, by its path.
_sinks: dict[str, Sink] = {"": Sink()}
_output = Output(Level.INFO, "text", _sinks[""], None)
# The files, by their paths; in the master only.
_files: dict[str, LogFile] = {}
# Whose files shall be: who runs the handler, when that is not us.
_owner: int | None = None
# The pids of the master's children that are no workers, and what hears them.
_strangers: set[int] = set()
_selector: selectors.BaseSelector | None = None


def event(name: str, /, *, text: str = "", **fields: Any) -> None:
    """Log the event ``name``, as `Output.event` does, the way this process logs."""
    _output.event(name, text=text, **fields)


def takes(level: Level) -> bool:
    """Whether a record of this level is logged."""
    return level >= _output.level


def record(level: Level, logger: str, message: str) -> None:
    """Log a record of `logging`, if its level is logged."""
    if takes(level):
        _output.record(level, logger, message)


def hears_user_code() -> bool:
    """Whether this process, or the one that it was forked from, has begun as a fork server."""
    return prints.are_logged()


def _missing(sink: Sink, count: int) -> bytes:
    """The line that tells how many are."""
    return _output.missing(sink, count)


def access_is_logged() -> bool:
    """Whether anybody wants to hear of connections."""
    return _output.access is not None


# -- setting up


def configure(*, role: str | Callable[[], str]) -> None:
    """What this process is called in its lines from now on, or what gives it."""
    global _role
    _role = role


def of_master(strangers: set[int], owner: int | None) -> None:
    """This process starts those that write files. ``strangers`` get their pids.

    ``owner``: who runs the handler, when that is another user. Files are theirs; one that they may have put a link in the place of
    is refused.
    """
    global _strangers, _owner
    _strangers, _owner = strangers, owner


def open_for(settings: Settings, patience: float = RELOAD) -> Output:
    """The output that settings ask for, with its files opened, unless they are. Raises ConfigError naming key, value, remedy.

    A file that is not open after ``patience`` seconds can't be opened.
    """
    log = _sink("log_file", "" if settings.log_file == "stderr" else settings.log_file, patience)
    access = None
    if settings.access_log != "off":
        access = log if settings.access_log == "-" else _sink("access_log", settings.access_log, patience)
    return Output(Level[settings.log_level.upper()], settings.log_format, log, access)


def _sink(key: str, path: str, patience: float) -> Sink:
    found = _sinks.get(path)
    if found is None:
        file = LogFile(path, _owner, Says(event, _missing), _strangers)
        try:
            file.open(patience)
        except OSError as error:
            raise ConfigError(f"{key} = {path!r}: {_remedy(key, path, error)}") from None
        if _selector is not None:
            file.watch(_selector)
        _files[path] = file
        found = _sinks[path] = file.pipe
    return found


def _remedy(key: str, path: str, error: OSError) -> str:
    if (
        error.errno in (errno.ENOENT, errno.EACCES, errno.EROFS)
        and (hidden := readable.hidden_by(os.path.dirname(path))) is not None
    ):
        return f"{error.strerror}: {hidden}"
    match error.errno:
        case errno.EISDIR:
            return "is a directory: give the path of a file"
        case errno.ENOENT | errno.ENOTDIR:
            return f"{os.path.dirname(path)} is no directory: make it, or give another path"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return f"{error.strerror}: let user {os.geteuid()} write there, or give another path"
        case errno.ENXIO:
            return "a socket, or a FIFO that nobody reads: give the path of a file"
        case errno.ELOOP:
            word = "- for the log" if key == "access_log" else "stderr"  # of who has asked for /dev/stdout or /dev/stderr
            return (
                f"a symbolic link, which is not followed when the handler runs as another user: give the file's own path, or {word}"
            )
        case _:
            return explained(error, "give another path")


def use(settings: Settings) -> None:
    """Log as the settings say. Raises ConfigError when their files are not open and can't be opened."""
    global _output
    try:
        _output = open_for(settings, START)
    except ConfigError:
        finish()
        raise
    for sink in (_output.log, _output.access):
        reason = sink.shield() if sink is not None else None
        if reason is not None:
            event("log_may_wait", reason=reason)


def keep_only(in_use: Iterable[Settings]) -> None:
    """Close the files that none of these settings asks for."""
    wanted = {path for settings in in_use for path in (settings.log_file, settings.access_log)}
    for path in [path for path in _sinks if path and path not in wanted]:
        sink, file = _sinks.pop(path), _files.pop(path, None)
        if file is None:
            sink.close()
        else:
            file.close()


def carry() -> list[CarriedLog]:
    """The log files, for another program of this process."""
    return [file.carry() for file in _files.values()]


def adopt(files: Iterable[CarriedLog]) -> None:
    """Go on with what was `carry`'s; after `of_master`. Raises OSError."""
    for carried in files:
        _files[carried.path] = LogFile.adopted(carried, _owner, Says(event, _missing), _strangers)
        _sinks[carried.path] = _files[carried.path].pipe


def begin_fork_server(settings: Settings, role: str) -> None:
    """Log as a process that runs user code, and so do its forks: what it prints is logged."""
    global _selector
    configure(role=role)
    _files.clear()
    _selector = None
    keep_only([settings])
    use(settings)
    for pipe in _pipes():
        process.reopening(pipe.fd)()
        pipe.begin_to_wait()
    _output.log.stand_in()
    prints.install(_output.printed)
    # What the parent has dropped is the parent's to tell.
    forks.in_child(_forget_dropped)
    _forget_dropped()


def has_dropped() -> bool:
    """Whether lines were lost that this process has to tell of."""
    return any(sink.dropped for sink in _sinks.values())


def _forget_dropped() -> None:
    for sink in _sinks.values():
        sink.dropped = 0


def finish_prints() -> None:
    """Tell what user code has printed without ending the line."""
    prints.finish()


def _pipes() -> list[Pipe]:
    return [sink for sink in _sinks.values() if isinstance(sink, Pipe)]


def pipes() -> list[int]:
    """Writing ends of the pipes to those who write files."""
    return [pipe.fd for pipe in _pipes()]


def descriptors() -> set[int]:
    """What a process must keep open to be heard."""
    return {1, 2, *(sink.fd for sink in (_output.log, _output.access) if sink is not None)}


# -- the files, in the master


def watch(selector: selectors.BaseSelector) -> None:
    """Hear by this selector what the processes that write files have to tell."""
    global _selector
    _selector = selector
    for file in _files.values():
        file.watch(selector)


def child_ended(pid: int, status: int, now: float) -> None:
    """A child of this process has ended, with this wait status; one of those perhaps."""
    for file in _files.values():
        file.ended(pid, status, now)


def tend(now: float) -> None:
    """Start those that have ended again, when it is time."""
    for file in _files.values():
        file.tend(now)


def wake_at(now: float) -> float | None:
    """When it will be."""
    times = [file.wake_at(now) for file in _files.values()]
    return min((at for at in times if at is not None), default=None)


def has_files() -> bool:
    """Whether anything is open that can be opened again."""
    return bool(_files)


def reopen() -> None:
    """Have the files opened again by their paths. Events tell when that is done, or why a file is written on as it is."""
    for file in _files.values():
        if not file.ask(Ask.REOPEN):
            event("log_kept", path=file.path, reason="the process that writes it does not hear")


def renew() -> None:
    """Have other processes write the files: those of another program that this process was."""
    for file in _files.values():
        file.ask(Ask.LEAVE)


def finish() -> None:
    """The daemon ends: what was logged gets a moment to be written. Standard error is the log again."""
    global _output, _selector
    deadline = time.monotonic() + FLUSH
    for file in _files.values():
        file.flush()
    for file in _files.values():
        file.flushed(deadline)
    deadline = time.monotonic() + LEAVE
    for file in _files.values():
        file.end(deadline)
        del _sinks[file.path]
    _files.clear()
    _selector = None
    _output = Output(_output.level, _output.format, _sinks[""], None)
