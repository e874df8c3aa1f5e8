"""The program that this process runs: how it was started, how to try its successor, how to become that under the same pid.

An exec keeps pid, children, the subreaper's role, the signal mask, interval timers and what is pending; it closes every descriptor
that is not inheritable. Between the exec and the new handlers each handled signal kills (measured: 12 of 12), so all are blocked
before it, and stay so until the new program is ready; but for the alarm of the timer that waits for it (`prefork.system.guard`,
which is what is executed first). Where the state is travels in the environment, with our pid: nobody else's child takes it for its
own.
"""

import contextlib
import linecache
import os
import sys
from collections.abc import Collection, Mapping, MutableMapping
from dataclasses import dataclass

from prefork.system import guard, process, signals

VARIABLE = guard.VARIABLE
_PYTHONS = ("PYTHONHOME", "PYTHONPATH")
# In bytes. A worker takes about 150 of them.
STATE_LIMIT = 1 << 26
# Where the tried program finds the state, and answers that it has read it.
STATE_DESCRIPTOR, ANSWER_DESCRIPTOR = 3, 4
# From the exec until the new program goes on, which takes 0.13 s on an idle machine; then the old one comes back.
SWITCH = 15.0
# A script of more bytes is not kept.
_LAUNCHER_LIMIT = 1 << 16
# Read when it is imported: later the file may be another version's.
_GUARD = "".join(linecache.getlines(guard.__file__, vars(guard))).encode()


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
    launcher: str | None = None  # the script's text: it may be the successor's, or empty, by then

    def line(self, command: str, *options: str) -> list[str]:
        """The command line that has it carry out ``command``."""
        return [self.executable, *self.prefix, command, *options, *self.arguments]

    def guarded_line(self, state: int, command: str, *options: str) -> list[str]:
        """The same, by way of `prefork.system.guard`, whose text is read from the state's descriptor."""
        return [self.executable, *guard.command_line(self.prefix, state), command, *options, *self.arguments]


def started(command: str) -> Program | None:
    """How this process was started, if it was as ``prefork COMMAND ...``; None when that can't be told."""
    given = sys.argv[1:]
    if given[:1] != [command] or not sys.executable or sys.orig_argv[-len(given) :] != given:
        return None
    prefix = sys.orig_argv[1 : -len(given)]
    if not prefix:
        return None  # an executable that brings its program with it
    is_script = prefix[-2:-1] not in (["-m"], ["-c"])
    if is_script:
        prefix[-1] = _by_name(prefix[-1])
    return Program(
        executable=_called(),
        image=_image(),
        prefix=tuple(prefix),
        arguments=tuple(given[1:]),
        home=os.path.realpath(sys.base_prefix),
        path=tuple(os.path.realpath(place) for place in sys.path if place),
        way_back=(*prefix[:-1], os.path.realpath(prefix[-1])) if is_script else tuple(prefix),
        variables={name: os.environ[name] for name in _PYTHONS if name in os.environ},
        launcher=_text_of(prefix[-1]) if is_script else None,
    )


def _by_name(path: str) -> str:
    """Absolute: the working directory may be another one by the time that it is needed, and its name another directory's."""
    return path if path.startswith("/") else os.path.join(process.working_directory(), path)


def _called() -> str:
    """The interpreter as it was called; Python itself has made a relative path absolute by what the directory's name stood for."""
    word = sys.orig_argv[0]
    if "/" in word and not word.startswith("/") and os.path.exists(word) and os.path.samefile(word, sys.executable):
        return _by_name(word)
    return sys.executable


def interpreter_has_moved(program: Program) -> bool:
    """Whether the script's first line names another interpreter by now than the one that it named when it was started."""
    if program.launcher is None or program.executable not in _head(program.launcher):
        return False
    now = _text_of(program.prefix[-1])
    return now is not None and program.executable not in _head(now)


def _head(script: str) -> str:
    """Where a script names its interpreter: a long path stands in the second line, for the shell."""
    return "\n".join(script.split("\n", 2)[:2])


def resolve_python_path(folder: str) -> None:
    """Make entries of PYTHONPATH absolute that are not: they are in ``folder``.

    Python has done so for its path, but by what the folder's name stood for; and where a working directory was removed it does not
    even start with such an entry, which an upgrade would find out.
    """
    given = os.environ.get("PYTHONPATH")
    if not given:
        return
    here = "" if process.is_nowhere() else os.getcwd()
    parts = given.split(os.pathsep)
    named = [folder if part in ("", ".") else os.path.join(folder, part) for part in parts]
    found = {os.path.normpath(os.path.join(here, part)): name for part, name in zip(parts, named, strict=True) if part != name}
    sys.path[:] = [found.get(entry, entry) for entry in sys.path]
    os.environ["PYTHONPATH"] = os.pathsep.join(named)


