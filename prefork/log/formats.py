"""An entry of the log as lines: text for people, text for the journal (sd-daemon(3)), JSON for machines; and as entries of the
journal, with fields.

Pure. What comes from users' code or clients must not forge lines or steer a terminal: whatever can't be printed is escaped.
"""

import json
import math
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from prefork.log.events import Level
from prefork.printable import one_line

# Kept free in a line of limited length for everything that is not a user's text.
OVERHEAD = 320
# Of an entry of the journal: what waits there to be read is limited by its sender's buffer, 208 KiB (net.core.wmem_default).
ENTRY_TEXT = 49152
_COLOURS = {Level.DEBUG: "2", Level.INFO: "32", Level.WARNING: "33", Level.ERROR: "1;31"}
# syslog(3)'s, which the journal reads from the beginning of a line.
_PRIORITIES = {Level.DEBUG: 7, Level.INFO: 6, Level.WARNING: 4, Level.ERROR: 3}
# In JSON the message of these events is this field alone: the rest is told by the others, and a text is not written twice.
_OWN_WORDS = {"output": "line", "record": "line"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One event that has happened. ``text`` is a traceback or the like, of many lines."""

    event: str
    level: Level
    message: str
    text: str
    fields: Mapping[str, Any]
    role: str
    process: int
    at: float


def as_text(entry: Entry, *, coloured: bool = False) -> list[str]:
    """Lines for people: when, how bad, who, what; ``text`` indented below."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.at)) + f".{int(entry.at % 1 * 1000):03d}"
    level = f"\x1b[{_COLOURS[entry.level]}m{entry.level.name}\x1b[0m" if coloured else entry.level.name
    return _lines(f"{stamp} {level} {entry.role}[{entry.process}]: ", entry)


def as_journal(entry: Entry) -> list[str]:
    """The same without what the journal knows by itself, each line with its priority."""
    priority = f"<{_PRIORITIES[entry.level]}>"
    return [priority + line for line in _lines(f"{entry.role}[{entry.process}]: ", entry)]


def _lines(head: str, entry: Entry) -> list[str]:
    return [head + one_line(entry.message), *("    " + one_line(line) for line in entry.text.splitlines())]


def as_json(entry: Entry, room: int | None) -> list[str]:
    """One object a line. A text that is too long for ``room`` bytes (None: never) is told in several, ``part`` by part."""
    own = _OWN_WORDS.get(entry.event)
    document = {
        "time": datetime.fromtimestamp(entry.at).astimezone().isoformat(timespec="milliseconds"),
        "level": entry.level.name.lower(),
        "event": entry.event,
        "role": entry.role,
        "process": entry.process,
        "message": _plain(entry.message if own is None else entry.fields[own]),
        **{key: _plain(value) for key, value in entry.fields.items() if key != own},
    }
    if not entry.text:
        return [json.dumps(document)]
    text = _plain(entry.text.rstrip("\n"))
    whole = json.dumps({**document, "text": text})
    if room is None or len(whole) < room:
        return [whole]
    parts = list(cut(text, max(room // 4, room - len(json.dumps(document)) - len(', "text": , "part": 9999, "parts": 9999\n'))))
    return [json.dumps({**document, "text": part, "part": at, "parts": len(parts)}) for at, part in enumerate(parts, 1)]


def as_journal_json(entry: Entry, room: int) -> list[str]:
    """JSON whose priority the journal understands too."""
    return [f"<{_PRIORITIES[entry.level]}>{line}" for line in as_json(entry, room - len("<0>"))]


def as_entries(entry: Entry, *, json_message: bool) -> list[bytes]:
    """Entries of the journal, as a rule one: the message is what another log has as lines. A long text takes several."""
    pieces = list(cut(entry.text, ENTRY_TEXT))
    told = []
    for at, piece in enumerate(pieces, 1):
        part = {} if len(pieces) == 1 else {"part": at, "parts": len(pieces)}
        of_it = replace(entry, text=piece)
        message = as_json(of_it, None) if json_message else _lines(f"{entry.role}: ", of_it)
        fields = {"event": entry.event, "role": entry.role, **entry.fields, **part}
        told.append(
            _field("MESSAGE", "\n".join(message))
            + _field("PRIORITY", str(_PRIORITIES[entry.level]))
            + _field("SYSLOG_IDENTIFIER", "prefork")
            + b"".join(_field(f"PREFORK_{key.upper()}", str(value)) for key, value in fields.items() if value is not None)
        )
    return told


def _field(name: str, value: str) -> bytes:
    data = value.encode("utf-8", "backslashreplace")
    if b"\n" in data:
        return name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"
    return name.encode() + b"=" + data + b"\n"


def _plain(value: Any) -> Any:
    """Numbers stay what they are; what JSON has no word for becomes text."""
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value).encode("utf-8", "backslashreplace").decode()  # a lone surrogate is no Unicode text


def pieces(line: str, room: int) -> Iterator[str]:
    """Of a line for people, which hardly ever needs it: no character takes more than twelve bytes in any format.

    What follows the first piece is indented, or it could be made to look like a line of the log.
    """
    room -= len("    \n")
    if 12 * len(line) <= room or len(line.encode("utf-8", "backslashreplace")) <= room:
        yield line
    else:
        first, *more = cut(line, room)
        yield first
        yield from ("    " + piece for piece in more)


def cut(text: str, room: int) -> Iterator[str]:
    """Pieces that take at most ``room`` bytes in any format; JSON escapes the most."""
    at = 0
    while True:
        size = min(len(text) - at, room)
        while size > 1 and (needed := len(json.dumps(text[at : at + size]))) > room:
            size = max(1, size * room // needed)
        yield text[at : at + size]
        at += size
        if at >= len(text):
            return
