"""Running daemons as the commands see them: where their control sockets are, which one is meant, how to ask it.

A command asks only its own user's daemons (SO_PEERCRED, unix(7)): whatever else listens at a path may have been put there, or
linked there, to be taken for one. Root asks everybody's, by a path that only root or that user can have made.
"""

import difflib
import itertools
import json
import os
import pwd
import socket
import stat
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefork import values
from prefork.errors import REMEDIES, AddressError, RefusedError, explained
from prefork.net.mending import TIMEVAL
from prefork.system import process
from prefork.system.process import Peer

# SCM_RIGHTS takes 253 descriptors (unix(7)).
DESCRIPTORS_LIMIT = 250
_SUFFIX = ".sock"
_LOCK_SUFFIX = ".lock"
_WRITABLE_BY_OTHERS = 0o022
# They change nothing, and are asked again whatever has become of the first time.
_QUESTIONS = ("status", "outcome")
# How often a command comes again that was let go unheard.
_TRIES = 10
# What answers may be any program of the user whom root asks about: it gets no more of our time and memory. The largest true answers
# have 64 stacks of 16 KiB and the names of some thousand addresses.
ANSWER_TIME = 10.0
ANSWER_LIMIT = 8 << 20
_READ = 65536
# Of a folder that another user may fill.
ENTRIES_LIMIT = 10_000
# Of instances in a message.
_LISTED = 20


# -- where the sockets are


def runtime_directory() -> Path:
    """The directory for control sockets, made if need be. Raises OSError when there is none that is safely ours."""
    if given := os.environ.get("RUNTIME_DIRECTORY"):
        return Path(given.split(":")[0])
    # After su or sudo it may name the directory of somebody who has not logged in.
    if (xdg := os.environ.get("XDG_RUNTIME_DIR")) and os.path.isdir(xdg):
        return _private(Path(xdg) / "prefork")
    if os.geteuid() == 0:
        return _private(Path("/run/prefork"))
    return _private(Path(f"/tmp/prefork-{os.geteuid()}"))  # noqa: S108 - checked to be ours, or refused


def _private(path: Path) -> Path:
    """The directory, 0700 and ours: in a world-writable place anybody may have made it before us, or made it a link."""
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        pass  # checked below, like one that we made
    if not _is_ours_alone(path.lstat()):
        raise PermissionError(f"{path} must be a directory of user {os.geteuid()} that nobody else can write to")
    return path


def default_path(name: str) -> str:
    """The control socket of the instance ``name``. Raises OSError when there is no place for it."""
    return str(runtime_directory() / (name + _SUFFIX))


def lock_path(control: str) -> str:
    """The file whose lock makes the daemon with this control socket the only one. Raises OSError when there is no place for it.

    Nobody else may decide whether a daemon starts: only our user can write to its folder, the control socket's own if that is one.
    """
    if _is_ours_alone(os.stat(os.path.dirname(control))):
        return control + _LOCK_SUFFIX
    folder = runtime_directory()
    if not _is_ours_alone(folder.stat()):
        raise PermissionError(f"others can write to {folder}")
    return str(folder / (os.fsencode(os.path.realpath(control)).hex() + _LOCK_SUFFIX))


def _is_ours_alone(status: os.stat_result) -> bool:
    """Whether only our user can write to the folder with this status."""
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & _WRITABLE_BY_OTHERS


def instances() -> dict[str, str]:
    """Control sockets of daemons, by instance name: in our runtime directory, and in those of systemd units and users."""
    found: dict[str, str] = {}
    for place in _places():
        for file in _entries(place):
            name = file.removesuffix(_SUFFIX)
            if name != file and name not in found and _is_name(name) and _is_live(path := str(place / file)):
                found[name] = path
    return found


def _is_name(name: str) -> bool:
    try:
        values.name(name)
    except ValueError:  # no daemon has it: another user's file
        return False
    return True


def _places() -> list[Path]:
    units, users = Path("/run/prefork"), Path("/run/user")
    places = [units, *(units / name for name in _entries(units)), *(users / name / "prefork" for name in _entries(users))]
    places.append(Path(f"/tmp/prefork-{os.geteuid()}"))  # noqa: S108 - only looked at
    for variable in ("RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR"):
        if given := os.environ.get(variable):
            places = [Path(given.split(":")[0]), Path(given) / "prefork", *places]
    return places


