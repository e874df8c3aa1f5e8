"""The master's end of the log's files: each is written by a process of its own (`prefork.log.writer`)."""

import errno
import os
import select
import selectors
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from prefork.log import writer
from prefork.log.pipe import Pipe
from prefork.log.writer import Ask, Tell
from prefork.pool import policy
from prefork.system import process, signals

# A file system that does not open a file in so long hangs. At a start nobody waits to be served.
START, RELOAD = 10.0, 1.0
# At the end what was logged gets so long to be written, and then the processes that write it to leave.
FLUSH, LEAVE = 2.0, 0.2
# A process that lives so long has overcome what killed the one before.
SETTLED = 10.0
# What the kernel does not watch for us now is tried again after so long.
WATCH_AGAIN = 1.0
MESSAGE = 1 << 18


@dataclass(frozen=True, slots=True)
class CarriedLog:
    """A log file for another program of the master's process. ``control``, ``pid``: -1 and 0 when nobody writes it just now."""

    path: str
    write_end: int
    read_end: int
    control: int
    pid: int


@dataclass(frozen=True, slots=True)
class Says:
    """How a log file says something: ``event`` logs it, ``missing`` makes the line that tells how many lines a file lacks."""

    event: Callable[..., None]
    missing: Callable[[Pipe, int], bytes]


