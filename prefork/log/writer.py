"""The process that writes a log file: one for each, a child of the master. It alone opens the file, and waits when its disk hangs.

It reads lines from a pipe (`prefork.log.pipe`) and writes them, and hears the master over a pair of sockets: open the file again,
tell me when all that was logged is written, leave. It ends when nobody is left who could log: a killed master's workers are heard
to their end, so signals that somebody sends to everybody do not end it. When it is killed the master starts another one, and what
was in the pipe is still there, because the master has its reading end, too. It runs no user code, and takes what is in the pipe for
text.
"""

import errno
import os
import select
import signal
import socket
import traceback
from enum import Enum
from typing import NoReturn

from prefork.log.pipe import Pipe, unread
from prefork.log.sink import Sink
from prefork.system import process, signals

# Read at once. A read that was shorter has emptied the pipe: then we sleep, and the next write is of more lines than one.
CHUNK = 1 << 18
PAUSE = 0.05
# A line that was not ended is ended by us after so long: those of C libraries and subprocesses come in pieces.
UNENDED = 1.0
LONGEST = 1 << 16
# What the master may send, or anybody to a group of processes.
_IGNORED = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGTTIN,
    signal.SIGTTOU,
)


class Ask(Enum):
    """What the master wants."""

    REOPEN = b"R"
    FLUSH = b"F"
    LEAVE = b"L"  # unless the file can't be opened by its path any more


class Tell(Enum):
    """What it is told, as the first byte of a message; the rest is a number and, of an error, its text."""

    OPENED = b"O"
    FAILED = b"E"
    DROPPED = b"D"
    FLUSHED = b"F"
    BUG = b"B"


def main(pipe: Pipe, owner: int | None, read_end: int, control: socket.socket) -> NoReturn:
    """Be the process. Called in the child, with all signals blocked; never returns."""
    status = 1
    try:
        status = Writer(pipe, owner, read_end, control).run()
    except BaseException:
        tell(control, Tell.BUG, traceback.format_exc()[:LONGEST])
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

    def __init__(self, pipe: Pipe, owner: int | None, read_end: int, control: socket.socket) -> None:
        self.pipe, self.owner, self.read_end, self.control = pipe, owner, read_end, control
        self.file = Sink(pipe.path)
        self.begun = b""  # a line that is not ended yet
        self.dropped = 0
        self.alone = False  # the master has gone, or does not want the file any more

    def run(self) -> int:
        """Write until nobody is left. Returns the exit status."""
        process.set_title(f"prefork: log {self.pipe.path}")
        os.chdir("/")
        signals.fresh()
        for signo in _IGNORED:
            signal.signal(signo, signal.SIG_IGN)
        process.close_all_but({0, 1, 2, self.read_end, self.control.fileno()})
        signals.unblock()
        if not self._open():
            return 0
        paused = False
        while True:
            events = self._wait(paused=paused)
            if self.control.fileno() in events and not self._obey():
                return 0
            if self.read_end in events:
                taken = self._take()
                if taken == 0:
                    break
                paused = taken < CHUNK
            elif paused:
                paused = False
            elif not events:
                self._end_line()
        self._end_line()
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
        try:
            self.file.open(create=True, owner=self.owner)
        except OSError as error:
            tell(self.control, Tell.FAILED, f"{error.errno or errno.EIO} {error.strerror}")
            return False
        tell(self.control, Tell.OPENED)
        return True

    def _obey(self) -> bool:
        """Do what the master asks. False when that is to leave."""
        asked = self.control.recv(1)
        if not asked:
            self.alone = True
        elif asked == Ask.REOPEN.value:
            self._end_line()
            self._open()
        elif asked == Ask.FLUSH.value:
            left = unread(self.read_end)
            while left > 0 and (taken := self._take()) > 0:
                left -= taken
            self._end_line()
            tell(self.control, Tell.FLUSHED)
        return asked != Ask.LEAVE.value or not self._can_be_opened_again()

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
        self.pipe.was_read()
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
        lost = self.file.write(lines)
        self.dropped += lost
        if self.dropped and not lost and tell(self.control, Tell.DROPPED, self.dropped):
            self.dropped = 0
