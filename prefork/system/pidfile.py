"""The pid file: a promise to scripts that a path names the running master, and nobody else.

It appears whole (written beside, then linked or renamed), and its lock (flock(2)) tells a live daemon's file from one that a
killed daemon left behind, which a pid that the kernel has given to somebody else meanwhile could not. It is removed at the end
only if it is still the file that was written.
"""

import errno
import fcntl
import os
import re
import stat
from dataclasses import dataclass

from prefork.errors import AddressError, ConfigError, NotPermittedError

_MODE = 0o644
# Another daemon that starts at the same moment can take the path between two looks, but not for ever.
_TRIES = 10


@dataclass(slots=True)
class PidFile:
    """A pid file that was written by this process, and is locked by it."""

    path: str
    fd: int

    def remove(self) -> None:
        """Remove it if it is still ours, and let go of the lock."""
        try:
            if os.path.samestat(os.lstat(self.path), os.fstat(self.fd)):
                os.unlink(self.path)
        except OSError:
            return  # it, or the way to it, is gone or not ours to change: then there is nothing that we may remove
        finally:
            os.close(self.fd)


def write(path: str) -> PidFile:
    """Write our pid to ``path``. Raises AddressError when a running daemon holds it, ConfigError when it can't be written."""
    beside = f"{path}.{os.urandom(4).hex()}"
    try:
        fd = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)
        try:
            os.fchmod(fd, _MODE)  # whatever the umask: scripts of other users read it
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(fd, f"{os.getpid()}\n".encode())
            for _ in range(_TRIES):
                if _put(beside, path):
                    return PidFile(path, fd)
            raise AddressError(f"pid_file = {path!r}: other daemons take it again and again: name another path")
        except BaseException:
            os.close(fd)
            if os.path.exists(beside):
                os.unlink(beside)
            raise
    except OSError as error:
        folder = os.path.dirname(path)
        match error.errno:
            case errno.ENOENT:
                raise ConfigError(
                    f"pid_file = {path!r}: the directory {folder} does not exist: create it, or name another"
                ) from None
            case errno.EACCES | errno.EPERM:
                raise NotPermittedError(
                    f"pid_file = {path!r}: no permission to write in {folder}: make one for it, or name another path"
                ) from None
            case _:
                raise ConfigError(f"pid_file = {path!r}: {error.strerror}: name another path") from None


def _put(beside: str, path: str) -> bool:
    """Give our file its name, in place of a stale one. False when somebody else was faster: look again."""
    try:
        os.link(beside, path, follow_symlinks=False)
    except FileExistsError:
        pass  # a stale one, or a live daemon's
    else:
        os.unlink(beside)
        return True
    try:
        stale = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ConfigError(f"pid_file = {path!r}: a symbolic link is in the way; remove it or name another path") from None
        raise
    try:
        if not stat.S_ISREG(os.fstat(stale).st_mode):
            raise ConfigError(f"pid_file = {path!r}: something that is no file is in the way; remove it or name another path")
        try:
            fcntl.flock(stale, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(stale, 32).split(b"\n")[0].decode("ascii", "replace")
            raise AddressError(
                f"pid_file = {path!r}: the daemon with pid {pid} is running and holds it: stop it, or name another path"
            ) from None
        held = os.read(stale, 32)
        if held and not re.fullmatch(rb"[0-9]{1,10}\n?", held):
            raise ConfigError(f"pid_file = {path!r}: a file that is no pid file is in the way; remove it or name another path")
        # Whoever replaces a stale file holds its lock meanwhile: of two, one finds another file here, and looks again.
        if not os.path.samestat(os.fstat(stale), os.lstat(path)):
            return False
        os.rename(beside, path)
    finally:
        os.close(stale)
    return True