class LogFile:
    """A log file, and the process that writes it. Of the master: its forks have only the ``pipe``."""

    def __init__(self, path: str, owner: int | None, says: Says, strangers: set[int]) -> None:
        """``strangers`` get the process' pid."""
        self.path, self.owner = path, owner
        self.pid = 0
        self.pipe: Pipe
        self.event, self._missing = says.event, says.missing
        self._strangers = strangers
        self._control: socket.socket | None = None
        self._selector: selectors.BaseSelector | None = None
        self._watched = False
        self._watch_at = 0.0
        self._is_open = self._reopening = self._lost = False
        self._dropped = 0  # lines that the last process has not told of
        self._failures, self._started = 0, 0.0
        self._again_at: float | None = None  # there is no process: when there is to be another one

    # -- its beginning

    def open(self, patience: float) -> None:
        """Make the pipe and start the process. Raises OSError when that can't open the file, or does not so soon."""
        self._read_end, write_end = process.pipe_to_share()
        try:
            self.pipe = Pipe(self.path, write_end)
            self._wait_until_open(self._start(first=True), patience)
        except OSError:
            os.close(write_end)
            os.close(self._read_end)
            self._hang_up()
            if self.pid:
                process.signal_child(self.pid, signal.SIGKILL)  # one whose file system hangs is gone when that goes on
            self._reap(time.monotonic() + LEAVE)
            raise

    def _wait_until_open(self, control: socket.socket, patience: float) -> None:
        if not _readable(control, time.monotonic() + patience):
            raise TimeoutError(errno.ETIMEDOUT, f"its file system has not opened it in {patience:g} s")
        said = control.recv(MESSAGE)
        if said[:1] == Tell.FAILED.value:
            raise _error(said)
        if said != Tell.OPENED.value:
            raise OSError(errno.EIO, "the process that writes it has ended")
        self._is_open = True

    @classmethod
    def adopted(cls, carried: CarriedLog, owner: int | None, says: Says, strangers: set[int]) -> "LogFile":
        """The file that another program of this process has opened, and goes on with. Raises OSError."""
        self = cls(carried.path, owner, says, strangers)
        self._is_open = True
        self._read_end, self.pid = carried.read_end, carried.pid
        self.pipe = Pipe(self.path, carried.write_end)
        if carried.control != -1:
            self._control = socket.socket(fileno=carried.control)
        self._again_at = None if self.pid else 0.0
        return self

    def carry(self) -> CarriedLog:
        """For another program of this process."""
        control = -1 if self._control is None else self._control.fileno()
        return CarriedLog(self.path, self.pipe.fd, self._read_end, control, self.pid)

    def _start(self, *, first: bool = False) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                with signals.blocked():
                    pid = os.fork()
                    if pid == 0:
                        writer.main(self.pipe, self.owner, self._read_end, theirs, self._dropped, first=first)
            except OSError:
                ours.close()
                raise
        ours.setblocking(False)
        self.pid, self._control, self._again_at = pid, ours, None
        self._is_open = False
        self._dropped, self._started = 0, time.monotonic()
        self._strangers.add(pid)
        self._watch_at = 0.0
        self._watch(self._started)
        return ours

    # -- its life

    def watch(self, selector: selectors.BaseSelector) -> None:
        """Hear the process by this selector."""
        self._selector = selector
        self._watch(time.monotonic())

    def _watch(self, now: float) -> None:
        if self._selector is None or self._control is None or self._watched or now < self._watch_at:
            return
        try:
            self._selector.register(self._control, selectors.EVENT_READ, lambda _: self.hear())
            self._watched = True
        except OSError as error:
            self._watch_at = now + WATCH_AGAIN
            self.event("deaf", what=f"the process that writes {self.path}", reason=error.strerror)

    def hear(self) -> None:
        """Take in what the process has told."""
        while self._control is not None:
            try:
                said = self._control.recv(MESSAGE)
            except BlockingIOError:
                return
            except ConnectionResetError:
                said = b""
            if not said:
                self._hang_up()
                return
            self._told(said)

    def _told(self, said: bytes) -> None:
        what = Tell(said[:1])
        match what:
            case Tell.OPENED:
                if self._reopening or self._lost:
                    self.event("reopened", paths=self.path)
                self._is_open, self._reopening, self._lost = True, False, False
            case Tell.FAILED:
                if self._is_open:
                    self.event("log_kept", path=self.path, reason=_error(said).strerror)
                elif not self._lost:
                    self.event("log_lost", path=self.path, reason=_error(said).strerror)
                    self._lost = True
                self._reopening = False
            case Tell.MISSING:
                count = int(said[1:])
                self.ask(Ask.WRITE, b"%d %b" % (count, self._missing(self.pipe, count)))
            case Tell.LEAVES:
                self._dropped = int(said[1:])
            case Tell.BUG:
                self.event("bug", where="log", text=said[1:].decode(errors="replace"))

    def _hang_up(self) -> None:
        if self._control is not None:
            if self._watched and self._selector is not None:
                self._selector.unregister(self._control)
            self._watched = False
            self._control.close()
            self._control = None

    def ask(self, what: Ask, rest: bytes = b"") -> bool:
        """Ask the process for something. False when there is none, or it has not heard for so long that no more can be asked."""
        self._reopening |= what is Ask.REOPEN  # who comes opens it, too
        if self._control is None:
            return what is Ask.REOPEN
        try:
            self._control.send(what.value + rest, socket.MSG_NOSIGNAL)
        except OSError:
            return False
        return True

    def ended(self, pid: int, status: int, now: float) -> None:
        """A child of ours has ended, with this wait status; when it was the process, there is to be another one."""
        if pid != self.pid:
            return
        self.hear()  # its last words
        self._hang_up()
        self.pid, self._again_at = 0, now
        if status == 0:  # it was asked to, by another program of ours perhaps
            return
        self.event("log_writer_died", path=self.path, cause=process.describe(status))
        if time.monotonic() - self._started < SETTLED:
            self._failures += 1
            self._again_at += policy.backoff(self._failures)
        else:
            self._failures = 0

    def tend(self, now: float) -> None:
        """Start another process, and hear it, when it is time."""
        if self._again_at is not None and now >= self._again_at:
            try:
                self._start()
            except OSError as error:
                self._failures += 1
                self._again_at = now + policy.backoff(self._failures)
                if not self._lost:
                    self.event("log_lost", path=self.path, reason=error.strerror)
                    self._lost = True
        self._watch(time.monotonic())

    def wake_at(self, now: float) -> float | None:
        """When to `tend` to it."""
        deaf = self._selector is not None and self._control is not None and not self._watched
        return now + WATCH_AGAIN if deaf else self._again_at

    # -- its end

    def close(self) -> None:
        """Nobody here logs to it any more. The process stays for those of our children who do."""
        self._ensure()
        self.pipe.close()
        os.close(self._read_end)
        self._hang_up()

    def _ensure(self) -> None:
        """Somebody is to write what is in the pipe, although the process has died and it is not time for another one yet."""
        if self._control is not None:
            self.hear()  # it may have ended
        if self._control is None:
            self._reap(0.0)
            try:
                self._start()
            except OSError as error:
                self.event("log_lost", path=self.path, reason=error.strerror)

    def flush(self) -> None:
        """Ask for it; see `flushed`."""
        self._ensure()
        self.ask(Ask.FLUSH)

    def flushed(self, deadline: float) -> None:
        """Wait until what was logged before `flush` is written."""
        asked = 1
        while asked and self._control is not None and _readable(self._control, deadline):
            try:
                said = self._control.recv(MESSAGE)
            except ConnectionResetError:
                return
            if not said:
                return
            self._told(said)
            asked -= said == Tell.FLUSHED.value
            # The line that tells of them is to be there as well.
            asked += said[:1] == Tell.MISSING.value and self.ask(Ask.FLUSH)

    def end(self, deadline: float) -> None:
        """The same as `close`, at the daemon's end: the process leaves at once, unless somebody has been left behind who logs."""
        self.pipe.close()
        os.close(self._read_end)
        self._hang_up()
        self._reap(deadline)

    def _reap(self, deadline: float) -> None:
        """Reap the process if it ends until then."""
        if not self.pid:
            return
        try:
            fd = os.pidfd_open(self.pid)
        except OSError:  # it has been reaped
            self.pid = 0
            return
        try:
            _readable(fd, deadline)
        finally:
            os.close(fd)
        try:
            ended = os.waitpid(self.pid, os.WNOHANG)[0]
        except ChildProcessError:
            ended = self.pid
        if ended:
            self._strangers.discard(self.pid)
            self.pid = 0


def _readable(what: socket.socket | int, deadline: float) -> bool:
    """Wait until then for something to be heard. Whether there is."""
    poll = select.poll()
    poll.register(what, select.POLLIN)
    return bool(poll.poll(1000 * max(0.0, deadline - time.monotonic())))


def _error(said: bytes) -> OSError:
    number, _, text = said[1:].decode(errors="replace").partition(" ")
    return OSError(int(number), text)
