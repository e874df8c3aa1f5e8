"""Where lines go: standard error, or a file, and what happens when they can't go there.

A line that can't be written is given up, whole, and counted; nothing raises out of `Sink.write`. How each kind of file is kept from
making a writer wait:

* a pipe and a terminal are opened anew with O_NONBLOCK, which belongs to the open file that others share (open(2));
* a socket, the journal's or a container's, is written with MSG_DONTWAIT (send(2)), because it can't be opened anew; when it is
  the journal's, entries with fields go to that one's other socket, one datagram each
  (https://systemd.io/JOURNAL_NATIVE_PROTOCOL);
* a disk that is full fails by itself. One that hangs is waited for, by a process that has nothing else to do: all others write to
  that one's pipe (`prefork.log.pipe`, `prefork.log.writer`).

Lines of many processes do not mix: a write of at most PIPE_BUF bytes to a pipe is one piece (pipe(7)), one to a file opened
with O_APPEND is one at any length (write(2)). Where a write came out short, all processes know it from a byte that they share,
and whoever writes next begins a line of its own.
"""

import ctypes
import errno
import itertools
import mmap
import os
import signal
import socket
import stat
from collections.abc import Iterator, Sequence

# What write(2) puts into a pipe in one piece (pipe(7)).
PIPE_BUF = 4096
# Into a file lines may be longer; journald and collectors of logs cut at 16 to 48 KiB what is longer than that.
FILE_LINE = 16384
_DONT_WAIT = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
# The journal's other socket has gone, and another one may be in its place.
_GONE = (errno.ECONNREFUSED, errno.ENOTCONN, errno.ECONNRESET, errno.EPIPE)
_OPEN = os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
# Taken before anybody wraps it.
_mask = signal.pthread_sigmask

_libc = ctypes.CDLL(None, use_errno=True)
_libc.send.restype = ctypes.c_ssize_t
_libc.send.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int)

# One byte for each sink, 1 when its last line is torn. Forks share it; a stray write of user code costs an empty line.
_torn = mmap.mmap(-1, mmap.PAGESIZE)
_places = itertools.count()


