"""Whose child a process is, and with whose credentials it runs: asked of the kernel, never of the process.

By a pidfd (PIDFD_GET_INFO, Linux 6.13; pidfd_open(2)). That needs no /proc, and tells of processes that one with hidepid=invisible
hides: another user's, and those that can't be dumped. Older kernels are asked by /proc/PID/status (proc_pid_status(5)). What
follows from the answer is the caller's business.
"""

import errno
import fcntl
import os
import struct
from dataclasses import dataclass
from enum import Enum

# struct pidfd_info as it was first, in linux/pidfd.h: mask, cgroup; pid, tgid, parent; uid and gid four times (real, effective,
# saved, file system); the exit status. The number of the request has its size.
_INFO = struct.Struct("QQ3I8Ii")
_GET_INFO = 3 << 30 | _INFO.size << 16 | 0xFF << 8 | 11
_WANTED = 1 | 2  # PIDFD_INFO_PID, PIDFD_INFO_CREDS


class Missing(Enum):
    """Why there is no answer."""

    GONE = "there is no such process"
    HIDDEN = "the kernel does not tell us"


@dataclass(frozen=True, slots=True)
class Identity:
    """A process. ``uids`` and ``gids``: all that it has, real, effective, saved and the file system's."""

    parent: int
    uids: frozenset[int]
    gids: frozenset[int]


def identify(pid: int) -> Identity | Missing:
    """The process with this pid now; one that has ended and was not reaped, too."""
    try:
        fd = os.pidfd_open(pid)
    except OSError as error:
        if error.errno in (errno.ESRCH, errno.EINVAL, errno.ENOENT):  # the last two: the number of a thread
            return Missing.GONE
        return _by_proc(pid)  # no descriptor is left, or a sandbox forbids it
    try:
        return _by_pidfd(fd) or _by_proc(pid)
    finally:
        os.close(fd)


def _by_pidfd(fd: int) -> Identity | Missing | None:
    """None where the kernel can't do that."""
    buffer = bytearray(_INFO.pack(_WANTED, *[0] * 13))
    try:
        fcntl.ioctl(fd, _GET_INFO, buffer, True)
    except OSError as error:
        return Missing.GONE if error.errno == errno.ESRCH else None
    told, _, _, _, parent, *ids, _ = _INFO.unpack(buffer)
    return Identity(parent, frozenset(ids[::2]), frozenset(ids[1::2])) if told & _WANTED == _WANTED else None


def _by_proc(pid: int) -> Identity | Missing:
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            lines = dict(line.partition(b":")[::2] for line in file.read().splitlines())
    except OSError:
        lines = {}
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return Missing.GONE
    except PermissionError:  # it is there, and another user's
        pass
    try:
        uids, gids = (frozenset(map(int, lines[key].split())) for key in (b"Uid", b"Gid"))
        is_thread = int(lines[b"Tgid"]) != pid
        return Missing.GONE if is_thread else Identity(int(lines[b"PPid"]), uids, gids)
    except KeyError:
        return Missing.HIDDEN
