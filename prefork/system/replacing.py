"""A file gets its name in the place of the one that was looked at, and of no other (renameat2(2)).

Two daemons that start at once must not both find the same stale file and replace each other's. A lock on the file or its folder is
no way to that: whoever may read either may lock it (flock(2), F_RDLCK of fcntl(2)), and keep a daemon from starting. So nothing is
locked. The new file and the old one exchange their names in one step; what comes out is what was looked at, or goes back.
"""

import ctypes
import errno
import os

_AT_FDCWD = -100
_NOREPLACE, _EXCHANGE = 1, 2

_libc = ctypes.CDLL(None, use_errno=True)


def put(beside: str, path: str, stale: tuple[int, int] | None) -> bool:
    """Give the file at ``beside`` the name ``path``, in the place of the one with this device and inode, or of none.

    False when something else is there by now: then both are what they were, and the caller looks again. Raises OSError.
    """
    try:
        _rename(beside, path, _NOREPLACE if stale is None else _EXCHANGE)
    except (FileExistsError, FileNotFoundError):
        return False
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS):
            raise
        return _put_anyhow(beside, path, stale)
    if stale is None:
        return True
    found = os.lstat(beside)
    if (found.st_dev, found.st_ino) == stale:
        os.unlink(beside)
        return True
    try:
        _rename(beside, path, _EXCHANGE)
    except FileNotFoundError:  # ours was removed meanwhile
        os.rename(beside, path)
    return False


def is_swept(path: str, inode: tuple[int, int]) -> bool:
    """Whether a path is not any more that of the file with this device and inode; false where we may not look."""
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return (found.st_dev, found.st_ino) != inode


def _put_anyhow(beside: str, path: str, stale: tuple[int, int] | None) -> bool:
    """On a file system that exchanges nothing (NFS): of two that find a stale file in the same instant the later one stays."""
    if stale is None:
        try:
            os.link(beside, path, follow_symlinks=False)
        except FileExistsError:
            return False
        os.unlink(beside)
    else:
        os.rename(beside, path)
    return True


def _rename(old: str, new: str, flags: int) -> None:
    try:
        rename = _libc.renameat2
    except AttributeError:  # a C library without it
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None
    if rename(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), old, None, new)
