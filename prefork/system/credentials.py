"""Who a process is: looking users and groups up, and giving root up for good (credentials(7), setresuid(2), prctl(2)).

Dropping is for fork servers; their workers are born without it. The order matters: groups, then group, then user, each with
the saved id, or the process could come back; then no_new_privs, so that no set-user-ID program helps it either. The kernel
clears the parent-death signal when credentials change, and sets "dumpable" as it likes, so both are set after.
"""

import errno
import functools
import grp
import os
import pwd
from collections.abc import Callable
from dataclasses import dataclass
from os import close, write
from os import open as open_file
from pathlib import Path

from prefork.errors import ConfigError, NotPermittedError
from prefork.system import process

_PR_SET_NO_NEW_PRIVS = 38
# What a worker's badness is raised by, of the 1000 that are all memory (proc_pid_oom_score_adj(5)): when memory is short the
# kernel takes a worker, which costs a connection, before the master, which costs all of them.
WORKER_OOM_SCORE = 200
_OOM_SCORE, _OOM_SCORE_LIMIT = "/proc/self/oom_score_adj", 1000


@dataclass(frozen=True, slots=True)
class Credentials:
    """Who to become. ``name`` and ``home`` are empty for a number that no user has."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    name: str = ""
    home: str = ""


def uid_of(user: str) -> int:
    """The number of a user given by name or number. Raises ConfigError."""
    if user.isdigit():
        return int(user)
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        raise ConfigError(f"user {user!r} does not exist on this machine: name one that does, or create it (useradd(8))") from None


def gid_of(group: str) -> int:
    """The number of a group given by name or number. Raises ConfigError."""
    if group.isdigit():
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise ConfigError(
            f"group {group!r} does not exist on this machine: name one that does, or create it (groupadd(8))"
        ) from None


def wanted(user: str, group: str) -> Credentials | None:
    """Who ``user`` and ``group`` are, when that is not who we are; None when nothing has to change.

    Raises ConfigError for somebody who does not exist, NotPermittedError when we can't become them.
    """
    if not user and not group:
        return None
    uid = uid_of(user) if user else os.geteuid()
    try:
        account = pwd.getpwuid(uid)
    except KeyError:
        account = None
    gid = gid_of(group) if group else account.pw_gid if account else uid
    name, home = (account.pw_name, account.pw_dir) if account else ("", "")
    if (uid, gid) == (os.geteuid(), os.getegid()) and uid != 0:
        return None
    if os.geteuid() != 0:
        said = ", ".join(f"{key} = {value!r}" for key, value in (("user", user), ("group", group)) if value)
        raise NotPermittedError(f"{said}: only root can become somebody else: start prefork as root, or leave it out")
    # A group that was named is the only one: somebody who asks for it does not want the user's others.
    groups = (gid,) if group or not name else tuple(os.getgrouplist(name, gid))
    return Credentials(uid, gid, groups, name, home)


def become(who: Credentials) -> None:
    """Be ``who`` from now on, and never anybody else again. Raises OSError, and then the process must end."""
    os.setgroups(who.groups)
    os.setresgid(who.gid, who.gid, who.gid)
    os.setresuid(who.uid, who.uid, who.uid)
    if (os.getresuid(), os.getresgid()) != ((who.uid,) * 3, (who.gid,) * 3):
        raise PermissionError(errno.EPERM, "the kernel has not done it")
    process.prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if who.name:
        os.environ.update(USER=who.name, LOGNAME=who.name, HOME=who.home)


def watch(mark: Callable[[], None]) -> None:
    """From now on tell ``mark`` when user code changes credentials: the kernel forgets the parent-death signal then (prctl(2)).

    To set it after each connection would be 3 us.
    """
    for changing in ("setuid", "seteuid", "setreuid", "setresuid", "setgid", "setegid", "setregid", "setresgid"):
        setattr(os, changing, _marked(getattr(os, changing), mark))


def _marked(function: Callable[..., None], mark: Callable[[], None]) -> Callable[..., None]:
    @functools.wraps(function)
    def call(*args: int, **kwargs: int) -> None:
        mark()
        function(*args, **kwargs)

    return call


def offering_to_the_oom_killer() -> Callable[[], object] | None:
    """What makes a child of this process a better victim than its parent is; None where there is no /proc.

    The child has to be a public process by then: of a private one the file is root's, so that it can't be tried here.
    """
    try:
        own = Path(_OOM_SCORE).read_bytes()  # ProcSubset=pid has this file
    except OSError:
        return None
    score = str(min(_OOM_SCORE_LIMIT, int(own) + WORKER_OOM_SCORE)).encode()
    return functools.partial(_offer, _OOM_SCORE, os.O_WRONLY | os.O_CLOEXEC, score)


def _offer(path: str, flags: int, score: bytes) -> None:
    try:
        _write(path, flags, score)
    except OSError:  # a read-only /proc, or no descriptor; or the fork server has a higher one by now, below which only root may go
        return


def _write(path: str, flags: int, score: bytes) -> None:
    fd = open_file(path, flags)
    try:
        write(fd, score)
    finally:
        close(fd)