def _entries(folder: Path) -> list[str]:
    """What a folder holds, as far as we look; nothing when it is none, or is another user's, or its file system is broken."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in itertools.islice(entries, ENTRIES_LIMIT))
    except OSError:
        return []


def refuse_mistakable(path: str) -> None:
    """Raise AddressError when commands that look for instances would take a Unix socket there for one's, and connect to it."""
    if not path.endswith(_SUFFIX):
        return
    for place in _places():
        with suppress(OSError):  # it is not there
            if os.path.samefile(os.path.dirname(path), place):
                raise AddressError(f"unix:{path}: what ends with {_SUFFIX} in that directory is an instance's: name it otherwise")


def _is_live(path: str) -> bool:
    """Whether a daemon that we would ask listens there; one that was killed leaves its socket behind."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
            return _distrust(path, process.peer_of(probe)) is None
        except BlockingIOError:
            return True  # its queue is full
        except OSError:
            return False


# -- asking


def ask(path: str, command: str, patience: float, **arguments: Any) -> tuple[dict[str, Any], list[int]]:
    """Send a command and wait for its outcome, ``patience`` seconds at most: the answer, and the descriptors with it.

    Once it begins, an answer has ANSWER_TIME seconds and ANSWER_LIMIT bytes. Raises RefusedError when nobody listens there, or
    somebody whom we don't believe, or when the connection ends without an answer.
    """
    line = json.dumps({"command": command, **arguments}).encode() + b"\n"
    deadline = time.monotonic() + patience
    for tries_left in reversed(range(_TRIES)):
        try:
            data, descriptors = _converse(path, line, patience, deadline)
        except (BrokenPipeError, ConnectionResetError):
            # Let go before it was heard: in a crowd a daemon takes those for idlers whose words it has not seen yet.
            if not tries_left:
                raise RefusedError(f"{path}: the daemon is crowded by others; try again") from None
            continue
        try:
            answer = _parsed(path, data)
        except RefusedError:
            _close(descriptors)
            raise
        if not tries_left or not _is_asked_again(command, data, answer):
            break
        _close(descriptors)
    if answer is None:
        _close(descriptors)
        raise RefusedError(f"{path}: the daemon ended the connection without an answer; is it running?")
    return answer, descriptors


def _parsed(path: str, data: bytes) -> dict[str, Any] | None:
    """The answer; None when it is not whole. Raises RefusedError when it is no daemon's."""
    if not data.endswith(b"\n"):
        return None
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise RefusedError(f"{path}: what answers is no daemon: {data[:80]!r}")
    return answer


def process_of(path: str) -> int | None:
    """A pidfd (pidfd_open(2)) of the daemon that listens at ``path``; None when it is not to be seen, as from inside a container.

    Not by the pid that it tells: that is its own namespace's.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            _connect(sock, path, ANSWER_TIME)
            pid = process.peer_of(sock).pid
            return os.pidfd_open(pid) if pid else None
        except (OSError, RefusedError):  # whoever asks next is told
            return None


def shares_pids(path: str, pid: int) -> bool:
    """Whether /proc has the daemon that listens at ``path`` under the ``pid`` that it tells, and so its workers under theirs.

    It has not where daemon and /proc are of different pid namespaces: a number there is another process here.
    """
    process = process_of(path)
    if process is None:
        return False
    try:
        with open(f"/proc/self/fdinfo/{process}") as file:
            known = dict(line.rstrip().split(":\t", 1) for line in file)
        # NSpid has several numbers of a process in a namespace below that of /proc. A kernel without namespaces has none.
        return known.get("NSpid", known["Pid"]) == str(pid)
    except FileNotFoundError:  # no /proc, or another namespace's, which does not have us
        return False
    finally:
        os.close(process)


def _is_asked_again(command: str, data: bytes, answer: dict[str, Any] | None) -> bool:
    """An upgrade cuts what is being said: what was not heard is said again, and what changes nothing."""
    if answer is None:
        return data != b"" and command in _QUESTIONS
    return "again" in answer and (answer["again"] or command in _QUESTIONS)


def _close(descriptors: Iterable[int]) -> None:
    for fd in descriptors:
        os.close(fd)


def _connect(sock: socket.socket, path: str, seconds: float) -> None:
    """Connect to the daemon at ``path``. Raises RefusedError when it is one that we don't believe, OSError for the rest."""
    # A socket with a time-out of Python's is told EAGAIN at once when the queue is full; a blocking one waits for its turn.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, TIMEVAL.pack(int(seconds), max(1, int(seconds % 1 * 1e6))))
    sock.connect(path)
    if (reason := _distrust(path, process.peer_of(sock))) is not None:
        raise RefusedError(reason)


