"""Python stacks of processes that can't tell them any more: a worker that crashes, and one that hangs, even in C code.

faulthandler writes them, from a signal handler and without the GIL, to a pipe that all of a generation share and only the master
reads. It writes in small pieces: the stacks of two that crash in the same instant may be mixed. Neither end ever waits: what a
full pipe does not take is lost. Whoever has the pipe may write to it, so what is read is only ever shown.
"""

import faulthandler
import importlib
import os
import signal
import weakref
from collections.abc import Callable

from prefork.system import process

# Ours, like `prefork.system.signals.PARENT_DIED`. Not SIGABRT: faulthandler keeps that for crashes.
DUMP = signal.SIGRTMIN + 3
# How faulthandler begins the stack of a crash, and what it then calls the signal.
CRASH = b"Fatal Python error: "
_CRASHES: dict[int, bytes] = {
    signal.SIGSEGV: b"Segmentation fault",
    signal.SIGABRT: b"Aborted",
    signal.SIGBUS: b"Bus error",
    signal.SIGFPE: b"Floating point exception",
    signal.SIGILL: b"Illegal instruction",
}
SIGNALS = frozenset({DUMP, *_CRASHES})
# Of a longer stack the end is kept: the main thread comes last. Of a thread faulthandler tells at most 100 frames.
LIMIT = 16384
# A pipe holds 64 KiB unless somebody has made it larger; a flood must not hold the master.
_READ, _READS = 65536, 4
# The frames that call the handler, that import it, and that run what the import has registered for the end.
_PACKAGE = f'  File "{os.path.dirname(os.path.dirname(__file__))}'
_BELOW = f'{_PACKAGE}/worker.py", line '
_IMPORTS = (f'{_PACKAGE}/handler.py", line ', f'{_PACKAGE}/system/finalizers.py", line ')
_IMPORT_SYSTEM = ('  File "<frozen importlib.', f'  File "{importlib.__file__}", line ')


class Stacks:
    """The pipe of one generation, as the master has it. ``write_end`` is for the processes of the generation.

    Made anew, or of the ``read_end`` of one whose processes have the other end already.
    """

    def __init__(self, read_end: int | None = None) -> None:
        self.write_end = -1
        if read_end is None:
            read_end, self.write_end = process.pipe_to_share()
        self.read_end = read_end
        self._crashes = b""  # of workers whose end was not told yet; one of them may still be writing
        self._dump: bytes | None = None  # what has come since a dump was asked for

    def look(self) -> bool:
        """Take in what has come. False when nothing has."""
        came = b""
        for _ in range(_READS):
            try:
                data = os.read(self.read_end, _READ)
            except BlockingIOError:
                break
            if not data:
                break
            came += data
        if self._dump is None:
            self._crashes = (self._crashes + came)[-_READ:]
        else:
            self._dump = (self._dump + came)[-_READ:]
        return bool(came)

    def begin_dump(self) -> None:
        """A hung worker is about to be asked for its stack: what has come before is not it."""
        self.look()
        self._dump = b""

    def take_dump(self) -> str:
        """What the hung worker has written, and what it has written too late for an earlier call."""
        self.look()
        if self._dump is not None:
            said, self._dump = self._dump, None
        else:
            said, self._crashes = self._crashes, b""  # that of an earlier call, which was too early
        dump, mark, crashes = said.partition(CRASH)
        self._crashes += mark + crashes
        return _text(dump)

    def take_crash(self, status: int) -> str:
        """The stack of a worker that ended with this wait status; an empty text when there is none."""
        name = _CRASHES.get(os.WTERMSIG(status)) if os.WIFSIGNALED(status) else None
        if name is None:
            return ""
        self.look()
        stack, self._crashes = _cut(self._crashes, name)
        if not stack and self._dump is not None:
            stack, self._dump = _cut(self._dump, name)
        return _text(stack)

    def close_write_end(self) -> None:
        """The generation's processes have it."""
        if self.write_end >= 0:
            os.close(self.write_end)
            self.write_end = -1

    def close(self) -> None:
        """Let go of both ends."""
        self.close_write_end()
        os.close(self.read_end)


def _cut(data: bytes, name: bytes) -> tuple[bytes, bytes]:
    """The first crash of this name, and what is left without it."""
    first, *crashes = data.split(CRASH)
    mine = next((crash for crash in crashes if crash.startswith(name)), None)
    if mine is None:
        return b"", data
    crashes.remove(mine)
    return CRASH + mine, CRASH.join([first, *crashes])


def _text(data: bytes) -> str:
    """For people: without the frames below the handler's, which are always the same and ours."""
    return without_ours(data[-LIMIT:].decode("utf-8", "replace"))


def without_ours(text: str) -> str:
    """What faulthandler has written, without the frames of the import system, and of ours that call user code."""
    lines: list[str] = []
    ours = False
    for line in text.strip().splitlines():
        calls = line.startswith(_IMPORTS) or (line.startswith(_BELOW) and line.endswith(" in serve"))
        ours = line.startswith("  File ") and (ours or calls)
        if not ours and not line.startswith(_IMPORT_SYSTEM):
            lines.append(line)
    return "\n".join(lines)


# -- in fork servers and workers

_fd = -1
_crashes = _dumps = False
_of_import: Callable[[], object] = bool


class _File:
    """What faulthandler writes to while the import runs. It alone refers to this, until user code gives it another place."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def flush(self) -> None:
        pass


def tell_of_import(fd: int) -> None:
    """Write the stack of a crash in the import to ``fd``, up to `tell`, unless PYTHONFAULTHANDLER has another place for it."""
    global _of_import
    if not faulthandler.is_enabled():
        file = _File(fd)
        faulthandler.enable(file)
        _of_import = weakref.ref(file)


def tell(fd: int, *, dumps: bool) -> None:
    """Write the stack of a crash to ``fd`` from now on, unless user code (or PYTHONFAULTHANDLER) has another place for it.

    ``dumps``: at DUMP, too. Forks inherit it.
    """
    global _fd, _crashes, _dumps
    if _of_import():
        faulthandler.disable()  # it installs nothing while it is enabled, and user code has enabled nothing
    _fd, _crashes, _dumps = fd, not faulthandler.is_enabled(), dumps
    _begin()


def tell_again() -> None:
    """User code has replaced one of SIGNALS' handlers, which are back at the default action now."""
    be_silent()  # faulthandler installs nothing while it believes that it is installed
    _begin()


def be_silent() -> None:
    """Write nothing any more: in a child that user code has forked, which is none of ours."""
    if _crashes or _of_import():
        faulthandler.disable()
    if _dumps:
        faulthandler.unregister(DUMP)


def _begin() -> None:
    if _crashes:
        faulthandler.enable(_fd)
    if _dumps:
        faulthandler.register(DUMP, _fd)
