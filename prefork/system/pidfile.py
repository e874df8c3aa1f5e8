"""The pid file: a promise to scripts that a path names the running master, and nobody else. The instance's lock is another one.

It appears whole (written beside, then renamed), and a lock tells a live daemon's file from one that a killed daemon left behind,
which a pid that the kernel has given to somebody else meanwhile could not. It is removed at the end only if it is still the file
that was written.

The lock is one that no other user can have or be in the way of, though all may read the file: a write lock (fcntl(2), F_OFD_SETLK)
takes a descriptor that is open for writing, and ours is taken while the file is 0600 still. A starting daemon looks for a write
lock and takes none; read locks of others do not count (flock(2), which needs no right to write, would).
"""

import errno
import fcntl
import os
import re
import stat
import struct
from dataclasses import dataclass

from prefork.errors import AddressError, ConfigError, InUseError, NotPermittedError, explained
from prefork.system import replacing

# Scripts of other users read it.
_MODE = 0o644
# Nobody else can open the lock. By the sticky bit systemd-tmpfiles spares it (`prefork.net.unix.SPARED`).
LOCK_MODE = 0o1600
# Another daemon that starts at the same moment can take the path between two looks, but not for ever.
_TRIES = 10
# struct flock: type, whence, start, length (0: to the end), pid, which open file descriptions leave 0.
_FLOCK = struct.Struct("@hhqqi4x")


@dataclass(slots=True)
class PidFile:
    """A pid file that was written by this process, and is locked by it."""

    path: str
    fd: int

    @property
    def is_swept(self) -> bool:
        """Whether the path was removed, or is another file's by now."""
        found = os.fstat(self.fd)
        return replacing.is_swept(self.path, (found.st_dev, found.st_ino))

    def remove(self) -> None:
        """Remove it if it is still ours, and let go of the lock."""
        try:
            if os.path.samestat(os.lstat(self.path), os.fstat(self.fd)):
                os.unlink(self.path)
        except OSError:
            return  # it, or the way to it, is gone or not ours to change: then there is nothing that we may remove
        finally:
            os.close(self.fd)


def write(path: str, *, mode: int = _MODE, what: str = "pid_file", other: str = "path") -> PidFile:
    """Write our pid to ``path``. Raises AddressError when a running daemon holds it, ConfigError when it can't be written.

    ``mode`` is the file's in the end; messages call it ``what``, and say that ``other`` would do.
    """
    beside = f"{path}.{os.urandom(4).hex()}"
    try:
        fd = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
            os.write(fd, f"{os.getpid()}\n".encode())
            os.fchmod(fd, mode)  # whatever the umask
            for _ in range(_TRIES):
                if replacing.put(beside, path, _stale(path, what, other)):
                    return PidFile(path, fd)
            raise AddressError(f"{what} = {path!r}: other daemons take it again and again: name another {other}")
        except BaseException:
            os.close(fd)
            if os.path.exists(beside):
                os.unlink(beside)
            raise
    except OSError as error:
        folder = os.path.dirname(path)
        match error.errno:
            case errno.ENOENT:
                raise ConfigError(f"{what} = {path!r}: the directory {folder} does not exist: create it, or name another") from None
            case errno.EACCES | errno.EPERM:
                raise NotPermittedError(
                    f"{what} = {path!r}: no permission to write in {folder}: make one for it, or name another {other}"
                ) from None
            case _:
                raise ConfigError(f"{what} = {path!r}: {explained(error, f'name another {other}')}") from None


def _stale(path: str, what: str, other: str) -> tuple[int, int] | None:
    """Device and inode of a pid file that a killed daemon has left behind, or an empty one; None when nothing is there.

    Raises AddressError when a running daemon has it, ConfigError when it is something else.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ConfigError(f"{what} = {path!r}: a symbolic link is in the way; remove it or name another {other}") from None
        raise
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError(f"{what} = {path!r}: something that is no file is in the way; remove it or name another {other}")
        if found.st_uid not in (0, os.geteuid()):  # its owner could lock it
            whose = f"a file of user {found.st_uid} is in the way"
            raise ConfigError(f"{what} = {path!r}: {whose}; remove it or name another {other}")
        held = os.read(fd, 32)
        if _is_written_by_another(fd):
            pid = held.split(b"\n")[0].decode("ascii", "replace")
            raise InUseError(f"{what} = {path!r}: the daemon with pid {pid} is running and holds it")
        if held and not re.fullmatch(rb"[0-9]{1,10}\n?", held):
            raise ConfigError(f"{what} = {path!r}: a file that is no pid file is in the way; remove it or name another {other}")
        return found.st_dev, found.st_ino
    finally:
        os.close(fd)


def _is_written_by_another(fd: int) -> bool:
    """Whether a process that may write the file has locked it: what would be in the way of a read lock."""
    kind, *_ = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)))
    return bool(kind != fcntl.F_UNLCK)
