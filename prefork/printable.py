"""Text that user code or a client may have chosen, as it is shown to people: it forges no line and steers no terminal.

Pure. The log, every command and the service manager's status line show such text through here and no other way. What can be
printed stays, in any script. All else is escaped as Python writes it: control characters (C0 and C1, ECMA-48), which move the
cursor, set titles and colours, and formatting ones (Unicode's Cf), among them those that turn text around (U+202A to U+202E).
"""

from typing import Any


def one_line(text: str) -> str:
    """The text in one line: a tab stays, and a line break is escaped like all else that can't be printed."""
    return text if text.isprintable() else "".join(c if c.isprintable() or c == "\t" else repr(c)[1:-1] for c in text)


def counted(count: Any, one: str, many: str) -> str:
    """A number and what it counts: 1 connection, 2 connections."""
    return f"{count} {one if count == 1 else many}"


def printable(text: str) -> str:
    """The text with its lines, and the indentation of a traceback."""
    return "\n".join(map(one_line, text.split("\n")))
