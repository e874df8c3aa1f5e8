"""For people who test their own handlers: a real daemon on a free port, for as long as a ``with`` block or a test.

    from prefork.testing import serve

    def test_echo():
        with serve("mymodule:loop", workers=2) as server, server.connect() as sock:
            sock.sendall(b"hello")
            assert sock.recv(5) == b"hello"

With pytest the fixture ``prefork_server`` does the same: ``server = prefork_server("mymodule:loop", workers=2)``.
"""

import contextlib
import difflib
import fcntl
import functools
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefork.config import OPTIONS, flag
from prefork.errors import PreforkError, RefusedError
from prefork.ops import status as status_page
from prefork.ops.instances import ask
from prefork.printable import printable

START_TIMEOUT = 30.0
# Longer than graceful_timeout, after which the daemon itself ends who is left.
STOP_TIMEOUT = 45.0
LONGEST_FOLDER = 80
LOOK = 0.005
# pytest's `pythonpath`: what stands there is on this process' path, and so on the daemon's.
_python_path: list[str] = []


class StartError(PreforkError):
    """The daemon did not come up. The message holds its log; ``exit_status`` its exit code, None when it was just too slow."""

    def __init__(self, message: str, exit_status: int | None) -> None:
        super().__init__(message)
        self.exit_status = exit_status