def _converse(path: str, line: bytes, patience: float, deadline: float) -> tuple[bytes, list[int]]:
    """Say a line, and hear what is said to it; ``deadline`` is for its beginning."""
    data, descriptors = bytearray(), list[int]()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            _connect(sock, path, _left(deadline))
            sock.settimeout(_left(deadline))
            sock.sendall(line)
            sock.settimeout(_left(deadline))
            first, descriptors, _, _ = socket.recv_fds(sock, _READ, DESCRIPTORS_LIMIT)
            data += first
            deadline, patience = time.monotonic() + ANSWER_TIME, ANSWER_TIME
            while more := _more(sock, deadline):
                data += more
                if len(data) > ANSWER_LIMIT:
                    raise RefusedError(f"{path}: an answer of more than {ANSWER_LIMIT} bytes: what listens there is no daemon")
    except ConnectionResetError:
        # The other end closed with something unread (unix(7)): what it says was said without that, and silence says it all.
        if not data:
            raise
    except BaseException as error:
        _close(descriptors)
        match error:
            case BrokenPipeError():
                raise
            case TimeoutError() | BlockingIOError():
                raise RefusedError(f"{path}: no answer within {patience:g} s; is the daemon stopped?") from None
            case PermissionError():
                raise RefusedError(f"{path}: it is another user's; a daemon hears only its own user and root") from None
            case OSError():
                why = explained(error) if error.errno in REMEDIES else f"{error.strerror or error}; is the daemon running?"
                raise RefusedError(f"{path}: {why}") from None
            case _:
                raise
    return bytes(data), descriptors


def _more(sock: socket.socket, deadline: float) -> bytes:
    sock.settimeout(_left(deadline))
    return sock.recv(_READ)


def _left(deadline: float) -> float:
    """Seconds until then. Raises TimeoutError when there are none."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


def _distrust(path: str, peer: Peer) -> str | None:
    """Why what listens at ``path`` is not asked; None when it is."""
    us = os.geteuid()
    if peer.uid == us:
        return None
    who = f"{path}: {_user(peer.uid)} (pid {peer.pid}) listens there"
    if us != 0:
        return f"{who}; a daemon hears only its own user and root: not asked"
    folder = os.stat(os.path.dirname(os.path.realpath(path)))
    if _links_are_roots(path) and folder.st_uid in (0, peer.uid) and not folder.st_mode & _WRITABLE_BY_OTHERS:
        return None
    return f"{who}; others could have put it there (it is a link, or they can write to its folder): not asked"


def _links_are_roots(path: str) -> bool:
    """Whether every symbolic link on the way is root's, like /var/run and what systemd makes for a DynamicUser."""
    way = Path(os.path.abspath(path))
    return all(entry.lstat().st_uid == 0 for entry in (way, *way.parents) if entry.is_symlink())


def _user(uid: int) -> str:
    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"


# -- which one


def find(name: str | None, control: str | None) -> str:
    """The control socket to talk to: by path, by name, or the only one there is. Raises RefusedError naming what there is."""
    if control is not None:
        return control
    known = instances()
    if name is not None:
        if name in known:
            return known[name]
        raise RefusedError(f"no instance {name!r} is running; {nearest(name, known)}{_listed(known)}")
    if len(known) == 1:
        return next(iter(known.values()))
    raise RefusedError(f"which instance? {_listed(known)}" if known else "no instance is running, or its socket is another user's")


def nearest(word: str, known: Iterable[str]) -> str:
    """What may have been meant, as a question; empty when nothing is like it."""
    near = closest(word, known)
    return f"did you mean {near[0]!r}? " if near else ""


def closest(word: str, known: Iterable[str]) -> list[str]:
    """The one that is most like it, if any is."""
    # Of two letters one may be wrong.
    return difflib.get_close_matches(word, list(known), 1, cutoff=0.5)


def _listed(known: dict[str, str]) -> str:
    if not known:
        return "none is running"
    more = f" and {len(known) - _LISTED} more" if len(known) > _LISTED else ""
    return f"running: {', '.join(sorted(known)[:_LISTED])}{more}"
