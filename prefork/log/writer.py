"""The process that writes a log file: one for each, a child of the master. It alone opens the file, and waits when its disk hangs.

It reads lines from a pipe (`prefork.log.pipe`) and writes them, and hears the master over a pair of sockets: open the file again,
tell me when all that was logged is written, leave. It ends when nobody is left who could log: a killed master's workers are heard
to their end, so signals that somebody sends to everybody do not end it. When it is killed the master starts another one, and what
was in the pipe is still there, because the master has its reading end, too. It runs no user code, and takes what is in the pipe for
text.
"""

import errno
import gc
import os
import select
import signal
import socket
import time
import traceback
from enum import Enum
from typing import NoReturn

from prefork.log.pipe import SIZE, Pipe, unread
from prefork.system import process, signals

# Read at once. A read that was shorter has emptied the pipe: then we sleep, and the next write is of more lines than one.
CHUNK = 1 << 18
PAUSE = 0.05
# A line that was not ended is ended by us after so long: those of C libraries and subprocesses come in pieces.
UNENDED = 1.0
# No line of prefork's own is longer: what is, has no end.
LONGEST = 2 * SIZE
# A file that can't be opened any more is tried again so often, when there is something to be written.
RETRY = 1.0


class Ask(Enum):
    """What the master wants, as the first byte of a message."""

    REOPEN = b"R"
    FLUSH = b"F"
    LEAVE = b"L"  # unless the file can't be opened by its path any more
    WRITE = b"W"  # the line that tells how many are missing: the number, a space, the line


class Tell(Enum):
    """What it is told, as the first byte of a message; the rest is a number and, of an error, its text."""

    OPENED = b"O"
    FAILED = b"E"
    MISSING = b"M"  # so many lines, in a file that can be written again
    LEAVES = b"L"  # and so many lines are still to be told of
    FLUSHED = b"F"
    BUG = b"B"


def main(pipe: Pipe, owner: int | None, read_end: int, control: socket.socket, dropped: int, *, first: bool) -> NoReturn:
    """Be the process. Called in the child, with all signals blocked; never returns.

    ``first``: the file must be opened, or the process ends. ``dropped`` lines are missing that nobody was told of.
    """
    status = 1
    try:
        status = Writer(pipe, owner, read_end, control, dropped).run(first=first)
    except BaseException:
        tell(control, Tell.BUG, traceback.format_exc()[:CHUNK])
    finally:
        os._exit(status)


def tell(control: socket.socket, what: Tell, rest: object = "") -> bool:
    """Tell the master. False when it does not listen just now."""
    try:
        control.send(what.value + str(rest).encode(errors="replace"), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    except OSError:
        return False
    return True


class Writer:
    """The process that writes one file."""

    def __init__(self, pipe: Pipe, owner: int | None, read_end: int, control: socket.socket, dropped: int) -> None:
        self.pipe, self.file, self.owner = pipe, pipe.file, owner
        self.read_end, self.control = read_end, control
        self.begun = b""  # a line that is not ended yet
        self.dropped, self.told = dropped, False  # the master was told of them, and has not answered
        self.tried = 0.0
        self.alone = False  # the master has gone, or does not want the file any more
        self.leaving = False

    def run(self, *, first: bool) -> int:
        """Write until nobody is left. Returns the exit status."""
        gc.disable()  # what of the master's would be collected closes numbers that are ours by now
        process.set_title(f"prefork: log {self.pipe.path}")
        os.chdir("/")
        signals.fresh()
        for signo in signals.MASTERS:
            signal.signal(signo, signal.SIG_IGN)
        process.close_all_but({0, 1, 2, self.read_end, self.control.fileno()})
        signals.unblock()
        if not self._open() and first:
            return 0
        paused = False
        while not (self.leaving and not self.begun):
            events = self._wait(paused=paused)
            if self.control.fileno() in events:
                self._obey()
            if self.read_end in events:
                taken = self._take()
                if taken == 0:
                    break
                paused = taken < CHUNK and not self.leaving
            elif paused:
                paused = False
            elif not events:
                self._end_line()
        self._end_line()
        tell(self.control, Tell.LEAVES, self.dropped)
        return 0

    def _wait(self, *, paused: bool) -> set[int]:
        poll = select.poll()
        if not self.alone:
            poll.register(self.control, select.POLLIN)
        if not paused:
            poll.register(self.read_end, select.POLLIN)
        wait = PAUSE if paused else UNENDED if self.begun else None
        return {fd for fd, _ in poll.poll(None if wait is None else wait * 1000)}

    def _open(self) -> bool:
        self.tried = time.monotonic()
        try:
            self.file.open(create=True, owner=self.owner)
            os.set_blocking(self.file.fd, True)  # a FIFO or a terminal, too: it is for us to wait
        except OSError as error:
            tell(self.control, Tell.FAILED, f"{error.errno or errno.EIO} {error.strerror}")
            return False
        self._leave_standard_descriptors()
        tell(self.control, Tell.OPENED)
        return True

    def _leave_standard_descriptors(self) -> None:
        """They are the terminal's, or a pipe's at whose end somebody waits; but /dev/stdout and its like lead to them."""
        itself = os.fstat(self.file.fd)
        if any(os.path.samestat(itself, os.fstat(number)) for number in (0, 1, 2)):
            return
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for number in (0, 1, 2):
            os.dup2(null, number, inheritable=True)
        os.close(null)

    def _obey(self) -> None:
        """Do what the master asks."""
        try:
            asked = self.control.recv(SIZE)
        except ConnectionResetError:  # it has gone, with something unread that we told it
            asked = b""
        match asked[:1]:
            case b"":
                self.alone = True
            case Ask.REOPEN.value:
                self._end_line()
                self._open()
            case Ask.FLUSH.value:
                left = unread(self.read_end)
                while left > 0 and (taken := self._take()) > 0:
                    left -= taken
                self._end_line()
                tell(self.control, Tell.FLUSHED)
            case Ask.LEAVE.value:
                self.leaving = self._can_be_opened_again()
            case Ask.WRITE.value:
                count, _, line = asked[1:].partition(b" ")
                self.told = False
                if not self.file.write([line]):
                    self.dropped -= int(count)

    def _can_be_opened_again(self) -> bool:
        """Whether another process would write to the same file: its folder may have gone, and ours is the last way to it."""
        try:
            return os.path.samestat(os.stat(self.pipe.path), os.fstat(self.file.fd))
        except OSError:
            return False

    def _take(self) -> int:
        """Write what is there. Returns how many bytes that were; 0 at the end, -1 when somebody else has taken them."""
        try:
            data = os.read(self.read_end, CHUNK)
        except BlockingIOError:
            return -1
        self.pipe.was_read(self.read_end)
        whole, newline, self.begun = (self.begun + data).rpartition(b"\n")
        if newline:
            self._write([line + b"\n" for line in whole.split(b"\n")])
        if len(self.begun) > LONGEST:
            self._end_line()
        return len(data)

    def _end_line(self) -> None:
        if self.begun:
            begun, self.begun = self.begun, b""
            self._write([begun + b"\n"])

    def _write(self, lines: list[bytes]) -> None:
        if not self.file.is_open and time.monotonic() > self.tried + RETRY:
            self._open()
        lost = self.file.write(lines)
        self.dropped += lost
        if self.dropped and not self.told and not lost:
            self.told = tell(self.control, Tell.MISSING, self.dropped)
