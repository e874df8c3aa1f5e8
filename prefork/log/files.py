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

from prefork.log import pipe, writer
from prefork.log.pipe import Pipe
from prefork.log.writer import Ask, Tell
from prefork.pool import policy
from prefork.system import process, signals

# A file system that does not open a file in so long hangs. At a start nobody waits to be served.
START, RELOAD = 10.0, 1.0
# At the end what was logged gets so long to be written, and then the process that writes it to leave.
FLUSH, LEAVE = 2.0, 0.2
# A process that lives so long has overcome what killed the one before.
SETTLED = 10.0
MESSAGE = 1 << 17


@dataclass(frozen=True, slots=True)
class CarriedLog:
    """A log file for another program of the master's process. ``control``, ``pid``: -1 and 0 when nobody writes it just now."""

    path: str
    write_end: int
    read_end: int
    control: int
    pid: int


class LogFile:
    """A log file, and the process that writes it. Of the master: its forks have only the ``pipe``."""

    def __init__(
        self, path: str, owner: int | None, event: Callable[..., None], catch_up: Callable[[Pipe], None], strangers: set[int]
    ) -> None:
        """``event`` logs what is to be told, ``catch_up`` into this file how many lines it lacks; ``strangers`` get the pid."""
        self.path, self.owner = path, owner
        self.pid = 0
        self.event, self._catch_up, self._strangers = event, catch_up, strangers
        self._control: socket.socket | None = None
        self._selector: selectors.BaseSelector | None = None
        self._is_open = self._reopening = self._leaving = False
        self._failures, self._started = 0, 0.0
        self.again_at: float | None = None  # there is no process: when there is to be another one

    # -- its beginning

    def open(self, patience: float) -> None:
        """Make the pipe and start the process. Raises OSError when that can't open the file, or does not so soon."""
        self._read_end, write_end = pipe.make()
        try:
            self.pipe = Pipe(self.path, write_end)
            self._wait_until_open(self._start(), patience)
        except OSError:
            os.close(write_end)
            os.close(self._read_end)
            self._hang_up()
            if self.pid:
                process.signal_child(self.pid, signal.SIGKILL)  # one whose file system hangs is gone when that goes on
            self._wait_for_end()
            raise

    def _wait_until_open(self, control: socket.socket, patience: float) -> None:
        poll = select.poll()
        poll.register(control, select.POLLIN)
        if not poll.poll(patience * 1000):
            raise TimeoutError(errno.ETIMEDOUT, f"its file system has not opened it in {patience:g} s")
        said = control.recv(MESSAGE)
        if said[:1] == Tell.FAILED.value:
            raise _error(said)
        if said != Tell.OPENED.value:
            raise OSError(errno.EIO, "the process that writes it has ended")
        self._is_open = True

    @classmethod
    def adopted(
        cls,
        carried: CarriedLog,
        owner: int | None,
        event: Callable[..., None],
        catch_up: Callable[[Pipe], None],
        strangers: set[int],
    ) -> "LogFile":
        """The file that another program of this process has opened, and goes on with. Raises OSError."""
        self = cls(carried.path, owner, event, catch_up, strangers)
        self._is_open = True
        self._read_end, self.pid = carried.read_end, carried.pid
        self.pipe = Pipe(self.path, carried.write_end)
        if carried.control != -1:
            self._control = socket.socket(fileno=carried.control)
        self.again_at = None if self.pid else 0.0
        return self

    def carry(self) -> CarriedLog:
        """For another program of this process."""
        control = -1 if self._control is None else self._control.fileno()
        return CarriedLog(self.path, self.pipe.fd, self._read_end, control, self.pid)

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                with signals.blocked():
                    pid = os.fork()
                    if pid == 0:
                        writer.main(self.pipe, self.owner, self._read_end, theirs)
            except OSError:
                ours.close()
                raise
        ours.setblocking(False)
        self.pid, self._control, self.again_at = pid, ours, None
        self._is_open = self._leaving = False
        self._started = time.monotonic()
        self._strangers.add(pid)
        if self._selector is not None:
            self.watch(self._selector)
        return ours

    # -- its life

    def watch(self, selector: selectors.BaseSelector) -> None:
        """Hear the process by this selector."""
        self._selector = selector
        if self._control is not None:
            selector.register(self._control, selectors.EVENT_READ, lambda _: self._hear())

    def _hear(self) -> None:
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
            self._told(Tell(said[:1]), said)

    def _told(self, what: Tell, said: bytes) -> None:
        match what:
            case Tell.OPENED:
                self._is_open = True
                if self._reopening:
                    self.event("reopened", paths=self.path)
            case Tell.FAILED if self._is_open:
                self.event("log_kept", path=self.path, reason=_error(said).strerror)
            case Tell.FAILED if self._failures <= 1:
                self.event("log_lost", path=self.path, reason=_error(said).strerror)
            case Tell.DROPPED:
                self.pipe.dropped += int(said[1:])
                self._catch_up(self.pipe)
            case Tell.BUG:
                self.event("bug", where="log", text=said[1:].decode(errors="replace"))
        if what in (Tell.OPENED, Tell.FAILED):
            self._reopening = False

    def _hang_up(self) -> None:
        if self._control is not None:
            if self._selector is not None:
                self._selector.unregister(self._control)
            self._control.close()
            self._control = None

    def ask(self, what: Ask) -> bool:
        """Ask the process for something. False when there is none, or it has not heard for so long that no more can be asked."""
        self._reopening |= what is Ask.REOPEN  # who comes opens it, too
        if self._control is None:
            return what is Ask.REOPEN
        try:
            self._control.send(what.value, socket.MSG_NOSIGNAL)
        except OSError:
            return False
        self._leaving |= what is Ask.LEAVE
        return True

    def ended(self, pid: int, cause: str, now: float) -> None:
        """A child of ours has ended; when it was the process, there is to be another one."""
        if pid != self.pid:
            return
        self._hear()  # its last words
        self._hang_up()
        self.pid, self.again_at = 0, now
        if self._leaving:
            return
        if self._is_open:
            self.event("log_writer_died", path=self.path, cause=cause)
            self._failures = self._failures + 1 if time.monotonic() - self._started < SETTLED else 0
        else:
            self._failures += 1
        self.again_at = now + (policy.backoff(self._failures) if self._failures else 0.0)

    def tend(self, now: float) -> None:
        """Start another process when it is time."""
        if self.again_at is None or now < self.again_at:
            return
        try:
            self._start()
        except OSError as error:
            self._failures += 1
            if self._failures == 1:
                self.event("log_lost", path=self.path, reason=error.strerror)
            self.again_at = now + policy.backoff(self._failures)

    # -- its end

    def close(self) -> None:
        """Nobody here logs to it any more. The process stays for those of our children who do."""
        self.pipe.close()
        os.close(self._read_end)
        self._hang_up()

    def flushed(self, deadline: float) -> None:
        """Wait until what was logged before `Ask.FLUSH` is written."""
        if self._control is None:
            return
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        while poll.poll(1000 * max(0.0, deadline - time.monotonic())):
            try:
                said = self._control.recv(MESSAGE)
            except (BlockingIOError, ConnectionResetError):
                return
            if said in (b"", Tell.FLUSHED.value):
                return

    def end(self) -> None:
        """The same as `close`, at the daemon's end: the process leaves at once, unless somebody has been left behind who logs."""
        self.close()
        self._wait_for_end()

    def _wait_for_end(self) -> None:
        """Reap the process if it ends now."""
        if not self.pid:
            return
        try:
            fd = os.pidfd_open(self.pid)
        except OSError:  # it has been reaped
            return
        try:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            poll.poll(LEAVE * 1000)
        finally:
            os.close(fd)
        try:
            if os.waitpid(self.pid, os.WNOHANG)[0]:
                self._strangers.discard(self.pid)
                self.pid = 0
        except ChildProcessError:
            self.pid = 0


def _error(said: bytes) -> OSError:
    number, _, text = said[1:].decode(errors="replace").partition(" ")
    return OSError(int(number), text)
