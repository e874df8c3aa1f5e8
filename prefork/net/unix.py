"""Unix sockets in the file system: made under another name and renamed, in place of a stale one and never of a live one.

So nobody ever sees one without its mode and owner, and two daemons that start at once do not replace each other's (unix(7),
rename(2)).
"""

import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager

from prefork.errors import AddressError, InUseError
from prefork.net.address import TEMPORARY_NAME
from prefork.system import process

# chown(2): neither user nor group is changed.
UNCHANGED = (-1, -1)
_CLAIM_TRIES, _CLAIM_PAUSE = 20, 0.005


def open_unix(path: str, mode: int, backlog: int, owner: tuple[int, int] = UNCHANGED) -> tuple[socket.socket, tuple[int, int]]:
    """A listening Unix socket at ``path`` with these permission bits and owners, and the inode that it has there.

    It is bound under another name and renamed, so that nobody ever sees it without its mode, and a stale one is replaced in
    one step. Raises AddressError when a live process listens there, OSError for the rest: FileExistsError when something that
    is not a socket is in the way.
    """
    folder, name = os.path.split(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(True)  # whatever default time-out the program has that runs prefork.Server
        with _claimed(folder):
            _make_way(path)
            temporary = os.path.join(folder, os.urandom(TEMPORARY_NAME).hex()[: TEMPORARY_NAME - 1] + "." + name)
            sock.bind(temporary)
            try:
                dress(temporary, None, mode, owner)
                sock.listen(backlog)
                os.rename(temporary, path)
            except BaseException:
                os.unlink(temporary)
                raise
        inode = inode_of(path)
        if inode is None:
            raise FileNotFoundError(errno.ENOENT, "it was removed as soon as it was made", path)
    except BaseException:
        sock.close()
        raise
    return sock, inode


@contextmanager
def _claimed(folder: str) -> Iterator[None]:
    """Two daemons that start at once must not both find the stale socket and replace each other's.

    The lock is held for microseconds, but anybody who can read the directory may take it: nobody waits for it for long.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for tries_left in reversed(range(_CLAIM_TRIES)):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not tries_left:
                    raise AddressError(f"{folder}: another process holds a lock on this directory; try again") from None
                time.sleep(_CLAIM_PAUSE)
        yield
    finally:
        os.close(fd)


def _make_way(path: str) -> None:
    try:
        kind = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise FileExistsError(errno.EEXIST, "something that is not a socket is in the way; remove it or name another path", path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return  # nobody listens there: the rename replaces it
        except PermissionError:
            raise PermissionError(errno.EACCES, "the socket that is there is another user's", path) from None
        except BlockingIOError:
            raise InUseError(f"unix:{path} is in use: somebody listens there, and the queue is full") from None
        # On the side that has connected: whoever called listen().
        pid = process.peer_of(probe).pid
    raise InUseError(f"unix:{path} is in use{held_by(pid)}")


def dress(path: str, inode: tuple[int, int] | None, mode: int, owner: tuple[int, int]) -> None:
    """Give the socket at ``path``, which has this inode (None: one that was just made), its mode and owners. Raises OSError.

    Whoever owns the folder could put a link to any file there, and root would give that away: so never by name.
    """
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        fresh = found.st_uid == os.geteuid() and found.st_nlink == 1
        ours = fresh if inode is None else (found.st_dev, found.st_ino) == inode
        if not stat.S_ISSOCK(found.st_mode) or not ours:
            raise FileExistsError(errno.EEXIST, "somebody has put something else in its place", path)
        if owner[0] not in (-1, found.st_uid) or owner[1] not in (-1, found.st_gid):  # a sandbox may forbid chown(2)
            os.chown(f"/proc/self/fd/{fd}", *owner)
        os.chmod(f"/proc/self/fd/{fd}", mode)
    finally:
        os.close(fd)


def inode_of(path: str) -> tuple[int, int] | None:
    """Device and inode at a path; None when there is nothing, or no way to it."""
    try:
        status = os.lstat(path)
    except OSError:  # gone, or the way to it: then nothing of ours is there
        return None
    return status.st_dev, status.st_ino


def remove(path: str) -> bool:
    """Remove a socket's path. False when it is not to be removed by us any more (a read-only or vanished directory)."""
    try:
        os.unlink(path)
    except OSError:
        return False
    return True


def held_by(pid: int) -> str:
    """Who that is, for a message, as far as /proc lets us see."""
    if pid == os.getpid():
        return " by this daemon itself, for something else"
    try:
        import psutil  # noqa: PLC0415 - slow to import, and only needed when an address is taken
    except (ImportError, OSError):  # removed while we run, as a whole environment may be; or no descriptors to read it
        return f" by pid {pid}"
    try:
        return f" by {psutil.Process(pid).name()} (pid {pid})"
    except (OSError, psutil.Error, ValueError):  # gone, or of another pid namespace
        return ""