@dataclass(frozen=True, slots=True)
class Server:
    """A running daemon. ``address`` is what ``socket.connect`` takes: (host, port), or a path."""

    address: Any
    pid: int
    control: str
    log_path: Path
    process: "subprocess.Popen[bytes]"

    def connect(self, timeout: float = 10.0) -> socket.socket:
        """A connection to the first address."""
        return connect(self.address, timeout)

    def status(self) -> dict[str, Any]:
        """What ``prefork status --json`` prints. Raises RefusedError."""
        facts, descriptors = ask(self.control, "status", START_TIMEOUT)
        if not facts["ok"]:
            raise RefusedError(str(facts))
        return status_page.assemble(facts, descriptors)

    def wait_for_totals(self, timeout: float = 10.0, **expected: int) -> dict[str, int]:
        """Wait until each of these totals has this value, and nothing is being served (unless ``serving`` is given). Returns all.

        A client has its answer before the daemon has counted the connection: ``server.wait_for_totals(ok=1)``. Raises TimeoutError.
        """
        expected = {"serving": 0, **expected}
        deadline = time.monotonic() + timeout
        while True:
            totals: dict[str, int] = self.status()["totals"]
            _refuse_unknown("wait_for_totals", expected, totals)
            if all(totals[key] == value for key, value in expected.items()):
                return totals
            if time.monotonic() >= deadline:
                raise TimeoutError(f"after {timeout:g} s the totals are {totals}, not {expected}")
            time.sleep(LOOK)

    def command(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Send a command to the control socket and wait for its outcome: ``{"ok": ..., ...}``."""
        return ask(self.control, command, START_TIMEOUT, **arguments)[0]

    def log(self) -> str:
        """Everything that the daemon and its handlers have written so far."""
        return self.log_path.read_text(errors="replace")

    def stop(self, signo: int = signal.SIGTERM) -> int:
        """Send a signal (SIGTERM: graceful) and wait for the end. Returns the exit status, also of one that has ended."""
        if self.process.poll() is None:
            self.process.send_signal(signo)
        return self.process.wait(STOP_TIMEOUT)


def connect(address: Any, timeout: float = 10.0) -> socket.socket:
    """A connection to (host, port) or to a path."""
    if isinstance(address, str):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(timeout)
        try:
            sock.connect(address)
        except OSError:
            sock.close()
            raise
        return sock
    return socket.create_connection(address, timeout)


@contextlib.contextmanager
def serve(
    target: str | Callable[..., Any],
    *,
    folder: str | os.PathLike[str] | None = None,
    environment: Mapping[str, str] | None = None,
    arguments: tuple[str, ...] = (),
    **options: Any,
) -> Iterator[Server]:
    """Run ``prefork serve`` on a free port of 127.0.0.1 until the block ends; then stop it, and by force if it does not.

    ``target`` is MODULE:ATTR or a function at the top of a module; ``folder`` is the daemon's working directory (default: ours,
    or the function's). Options are those of the configuration (``workers=2``); ``arguments`` are added to the command line as
    they are. Raises StartError. A daemon whose starter is killed stops by itself, as by SIGTERM.
    """
    _refuse_unknown("serve", options, [*OPTIONS, "config"])
    module, place = _named(target)
    if options.get("control") == "off":
        raise ValueError("control='off' leaves nobody to ask for the address")
    # A Unix socket's path has at most 107 bytes.
    where = None if len(tempfile.gettempdir()) <= LONGEST_FOLDER else "/tmp"  # noqa: S108 - TemporaryDirectory makes it private
    with tempfile.TemporaryDirectory(prefix="prefork-", dir=where) as scratch:
        ready = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        ready.bind(f"{scratch}/notify")
        options = {"bind": "127.0.0.1:0", "control": f"{scratch}/control", **options}
        if module:
            options["module"] = module
        command = [sys.executable, "-P", "-m", "prefork", "serve", *_flags(options), *arguments]
        log_path = Path(scratch) / "log"
        # Configuration of the caller's is not that of the daemon under test.
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("PREFORK_")}
        if _python_path:
            inherited["PYTHONPATH"] = os.pathsep.join(filter(None, [*_python_path, inherited.get("PYTHONPATH")]))
        if cwd := folder or place:
            inherited["PWD"] = os.path.abspath(cwd)  # as a shell does it: a link in the name stays one
        settings = {**inherited, **(environment or {}), "NOTIFY_SOCKET": f"{scratch}/notify"}
        with ready, log_path.open("wb") as log_file, _leash() as (leash, tie):
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env=settings,
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # as a service manager does it
                pass_fds=(leash,),
            )
            try:
                tie(process.pid)
                _wait_until_ready(process, ready, log_path)
                ready.close()  # nobody listens any more: a queue that fills up would have the daemon try again
                yield Server(_first_address(str(options["control"])), process.pid, str(options["control"]), log_path, process)
            finally:
                _end(process, log_path)


def _refuse_unknown(function: str, given: Iterable[str], known: Iterable[str]) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            meant = f". Did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{meant}")


@contextlib.contextmanager
def _leash() -> Iterator[tuple[int, Callable[[int], None]]]:
    """A descriptor for a process to inherit, and what ties it: once this process has ended the kernel sends that one a SIGTERM.

    The descriptor is a pipe's reading end, and no process but this one has the writing end. A pipe that loses its last writer
    signals the owner of its reading end (F_SETOWN, F_SETSIG, fcntl(2)), as long as that is open somewhere: an upgrade carries it.
    Not PR_SET_PDEATHSIG, by which the daemon would end with the thread that has started it.
    """
    _cut_leashes_in_forks()
    reading, writing = os.pipe()
    _leashes.add(writing)

    def tie(pid: int) -> None:
        fcntl.fcntl(reading, fcntl.F_SETSIG, signal.SIGTERM)
        fcntl.fcntl(reading, fcntl.F_SETOWN, pid)
        fcntl.fcntl(reading, fcntl.F_SETFL, os.O_ASYNC)

    try:
        yield reading, tie
    finally:
        os.close(reading)
        if writing in _leashes:
            _leashes.remove(writing)
            os.close(writing)


# The writing ends of all.
_leashes: set[int] = set()


@functools.cache
def _cut_leashes_in_forks() -> None:
    """A child of this process that is forked without an exec holds no leash: it may outlive us."""

    def cut() -> None:
        while _leashes:
            os.close(_leashes.pop())

    os.register_at_fork(after_in_child=cut)


def _named(target: str | Callable[..., Any]) -> tuple[str, Path | None]:
    if isinstance(target, str):
        return target, None
    if not hasattr(target, "__qualname__"):
        raise ValueError(
            f"an object of type {type(target).__name__} has no name by which the daemon can import it: give MODULE:ATTR"
        )
    if "<" in target.__qualname__:
        raise ValueError(f"{target.__qualname__}: the daemon can only import a function at the top of a module")
    file = sys.modules[target.__module__].__file__
    parents = target.__module__.count(".") + 1
    return f"{target.__module__}:{target.__qualname__}", Path(file).absolute().parents[parents - 1] if file else None


def _flags(options: Mapping[str, Any]) -> list[str]:
    return [
        f"{flag(key)}={one}" for key, value in options.items() for one in (value if isinstance(value, list | tuple) else [value])
    ]


def _wait_until_ready(process: "subprocess.Popen[bytes]", ready: socket.socket, log_path: Path) -> None:
    ended = os.pidfd_open(process.pid)
    try:
        deadline = time.monotonic() + START_TIMEOUT
        # Not select(2): the tests may have more than 1,024 descriptors.
        watched = select.poll()
        for fd in (ready.fileno(), ended):
            watched.register(fd, select.POLLIN)
        while True:
            happened = {fd for fd, _ in watched.poll(1000 * max(0.0, deadline - time.monotonic()))}
            if ready.fileno() in happened:
                if b"READY=1" in ready.recv(4096).split(b"\n"):
                    return
            elif ended in happened:
                status = process.wait()
                raise StartError(f"prefork ended with exit status {status}:\n{_told(log_path)}", status)
            else:
                raise StartError(f"prefork is not ready after {START_TIMEOUT:g} s:\n{_told(log_path)}", None)
    finally:
        os.close(ended)


def _told(log_path: Path) -> str:
    """The log, for a terminal."""
    return printable(log_path.read_text(errors="replace"))


def _first_address(control: str) -> Any:
    facts, descriptors = ask(control, "status", START_TIMEOUT)
    for fd in descriptors:
        os.close(fd)
    text = facts["listeners"][0]["address"]
    if text.startswith("unix:"):
        return text.removeprefix("unix:")
    host, _, port = text.rpartition(":")
    return host.strip("[]") or "::1", int(port)


def _end(process: "subprocess.Popen[bytes]", log_path: Path) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            text = _told(log_path)
            raise TimeoutError(f"prefork has not ended {STOP_TIMEOUT:g} s after SIGTERM and was killed; its log:\n{text}") from None


try:
    import pytest
except ImportError:  # the fixture is for those who have pytest; the rest of this module needs nothing
    pass
else:

    def pytest_configure(config: pytest.Config) -> None:
        """Handlers are found where the tests find them."""
        _python_path[:] = map(str, config.getini("pythonpath"))

    @pytest.fixture
    def prefork_server() -> Iterator[Callable[..., Server]]:
        """A function like `serve` that gives the server; every server it started is stopped at the end of the test."""
        with contextlib.ExitStack() as stack:

            def start(target: str | Callable[..., Any], **options: Any) -> Server:
                return stack.enter_context(serve(target, **options))

            yield start
