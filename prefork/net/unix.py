"""Unix sockets in the file system: made under another name and renamed, in place of a stale one and never of a live one.

So nobody ever sees one without its mode and owner, and two daemons that start at once do not replace each other's (unix(7),
`prefork.system.replacing`).
"""

import errno
import os
import socket
import stat

from prefork.errors import InUseError
from prefork.net.address import TEMPORARY_NAME
from prefork.system import process, replacing

# The sticky bit, by which systemd-tmpfiles spares a file, however old it is (XDG Base Directory Specification, XDG_RUNTIME_DIR). It
# knows live sockets by the names in /proc/net/unix, which are those that they were bound under. Of a socket it means nothing else.
SPARED = stat.S_ISVTX
# chown(2): neither user nor group is changed.
UNCHANGED = (-1, -1)
# Another daemon that starts at the same moment can take the path between two looks, but not for ever.
_TRIES = 10


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
        os.stat(os.path.join(folder, ""))  # bind(2) would not say what is missing
        stale = _stale(path)
        temporary = os.path.join(folder, os.urandom(TEMPORARY_NAME).hex()[: TEMPORARY_NAME - 1] + "." + name)
        sock.bind(temporary)
        try:
            dress(temporary, None, mode, owner)
            sock.listen(backlog)
            tries = 1
            while not replacing.put(temporary, path, stale):
                if tries == _TRIES:
                    raise InUseError(f"unix:{path} is in use: others take it again and again")
                tries += 1
                stale = _stale(path)
        except BaseException:
            remove(temporary)
            raise
        inode = inode_of(path)
        if inode is None:
            raise FileNotFoundError(errno.ENOENT, "it was removed as soon as it was made", path)
    except BaseException:
        sock.close()
        raise
    return sock, inode


def _stale(path: str) -> tuple[int, int] | None:
    """Device and inode of a socket where nobody listens any more; None when nothing is there.

    Raises InUseError when a live process listens, FileExistsError when it is no socket, PermissionError when it is another user's.
    """
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    if not stat.S_ISSOCK(found.st_mode):
        raise FileExistsError(errno.EEXIST, "something that is not a socket is in the way; remove it or name another path", path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return found.st_dev, found.st_ino
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
        itself, uid = f"/proc/self/fd/{fd}", found.st_uid
        mode |= SPARED
        try:
            os.chmod(itself, mode)
        except PermissionError:  # without CAP_FOWNER root may not, but take it
            os.chown(itself, os.geteuid(), -1)
            owner, uid = (uid if owner[0] == -1 else owner[0], owner[1]), os.geteuid()
            os.chmod(itself, mode)
        if owner[0] not in (-1, uid) or owner[1] not in (-1, found.st_gid):  # a sandbox may forbid chown(2)
            os.chown(itself, *owner)
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
        with open(f"/proc/{pid}/comm", errors="backslashreplace") as file:
            name = file.read().removesuffix("\n")
    except FileNotFoundError:  # gone, or of another pid namespace
        return ""
    except OSError:  # another user's, which /proc hides (hidepid); or no descriptors to read it
        return f" by process {pid}"
    return f" by {name} (pid {pid})" + (": `systemctl list-sockets` tells for which unit" if name == "systemd" else "")
