"""A log file for those who log: a pipe, at whose other end one process writes the file (`prefork.log.writer`).

A file system may hang (frozen, NFS without its server), and write(2) with it: there is no O_NONBLOCK for a file, and RWF_NOWAIT
(pwritev2(2)) is EOPNOTSUPP on ext4 and tmpfs (tried on 6.18). So only that process waits for the disk. The pipe holds 1 MiB; when
it is full the master drops lines and counts them, at once. Workers wait a moment, because a burst is faster than any disk; when
nothing has been read for so long, all that share the pipe know it, and wait no more until something is.
"""

import errno
import fcntl
import mmap
import os
import struct
import termios
import time
from collections.abc import Iterator, Sequence

from prefork.log.sink import FILE_LINE, PIPE_BUF, Sink

# What the kernel lets everybody have (/proc/sys/fs/pipe-max-size, pipe(7)).
SIZE = 1 << 20
# A worker waits for room so long, and looks so often.
PATIENCE, LOOK = 1.0, 0.005

# One byte for each pipe, 1 when a worker has waited for room in vain. Forks share it; a stray write of user code costs a wait.
_stuck = mmap.mmap(-1, mmap.PAGESIZE)


def _enlarge(fd: int) -> int:
    """Have a pipe hold SIZE bytes, if that can be had. Returns how many it holds."""
    try:
        return fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, SIZE)
    except OSError:  # this user has too many large pipes (pipe-user-pages-soft): a smaller one will do
        return fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)


class Pipe(Sink):
    """The writing end at ``fd`` of the pipe to the process that writes the file at ``path``."""

    def __init__(self, path: str, fd: int) -> None:
        super().__init__(path)
        # Who writes it opens it. Made here, before any fork, because all know by it that a line is torn.
        self.file = Sink(path)
        self._patience = 0.0
        self.adopt(fd)
        self.capacity = _enlarge(fd)

    def adopt(self, fd: int) -> None:
        """Write to this end from now on. Raises OSError."""
        super().adopt(fd)
        self.whole = True  # lines are as long as in a file: nobody cuts them on the way

    def settle(self) -> None:
        """A handler may have closed every descriptor: then it is one of those that C libraries write to, or the file itself."""
        if self._is_ours(self.fd):
            return
        for number in (1, 2):
            if self._is_ours(number):
                try:
                    self.fd = os.open(f"/proc/self/fd/{number}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                except OSError:  # no /proc
                    break
                return

    def begin_to_wait(self) -> None:
        """This process and its forks may wait for room."""
        self._patience = PATIENCE

    def was_read(self, read_end: int) -> None:
        """There is room again, and as much as there was."""
        _stuck[self._place] = 0
        if fcntl.fcntl(read_end, fcntl.F_GETPIPE_SZ) != self.capacity:
            self.capacity = _enlarge(read_end)

    def stand_in(self) -> None:
        """Be standard output and error too: what C libraries and subprocesses write lands here.

        They wait for room as they do at any pipe: an open file of its own has no O_NONBLOCK, which most programs take for an error.
        """
        try:
            waiting = os.open(f"/proc/self/fd/{self.fd}", os.O_WRONLY | os.O_CLOEXEC)
        except OSError:  # no /proc
            waiting = os.dup(self.fd)
        for number in (1, 2):
            os.dup2(waiting, number, inheritable=True)
        os.close(waiting)

    def write(self, lines: Sequence[bytes]) -> int:
        """Write whole lines. Returns how many of them, the last ones, could not be written."""
        if self._is_ours(self.fd):
            return super().write(lines)
        # Nothing of the pipe is left: the file itself, for this once, because nobody would tell us of a rotation.
        try:
            self.file.open(create=False)
        except OSError:
            return len(lines)
        try:
            return self.file.write(lines)
        finally:
            self.file.close()

    def _put(self, data: bytes) -> int:
        end = time.monotonic() + self._patience
        while True:
            if len(data) <= PIPE_BUF or self._has_room(len(data)):
                try:
                    written = os.write(self.fd, data)
                except BlockingIOError:
                    pass  # others have taken it
                else:
                    if _stuck[self._place]:
                        _stuck[self._place] = 0
                    return written
            if not self._patience or _stuck[self._place]:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            if time.monotonic() > end:
                _stuck[self._place] = 1
            time.sleep(LOOK)

    def _has_room(self, size: int) -> bool:
        """Whether there is enough for what is longer than PIPE_BUF: else it would be torn (pipe(7)).

        Raises OSError when there never is.
        """
        capacity = fcntl.fcntl(self.fd, fcntl.F_GETPIPE_SZ)  # whoever has the pipe may change that
        most = capacity - capacity // 8  # its pages need not be full
        if size > most:
            raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
        return unread(self.fd) + size <= most

    @property
    def most(self) -> int:
        """How long an entry may be."""
        return max(PIPE_BUF, self.capacity // 4)

    @property
    def room(self) -> int:
        """How long a line of several may be."""
        return min(FILE_LINE, self.most)

    def _pieces(self, lines: Sequence[bytes]) -> Iterator[bytes]:
        """Whole lines, joined: what is logged at once stays together. Linux does not mix writes of those who do not wait."""
        return self._joined(lines, self.most)


def unread(fd: int) -> int:
    """How many bytes are in a pipe. Raises OSError."""
    buffer = bytearray(4)
    fcntl.ioctl(fd, termios.FIONREAD, buffer)
    return int(struct.unpack("i", buffer)[0])