class Sink:
    """One place for lines: the file at ``path``, or standard error without one. ``dropped`` lines are still to be told of."""

    def __init__(self, path: str = "") -> None:
        self.path = path
        self.fd = 2
        self.dropped = 0
        self.whole = self.journal = self.native = self.terminal = False
        self._socket = self._shielded = False
        self._identity: tuple[int, int] | None = None
        self._place = next(_places) % len(_torn)

    # -- opening

    def open(self, *, create: bool, owner: int | None = None) -> None:
        """Open the path, also again, and let go of what was open before. Raises OSError; then nothing has changed.

        ``owner``: whose the file shall be, so that processes of that user can open it again. A symbolic or another hard link
        is refused then: that user may have made it.
        """
        flags = _OPEN | (os.O_CREAT if create else 0) | (os.O_NOFOLLOW if owner is not None else 0)
        try:
            fd = os.open(self.path, flags, 0o600)
        except PermissionError:
            if owner is None:
                raise
            fd = _open_the_owners(self.path, flags, owner)
        try:
            if owner is not None:
                give(fd, owner)
        except OSError:
            os.close(fd)
            raise
        self.close()
        self.fd = fd
        self._look()

    def adopt(self, fd: int) -> None:
        """Go on with a file that was opened by the program that this process was before. Raises OSError."""
        self.fd = fd
        self._look()

    def _look(self) -> None:
        found = os.fstat(self.fd)
        self._identity = (found.st_dev, found.st_ino)
        self.whole = stat.S_ISREG(found.st_mode)
        self._socket = stat.S_ISSOCK(found.st_mode)
        self.terminal = stat.S_ISCHR(found.st_mode) and os.isatty(self.fd)
        # systemd.exec(5): so that a program sees whether its standard error was put elsewhere meanwhile.
        its = self.native or os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"
        self.journal = not self.path and its

    def shield(self) -> str | None:
        """Keep a pipe or terminal that is standard error from making us wait. Once; returns why that is not possible."""
        if self.path or self._shielded:
            return None
        self._shielded = True
        try:
            self._look()
            if self.terminal or stat.S_ISFIFO(os.fstat(2).st_mode):
                self.fd = os.open("/proc/self/fd/2", _OPEN & ~os.O_APPEND)
            elif self.journal and (fd := _journal_socket()) is not None:
                self.fd, self.native = fd, True
                self._look()
        except OSError as error:
            return error.strerror
        return None

    @property
    def is_open(self) -> bool:
        """Whether its file is open, and still there."""
        return self._is_ours(self.fd)

    def _is_ours(self, fd: int) -> bool:
        try:
            found = os.fstat(fd)
        except OSError:  # closed
            return False
        return (found.st_dev, found.st_ino) == self._identity

    def settle(self) -> None:
        """A handler may have closed every descriptor, and the number be another file's by now: open again what is lost."""
        if self._is_ours(self.fd):
            return
        try:
            if self.fd != 2:
                self.fd, self._shielded, self.native = 2, False, False
                self.shield()
            self._look()
        except OSError:
            self._identity = None  # lines are counted until it can be opened

    def stand_in(self) -> None:
        """Be standard output and error too, which this one is."""

    def close(self) -> None:
        """Let go of the descriptor, if it is still ours."""
        if self.fd > 2 and self._is_ours(self.fd):
            os.close(self.fd)

    # -- writing

    def write(self, lines: Sequence[bytes]) -> int:
        """Write whole lines. Returns how many of them, the last ones, could not be written."""
        if self.native:
            return self._send(lines)
        left = len(lines)
        for piece in self._pieces(lines):
            torn = _torn[self._place]
            data = b"\n" + piece if torn else piece
            try:
                written = self._put(data)
            except OSError:
                return left
            if written and torn:
                _torn[self._place] = 0
            left -= data[:written].count(b"\n") - (1 if torn and written else 0)
            if written < len(data):
                if data[:written].rpartition(b"\n")[2]:
                    _torn[self._place] = 1
                return left
        return left

    def _send(self, entries: Sequence[bytes]) -> int:
        """The same for entries of the journal: each arrives whole or not at all."""
        for place, entry in enumerate(entries):
            try:
                self._put(entry)
            except OSError as error:
                if error.errno in _GONE:
                    self.close()
                    self._identity = None  # so that the next line looks for another one
                return len(entries) - place
        return 0

    def _put(self, data: bytes) -> int:
        if self._identity is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if self._socket:
            sent = int(_libc.send(self.fd, data, len(data), _DONT_WAIT))
            if sent < 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            return sent
        if not self.terminal:
            return os.write(self.fd, data)
        # From the background of a terminal with TOSTOP a write raises SIGTTOU, which the master handles: the write would be
        # interrupted and tried again for ever. With the signal blocked it goes through (tcsetattr(3), tty_ioctl(4)).
        blocked = _mask(signal.SIG_BLOCK, {signal.SIGTTOU})
        try:
            return os.write(self.fd, data)
        finally:
            _mask(signal.SIG_SETMASK, blocked)

    @property
    def most(self) -> int | None:
        """How long an entry may be, when it may be longer than a line: None for any length."""
        return None if self.whole else self.room

    @property
    def room(self) -> int:
        """How long a line may be and still arrive in one piece."""
        return FILE_LINE if self.whole or self.native else PIPE_BUF

    def _pieces(self, lines: Sequence[bytes]) -> Iterator[bytes]:
        """Whole lines, joined as long as the pieces are written in one go."""
        if self.whole:
            yield b"".join(lines)
        else:
            yield from self._joined(lines, PIPE_BUF)

    @staticmethod
    def _joined(lines: Sequence[bytes], most: int) -> Iterator[bytes]:
        piece = b""
        for line in lines:
            if piece and len(piece) + len(line) > most:
                yield piece
                piece = b""
            piece += line
        yield piece


def _journal_socket() -> int | None:
    """A descriptor for the journal's entries, beside the stream that standard error is; None when there is none."""
    with socket.socket(fileno=os.dup(2)) as stream:
        name = stream.getpeername()
    folder, file = os.path.split(name if isinstance(name, str) else "")
    if file != "stdout":
        return None
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(os.path.join(folder, "socket"))
        except OSError:  # the stream takes text, with priorities
            return None
        return sock.detach()


def give(fd: int, owner: int) -> None:
    """Make a file another user's, who can write it then. Raises OSError."""
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        return  # a device or a FIFO is nobody's to give away
    if found.st_nlink > 1:
        raise OSError(errno.EMLINK, "the file has several names")
    if found.st_mode & 0o600 != 0o600:  # now: who has given it away may not, without CAP_FOWNER
        os.fchmod(fd, stat.S_IMODE(found.st_mode) | 0o600)
    if found.st_uid != owner:
        os.fchown(fd, owner, -1)


def _open_the_owners(path: str, flags: int, owner: int) -> int:
    """Open the owner's file as a root that may not write to it (no CAP_DAC_OVERRIDE), but take it. Raises OSError.

    It has to be given back: `give`.
    """
    handle = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(handle)
        if found.st_uid != owner or not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        itself = f"/proc/self/fd/{handle}"
        os.chown(itself, os.geteuid(), -1)
        try:
            os.chmod(itself, stat.S_IMODE(found.st_mode) | 0o600)
            return os.open(itself, flags & ~(os.O_NOFOLLOW | os.O_CREAT))
        except OSError:
            os.chown(itself, owner, -1)
            raise
    finally:
        os.close(handle)
