"""The program that this process runs: how it was started, how to try its successor, how to become that under the same pid.

An exec keeps pid, children, the subreaper's role, the signal mask and what is pending; it closes every descriptor that is not
inheritable. Between the exec and the new handlers each handled signal kills (measured: 12 of 12), so all are blocked before it,
and stay so until the new program is ready. Where the state is travels in the environment, with our pid: nobody else's child takes
it for its own.
"""

import contextlib
import json
import os
import sys
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from prefork.system import signals

VARIABLE = "PREFORK_STATE"
_PYTHONS = ("PYTHONHOME", "PYTHONPATH")
# An environment variable has at most 128 KiB; who goes back tells why in it.
_REASON_LIMIT = 4096
# In bytes. A worker takes about 150 of them.
STATE_LIMIT = 1 << 26
# Where the tried program finds the state.
STATE_DESCRIPTOR = 3


@dataclass(frozen=True, slots=True)
class Program:
    """How a program was started: enough to start it again."""

    executable: str  # as it was called: a venv's link is followed anew
    image: str  # the file that was executed
    prefix: tuple[str, ...]  # its arguments before the command: -m prefork, or the path of a script
    arguments: tuple[str, ...]  # those after it
    home: str  # where that interpreter's library is
    path: tuple[str, ...]  # where it imports from
    way_back: tuple[str, ...]  # prefix, without links: they may name the successor by then
    variables: dict[str, str]  # what the environment says of both

    def line(self, command: str, *options: str) -> list[str]:
        """The command line that has it carry out ``command``."""
        return [self.executable, *self.prefix, command, *options, *self.arguments]


def started(command: str) -> Program | None:
    """How this process was started, if it was as ``prefork COMMAND ...``; None when that can't be told."""
    given = sys.argv[1:]
    if given[:1] != [command] or not sys.executable or sys.orig_argv[-len(given) :] != given:
        return None
    prefix = sys.orig_argv[1 : -len(given)]
    is_script = bool(prefix) and prefix[-2:-1] not in (["-m"], ["-c"])
    if is_script:
        prefix[-1] = os.path.abspath(prefix[-1])  # a script: the working directory may be another one by then
    return Program(
        executable=sys.executable,
        image=_image(),
        prefix=tuple(prefix),
        arguments=tuple(given[1:]),
        home=os.path.realpath(sys.base_prefix),
        path=tuple(os.path.realpath(place) for place in sys.path if place),
        way_back=(*prefix[:-1], os.path.realpath(prefix[-1])) if is_script else tuple(prefix),
        variables={name: os.environ[name] for name in _PYTHONS if name in os.environ},
    )


def _image() -> str:
    try:
        return os.readlink("/proc/self/exe")
    except FileNotFoundError:  # no /proc
        return os.path.realpath(sys.executable)


def keep_state(data: bytes) -> int:
    """A descriptor of a file in memory with this state."""
    fd = os.memfd_create("prefork-state", os.MFD_CLOEXEC)
    written = 0
    try:
        while written < len(data):
            written += os.pwrite(fd, data[written:], written)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_state(fd: int) -> bytes:
    """What `keep_state` kept; of what is larger than any state a byte too many."""
    data = b""
    while len(data) <= STATE_LIMIT and (more := os.pread(fd, min(1 << 20, STATE_LIMIT + 1 - len(data)), len(data))):
        data += more
    return data


def try_out(program: Program, state: int) -> tuple[int, int]:
    """Start ``check`` of the program that is there now, on a copy of the state. Returns its pid and what it says (not blocking).

    Raises OSError when it can't be started.
    """
    with contextlib.ExitStack() as opened, contextlib.ExitStack() as failed:
        said, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        failed.callback(os.close, said)
        opened.callback(os.close, theirs)
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        opened.callback(os.close, nothing)
        os.set_blocking(theirs, True)
        line = program.line("check", f"--adopt={STATE_DESCRIPTOR}")
        pid = os.posix_spawn(
            line[0],
            line,
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, nothing, 0),
                (os.POSIX_SPAWN_DUP2, nothing, 1),
                (os.POSIX_SPAWN_DUP2, theirs, 2),
                (os.POSIX_SPAWN_DUP2, state, STATE_DESCRIPTOR),
            ],
            setsid=True,
            setsigmask=(),
            setsigdef=signals.BLOCKABLE,
        )
        failed.pop_all()
    return pid, said


def become(program: Program, state: int, descriptors: Collection[int]) -> None:
    """Become the program that is there now, with these descriptors open. Called with all signals blocked.

    Raises OSError, with everything as it was, when that can't be.
    """
    kept = [fd for fd in {*descriptors, state} if not os.get_inheritable(fd)]
    try:
        for fd in kept:
            os.set_inheritable(fd, True)
        environment = {**os.environ, VARIABLE: f"{state}:{os.getpid()}"}
        os.execve(program.executable, program.line("serve"), environment)  # noqa: S606 - ourselves
    finally:
        for fd in kept:
            os.set_inheritable(fd, False)


def handed_over(environment: MutableMapping[str, str]) -> tuple[int, str] | None:
    """The descriptor of the state that this process was handed, and why we are the old program again, if we are."""
    handed = _handed(environment)
    environment.pop(VARIABLE, None)
    if handed is not None:
        os.set_inheritable(handed[0], False)
    return handed


def _handed(environment: Mapping[str, str]) -> tuple[int, str] | None:
    fd, _, rest = environment.get(VARIABLE, "").partition(":")
    pid, _, reason = rest.partition(":")
    return (int(fd), reason) if fd.isdecimal() and pid == str(os.getpid()) else None


def put_back(variables: Mapping[str, str]) -> None:
    """We are back: what helped the interpreter to find its library is nothing for those whom we start."""
    for name in _PYTHONS:
        os.environ.pop(name, None)
    os.environ.update(variables)


@contextlib.contextmanager
def or_back() -> Iterator[None]:
    """Whatever goes wrong in the block, in a process that was handed a state: become the program again that handed it over.

    Once: if that fails as well, the error of the block is raised.
    """
    handed = _handed(os.environ)
    try:
        yield
    except BaseException as error:
        if handed is not None and not handed[1]:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                _go_back(handed[0], f"{type(error).__name__}: {error}")
        raise


def _go_back(fd: int, reason: str) -> None:
    state: dict[str, Any] = json.loads(read_state(fd))
    before = Program(**state["program"])
    told = reason[:_REASON_LIMIT].replace("\0", "\\0").encode("ascii", "backslashreplace").decode()
    os.set_inheritable(fd, True)
    for kept in state["kept"]:
        os.set_inheritable(kept, True)
    # The interpreter that we were, and not what the link names now; what its venv says may be another one's by now.
    found = {"PYTHONHOME": before.home, "PYTHONPATH": os.pathsep.join(before.path)}
    environment = {**os.environ, **found, VARIABLE: f"{fd}:{os.getpid()}:{told}"}
    signals.block()
    line = [before.executable, *before.way_back, "serve", *before.arguments]
    os.execve(before.image, line, environment)  # noqa: S606