def _image() -> str:
    try:
        return os.readlink("/proc/self/exe")
    except FileNotFoundError:  # no /proc
        return os.path.realpath(sys.executable)


def _text_of(script: str) -> str | None:
    try:
        if not guard.importable(script):
            with open(script, encoding="utf-8") as file:
                text = file.read(_LAUNCHER_LIMIT + 1)
            return text if len(text) <= _LAUNCHER_LIMIT else None
    except (OSError, ValueError):
        pass  # it can't be read any more, or is in another encoding
    return None


def identity(executable: str) -> tuple[int, ...]:
    """What tells this file from another that takes its name. Raises OSError."""
    found = os.stat(executable)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def keep_state(data: bytes) -> int:
    """A descriptor of a file in memory with this state, behind what is executed first."""
    data = _GUARD + b"\0" + data
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
    """What `keep_state` was given; of what is larger than any state a byte too many."""
    data = b""
    limit = guard.TEXT_LIMIT + STATE_LIMIT
    while len(data) <= limit and (more := os.pread(fd, min(1 << 20, limit + 1 - len(data)), len(data))):
        data += more
    return data.partition(b"\0")[2][: STATE_LIMIT + 1]


def try_out(program: Program, state: int) -> tuple[int, int, int]:
    """Start ``check`` of the program that is there now, on a copy of the state.

    Returns its pid, what it says, and its `answer` (neither blocks). Raises OSError when it can't be started.
    """
    with contextlib.ExitStack() as opened, contextlib.ExitStack() as failed:
        said, theirs = _pipe_from(opened, failed)
        answer, proof = _pipe_from(opened, failed)
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        opened.callback(os.close, nothing)
        line = program.guarded_line(STATE_DESCRIPTOR, "check", f"--adopt={STATE_DESCRIPTOR}")
        pid = os.posix_spawn(
            line[0],
            line,
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, nothing, 0),
                (os.POSIX_SPAWN_DUP2, nothing, 1),
                (os.POSIX_SPAWN_DUP2, theirs, 2),
                (os.POSIX_SPAWN_DUP2, state, STATE_DESCRIPTOR),
                (os.POSIX_SPAWN_DUP2, proof, ANSWER_DESCRIPTOR),
            ],
            setsid=True,
            setsigmask=(),
            setsigdef=signals.BLOCKABLE,
        )
        failed.pop_all()
    return pid, said, answer


def _pipe_from(opened: contextlib.ExitStack, failed: contextlib.ExitStack) -> tuple[int, int]:
    """A pipe from a child: our end does not block, theirs is closed in any case."""
    ours, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    failed.callback(os.close, ours)
    opened.callback(os.close, theirs)
    os.set_blocking(theirs, True)
    return ours, theirs


def answer(token: str) -> None:
    """Prove to the master that has started us by `try_out` that we have read its state: no other place has this token.

    Raises OSError.
    """
    os.write(ANSWER_DESCRIPTOR, token.encode())


def is_answer(descriptor: int, token: str) -> bool:
    """Whether the ended child has proved, here, that it has read the state with this token."""
    expected = token.encode()
    try:
        return os.read(descriptor, len(expected) + 1) == expected
    except BlockingIOError:  # a process that the check has left behind may answer yet
        return False


def become(program: Program, state: int, descriptors: Collection[int]) -> None:
    """Become the program that is there now, with these descriptors open. Called with all signals blocked.

    Raises OSError, with everything as it was, when that can't be.
    """
    kept = [fd for fd in {*descriptors, state} if not os.get_inheritable(fd)]
    try:
        for fd in kept:
            os.set_inheritable(fd, True)
        environment = {**os.environ, VARIABLE: f"{state}:{os.getpid()}"}
        line = program.guarded_line(state, "serve")
        guard.arm(SWITCH)
        os.execve(program.executable, line, environment)  # noqa: S606 - ourselves
    finally:
        guard.disarm()
        for fd in kept:
            os.set_inheritable(fd, False)


def handed_over(environment: MutableMapping[str, str]) -> tuple[int, str] | None:
    """The descriptor of the state that this process was handed, and why we are the old program again, if we are."""
    handed = guard.handed(environment)
    environment.pop(VARIABLE, None)
    if handed is not None:
        os.set_inheritable(handed[0], False)
    return handed


def go_on(fd: int) -> None:
    """This process goes on from the state at ``fd``: whatever happens now, no other program comes back."""
    guard.disarm()
    os.close(fd)


def is_successor(environment: Mapping[str, str]) -> bool:
    """Whether this process was handed a state by another program, which comes back if we fail."""
    handed = guard.handed(environment)
    return handed is not None and not handed[1]


def put_back(variables: Mapping[str, str]) -> None:
    """We are back: what helped the interpreter to find its library is nothing for those whom we start."""
    for name in _PYTHONS:
        os.environ.pop(name, None)
    os.environ.update(variables)
