"""What an upgrade executes first: it starts the program that is there now, and goes back to the old one if that fails.

The old program writes its own copy of this text into the state's file (`prefork.system.program`), and has the interpreter that is
installed now execute it. So it works whatever the new program's files hold. The new program has gone on once it has disarmed the
timer that was armed before the exec. Until then the old program is executed again, under the same pid, when the new one ends (with
whatever status), raises, or is late. The old program gets no second chance: if it fails, too, control socket and pid file are
removed, and the exit status is one after which a service manager starts the daemon anew.

Interval timers survive an exec (setitimer(2)), so an interpreter that hangs before it executes this text is killed by the alarm.
Python runs the handler of the first alarm between two bytecodes; C code that never returns to it is killed by the second alarm.

What this must not do: import anything of prefork's, or use what another version of Python may not have.
"""

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from types import FrameType, ModuleType
from typing import Any, NoReturn

# The state's file: this text, a zero byte, the state. Whose it is: "FD:PID", and after one more colon why there was a way back.
VARIABLE = "PREFORK_STATE"
TEXT_LIMIT = 1 << 16
# What the old program may take for coming back; an idle machine takes 0.15 s.
BACK = 30.0
# From the alarm that Python hears to the one that ends the process.
LAST = 5.0
# An environment variable has at most 128 KiB; the program that goes back tells why in it.
REASON_LIMIT = 4096
# An internal error (sysexits.h): no unit of ours has it among those that a restart does not mend.
FAILED = 70


def loader(state: int) -> str:
    """What an interpreter is given (``-c``) to start with the text that stands in the state's file."""
    return f"import os;exec(os.pread({state},{TEXT_LIMIT},0).split(b'\\0')[0])"


def command_line(prefix: Sequence[str], state: int) -> list[str]:
    """An interpreter's arguments before the command: as ``prefix``, by way of this text."""
    program = 2 if prefix[-2:-1] and prefix[-2] in ("-m", "-c") else 1
    return [*prefix[:-program], "-c", loader(state), *prefix[-program:]]


def handed(environment: Mapping[str, str]) -> tuple[int, str] | None:
    """The descriptor of the state that this process was handed, and why it is the old program again, if it is."""
    fd, _, rest = environment.get(VARIABLE, "").partition(":")
    pid, _, reason = rest.partition(":")
    return (int(fd), reason) if fd.isdecimal() and pid == str(os.getpid()) else None


def importable(path: str) -> bool:
    """Whether Python looks for a ``__main__`` in it (a folder, a zip file), and does not read it as a script."""
    for hook in sys.path_hooks:
        try:
            hook(path)
        except ImportError:
            continue
        return True
    return False


def arm(seconds: float) -> None:
    """Begin to wait for a program that goes on; an exec may follow. It is killed if it does not even come here."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds, LAST)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})


def disarm() -> None:
    """This program goes on: there is no way back from here."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def _armed() -> bool:
    return signal.getitimer(signal.ITIMER_REAL)[0] > 0


def start() -> None:
    """Start the program that the command line names behind the `loader`."""
    words = sys.argv[1:]
    # Whoever asks how this process was started finds what would have started it without us.
    del sys.orig_argv[-len(words) - 2 : -len(words)]
    found = handed(os.environ)
    if found is None:  # a program's check
        _execute(words)
        return
    us, fd, is_back = os.getpid(), found[0], bool(found[1])
    if not is_back:
        signal.signal(signal.SIGALRM, lambda _signo, frame: _end(fd, f"it has not gone on in time; it was at {_where(frame)}"))
        _ring_once()
    try:
        _execute(words, _kept(fd)["program"]["launcher"] if is_back else None)
    except BaseException as error:
        if os.getpid() != us or not _armed():
            raise
        _end(fd, _text(error), is_back=is_back)
    if os.getpid() == us and _armed():
        _end(fd, "it has ended and not gone on", is_back=is_back)


