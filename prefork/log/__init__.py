"""The log: the one place that turns events into lines. Code says ``log.event("worker_died", slot=3, ...)``.

`events` names what can happen, `formats` makes lines of it, `sink` gets them out (without waiting, but for a file), `prints` turns
what handlers print into events. Here is what this process logs, how, and where. A line is one write(2); one that can't be written
is counted, and the count is told with the next one that can: the log stops the daemon no longer than its file system hangs.

Files are opened by the master, before anything depends on them; its forks find them open. When the master has opened them again
it counts up a word in the orders of every generation, and whoever writes next looks at it first.
"""

import errno
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from prefork.errors import ConfigError
from prefork.log import formats, prints
from prefork.log.events import ALWAYS, EVENTS, RESERVED, Level
from prefork.log.formats import Entry
from prefork.log.sink import Sink, give
from prefork.pool.scoreboard import LOG_EPOCH
from prefork.system import forks

__all__ = ["ALWAYS", "EVENTS", "RESERVED", "Level", "Output", "Sink", "event"]

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
        level, sentence = EVENTS[name]
        if level >= self.level or name in ALWAYS:
            sink = self.access if name == "access" else self.log
            if sink is not None:
                self._write(sink, [_entry(name, level, sentence.format_map(fields), text, fields)])

    def printed(self, stream: str, lines: list[str]) -> None:
        """Log what a handler has printed: all of it with one write, where that is possible."""
        level, sentence = _STREAM_LEVELS[stream], EVENTS["output"][1]
        entries = []
        for line in lines:
            for piece in formats.cut(line, self.log.room - formats.OVERHEAD):
                fields = {"stream": stream, "line": piece}
                entries.append(_entry("output", level, sentence.format_map(fields), "", fields))
        self._write(self.log, entries)

    def _write(self, sink: Sink, entries: Sequence[Entry]) -> None:
        follow_master()
        sink.settle()
        told = sink.dropped
        lines = [line for entry in entries for line in self._render(sink, entry)]
        if told:
            level, sentence = EVENTS["dropped"]
            lines[:0] = self._render(sink, _entry("dropped", level, sentence.format(count=told), "", {"count": told}))
        lost = sink.write(lines)
        # The first line was the one that tells.
        sink.dropped = told + lost - 1 if told and lost == len(lines) else lost

    def _render(self, sink: Sink, entry: Entry) -> list[bytes]:
        if sink.native:
            return formats.as_entries(entry, json_message=self.format == "json")
        return [(line + "\n").encode("utf-8", "backslashreplace") for line in self._lines(sink, entry)]

    def _lines(self, sink: Sink, entry: Entry) -> list[str]:
        if self.format == "json":
            if sink.journal:
                return formats.as_journal_json(entry, sink.room)
            return formats.as_json(entry, None if sink.whole else sink.room)
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
# Whose files shall be: who runs the handler, when that is not us.
_owner: int | None = None
# The orders of this process' generation, and how often the master had opened the files again when this process last did.
_orders: memoryview | None = None
_epoch = 0


def event(name: str, /, *, text: str = "", **fields: Any) -> None:
    """Log the event ``name``, as `Output.event` does, the way this process logs."""
    _output.event(name, text=text, **fields)


def access_is_logged() -> bool:
    """Whether anybody wants to hear of connections."""
    return _output.access is not None


# -- setting up


def configure(*, role: str | Callable[[], str]) -> None:
    """What this process is called in its lines from now on, or what gives it."""
    global _role
    _role = role


def open_for(settings: Settings) -> Output:
    """The output that settings ask for, with its files opened, unless they are. Raises ConfigError naming key, value, remedy."""
    log = _sink("log_file", "" if settings.log_file == "stderr" else settings.log_file)
    access = None
    if settings.access_log != "off":
        access = log if settings.access_log == "-" else _sink("access_log", settings.access_log)
    return Output(Level[settings.log_level.upper()], settings.log_format, log, access)


def _sink(key: str, path: str) -> Sink:
    found = _sinks.get(path)
    if found is None:
        found = Sink(path)
        try:
            found.open(create=True, owner=_owner)
        except OSError as error:
            raise ConfigError(f"{key} = {path!r}: {_remedy(path, error)}") from None
        _sinks[path] = found
    return found


def _remedy(path: str, error: OSError) -> str:
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
            return "a symbolic link, which is not followed when the handler runs as another user: give the path of the file itself"
        case _:
            return f"{error.strerror}: give another path"


def use(settings: Settings) -> None:
    """Log as the settings say. Raises ConfigError when their files are not open and can't be opened."""
    global _output
    _output = open_for(settings)
    for sink in (_output.log, _output.access):
        reason = sink.shield() if sink is not None else None
        if reason is not None:
            event("log_may_wait", reason=reason)


def keep_only(in_use: Iterable[Settings]) -> None:
    """Close the files that none of these settings asks for."""
    wanted = {path for settings in in_use for path in (settings.log_file, settings.access_log)}
    for path in [path for path in _sinks if path and path not in wanted]:
        _sinks.pop(path).close()


def carry() -> list[tuple[str, int]]:
    """The log files that are open, as path and descriptor, for another program of this process."""
    return [(path, sink.fd) for path, sink in _sinks.items() if path and sink.is_open]


def adopt(files: Iterable[tuple[str, int]], owner: int | None) -> None:
    """Go on with what was `carry`'s; ``owner`` as in `give_to`, which was done. Raises OSError."""
    global _owner
    _owner = owner
    for path, fd in files:
        _sinks[path] = Sink(path)
        _sinks[path].adopt(fd)


def begin_fork_server(settings: Settings, role: str, orders: memoryview) -> None:
    """Log as a process that runs user code, and so do its forks: what it prints is logged, and the master is followed."""
    global _orders, _epoch
    configure(role=role)
    keep_only([settings])
    use(settings)
    _output.log.stand_in()
    _orders, _epoch = orders, 0
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


def descriptors() -> set[int]:
    """What a process must keep open to be heard."""
    return {1, 2, *(sink.fd for sink in (_output.log, _output.access) if sink is not None)}


# -- opening again


def give_to(uid: int) -> None:
    """The handler runs as this user: files are theirs from now on, so that workers can open them again. Raises ConfigError.

    The best time is before `use`: a file that is opened after is also refused when that user may have put a link there.
    """
    global _owner
    _owner = uid
    for path, sink in _sinks.items():
        if path:
            try:
                give(sink.fd, uid)
            except OSError as error:
                raise ConfigError(f"log file {path!r}: can't be given to user {uid}: {error.strerror}") from None


def has_files() -> bool:
    """Whether anything is open that can be opened again."""
    return any(_sinks)


def reopen() -> bool:
    """Open the files by their paths again, making them: for the master, before it tells the others. False if none was."""
    done = _open_again(create=True)
    if done:
        event("reopened", paths=", ".join(done))
    return bool(done)


def follow_master() -> None:
    """Open the files again if the master has; it has made them. Who can't, goes on with the old ones and says so."""
    global _epoch
    if _orders is None or _orders[LOG_EPOCH] == _epoch:
        return
    _epoch = _orders[LOG_EPOCH]
    _open_again(create=False)


def _open_again(*, create: bool) -> list[str]:
    done = []
    for path, sink in _sinks.items():
        if path:
            try:
                sink.open(create=create, owner=_owner if create else None)
            except OSError as error:
                event("log_kept", path=path, reason=error.strerror)
            else:
                done.append(path)
    return done
