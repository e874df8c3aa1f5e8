"""What handlers print: ``sys.stdout`` and ``sys.stderr`` of fork servers and workers, which turn whole lines into log lines.

They are ordinary text streams over a buffer of our own, so that ``print(flush=True)``, ``.buffer``, ``logging.StreamHandler`` and
``fileno()`` (for faulthandler and subprocesses) do what they do elsewhere. A line that has not ended yet is kept until it does,
until `finish`, or until it is too long; a fork's child forgets it, or it would be told twice.
"""

import io
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from prefork.system import forks

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

# More of a line is not waited for.
LONGEST = 65536
# Of more than this a line is made at a time: one of two bytes takes 700 on its way.
AT_ONCE = 16384
_NAMES = ("stdout", "stderr")

# Tells lines of a stream: its name, and the lines without their ends.
Say = Callable[[str, list[str]], None]


class Lines(io.BufferedIOBase):
    """The buffer below one of the streams."""

    def __init__(self, number: int, name: str, say: Say) -> None:
        super().__init__()
        self.name = f"<{name}>"
        self.mode = "wb"
        self._number = number
        self._stream = name
        self._say = say
        self.forget()

    def forget(self) -> None:
        """Be as new. The lock too: in a fork's child it may be held by a thread that was not copied."""
        self._begun = b""
        self._lock = threading.RLock()

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._number

    def write(self, data: "ReadableBuffer", /) -> int:
        """Take bytes; tell the lines that they end."""
        if self.closed:
            raise ValueError("write to closed file")
        with memoryview(data) as view:
            size = view.nbytes
            given = view.cast("B") if view.c_contiguous and size else memoryview(view.tobytes())
            with given, self._lock:
                for at in range(0, size, AT_ONCE):
                    self._take(bytes(given[at : at + AT_ONCE]))
        return size

    def _take(self, given: bytes) -> None:
        *lines, self._begun = (self._begun + given).split(b"\n")
        while len(self._begun) > LONGEST:
            end = _character_end(self._begun, LONGEST)
            lines.append(self._begun[:end])
            self._begun = self._begun[end:]
        if lines:
            self._say(self._stream, [_text(line) for line in lines])

    def finish(self) -> None:
        """Tell what has begun, as the process ends in order."""
        with self._lock:
            begun, self._begun = self._begun, b""
            if begun:
                self._say(self._stream, [_text(begun)])


def _text(line: bytes) -> str:
    return line.removesuffix(b"\r").decode("utf-8", "backslashreplace")


def _character_end(data: bytes, most: int) -> int:
    """Where to cut without cutting a character in two: continuation bytes are 10xxxxxx, at most three (RFC 3629)."""
    return next((end for end in range(most, most - 4, -1) if data[end] & 0xC0 != 0x80), most)


_installed: list[Lines] = []


def install(say: Say) -> None:
    """Be this process' standard streams, and those of its forks."""
    for number, name in enumerate(_NAMES, 1):
        lines = Lines(number, name, say)
        # Written through: what waited in the text layer would be told by each fork's child once more.
        stream = io.TextIOWrapper(lines, encoding="utf-8", errors="backslashreplace", write_through=True)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
        forks.in_child(lines.forget)
        _installed.append(lines)


def are_logged() -> bool:
    """Whether they were installed here, or where this process was forked from."""
    return bool(_installed)


def finish() -> None:
    """Tell lines that have begun and were not ended."""
    for lines in _installed:
        lines.finish()