def _execute(words: list[str], launcher: str | None = None) -> None:
    """Do what Python does with these words of its command line; ``launcher`` is what the script said once."""
    is_path_ours = not sys.flags.safe_path
    if words[0] == "-m":
        if is_path_ours:
            try:
                sys.path[0] = os.getcwd()
            except FileNotFoundError:
                del sys.path[0]
        import runpy  # noqa: PLC0415 - Python's own -m has it imported

        sys.argv = ["-m", *words[2:]]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        _execute_text(words[1], "<string>")
    elif launcher is None and importable(words[0]):
        import runpy  # noqa: PLC0415 - few programs are folders or zip files

        if is_path_ours:
            del sys.path[0]
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
    else:
        if is_path_ours:
            sys.path[0] = os.path.dirname(os.path.realpath(words[0]))
        sys.argv = words
        if launcher is None:
            with open(words[0], "rb") as file:
                _execute_text(file.read(), words[0])
        else:
            _execute_text(launcher, words[0])


def _execute_text(text: bytes | str, name: str) -> None:
    module = sys.modules["__main__"] = ModuleType("__main__")
    module.__file__ = name
    exec(compile(text, name, "exec"), module.__dict__)  # noqa: S102 - it is what this process is for


def _kept(fd: int) -> dict[str, Any]:
    size = os.fstat(fd).st_size
    state: dict[str, Any] = json.loads(os.pread(fd, size, 0).partition(b"\0")[2])
    return state


def _ring_once() -> None:
    """Give the second alarm its default action."""
    try:
        import ctypes  # noqa: PLC0415 - there may be none

        library = ctypes.CDLL(None)
        for function in (library.signal, library.sysv_signal):  # System V's is undone by the first one
            function.argtypes, function.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        library.sysv_signal(signal.SIGALRM, library.signal(signal.SIGALRM, None))
    except (ImportError, OSError, AttributeError):
        pass  # another C library: what never comes back to the interpreter is ended by the service manager's watchdog


def _end(fd: int, reason: str, *, is_back: bool = False) -> NoReturn:
    """Become the old program again; if that is what has failed, leave nothing behind."""
    try:
        state = _kept(fd)
        try:
            if not is_back:
                _go_back(fd, state, reason)
        except OSError as error:
            reason = f"{reason}; the old program can't be executed: {error.strerror}"
        _remove_traces(state)
        os.write(2, f"prefork: the upgrade has ended the daemon: {reason}\n".encode(errors="backslashreplace"))
    finally:
        os._exit(FAILED)


def _go_back(fd: int, state: dict[str, Any], reason: str) -> None:
    before = state["program"]
    told = reason[:REASON_LIMIT].replace("\0", "\\0").encode("ascii", "backslashreplace").decode()
    os.set_inheritable(fd, True)
    for kept in state["kept"]:
        os.set_inheritable(kept, True)
    # The interpreter that we were, and not what the link names now; what its venv says may be another one's by now.
    found = {"PYTHONHOME": before["home"], "PYTHONPATH": os.pathsep.join(before["path"])}
    environment = {**os.environ, **found, VARIABLE: f"{fd}:{os.getpid()}:{told}"}
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    arm(BACK)
    line = [before["executable"], *command_line(before["way_back"], fd), "serve", *before["arguments"]]
    os.execve(before["image"], line, environment)  # noqa: S606 - ourselves


def _remove_traces(state: dict[str, Any]) -> None:
    """What says that the daemon is here."""
    control = state["control"]
    if control is not None and (found := _inode(control["path"])) is not None and found == control["inode"]:
        os.unlink(control["path"])
    for file in (state["lock"], state["pid_file"]):
        if file is not None and (found := _inode(file["path"])) is not None and found == _inode(file["fd"]):
            os.unlink(file["path"])


def _inode(where: str | int) -> list[int] | None:
    try:
        found = os.fstat(where) if isinstance(where, int) else os.lstat(where)
    except OSError:
        return None
    return [found.st_dev, found.st_ino]


def _text(error: BaseException) -> str:
    if isinstance(error, SystemExit) and error.code in (0, None):
        return "it has ended with exit status 0, and not gone on"
    return f"{type(error).__name__}: {error}"


def _where(frame: FrameType | None) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})" if frame is not None else "its end"


if __name__ == "__main__":
    start()
