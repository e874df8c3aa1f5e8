"""What tests ask of a daemon and of the machine: wait for something to be so, with a deadline, and look at processes."""

import itertools
import os
import select
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import psutil
import pytest

from prefork.testing import Server

T = TypeVar("T")
DEADLINE = 20.0
# Processes that stay from one test to the next on purpose, and whatever is below them.
RESIDENTS: set[int] = set()


def until(what: str, look: Callable[[], T | None], deadline: float = DEADLINE) -> T:
    """Look until it is true; a deadline that passes is a failure that names ``what``.

    For states that no event tells of. It looks often, and sleeps only between two looks, never instead of one.
    """
    end = time.monotonic() + deadline
    while True:
        if found := look():
            return found
        if time.monotonic() > end:
            raise AssertionError(f"not so after {deadline:g} s: {what}")
        time.sleep(0.002)


def readable(what: socket.socket | int, seconds: float) -> bool:
    """Wait so many seconds for something to be read, or for an end. Whether there is. Not select(2): a test may have any number."""
    poll = select.poll()
    poll.register(what, select.POLLIN)
    return bool(poll.poll(1000 * max(0.0, seconds)))


def workers(server: Server, *states: str) -> list[dict[str, Any]]:
    """The workers in these states (all without any)."""
    return [w for w in server.status()["workers"] if not states or w["state"] in states]


def settled(server: Server, idle: int, listener: int = 0) -> dict[str, Any]:
    """Wait until a listener has exactly so many idle workers and nobody is starting or retiring. Returns the status.

    On a slow machine there may have been surplus acceptors, which leave after two periods of ``spare_timeout``, 10 s each unless
    a test says otherwise.
    """

    def look() -> dict[str, Any] | None:
        status = server.status()
        counted = status["listeners"][listener]["workers"]
        return status if (counted["idle"], counted["starting"], counted["retiring"]) == (idle, 0, 0) else None

    return until(f"{idle} idle workers", look, 2 * DEADLINE)


def quiet(server: Server) -> dict[str, int]:
    """Wait until nobody is served. Returns the totals, which then are what clients have counted."""

    def look() -> dict[str, int] | None:
        totals: dict[str, int] = server.status()["totals"]
        return totals if totals["serving"] == 0 else None

    return until("nobody is served", look)


def logged(server: Server, text: str, times: int = 1) -> str:
    """Wait until the log holds ``text``. Returns the log."""
    try:
        until(f"{text!r} in the log", lambda: server.log().count(text) >= times)
    except AssertionError as error:
        raise AssertionError(f"{error}:\n{server.log()}") from None
    return server.log()


def lacks(reason: str) -> NoReturn:
    """Skip a test for this reason; in CI, which has everything, that is a failure."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def needs(program: str) -> None:
    """Skip a test where a program is missing that it is about; in CI that is a failure."""
    if shutil.which(program) is None:
        lacks(f"{program} is not installed")


def program(name: str, package: str, path: str | None = None) -> str:
    """The path of a program that a Debian package has. Without it the test is skipped, and fails in CI."""
    return shutil.which(name, path=path) or lacks(f"{name} is not installed (Debian: {package})")


def family(pid: int) -> list[psutil.Process]:
    """All descendants."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def family_of(pid: int, size: int, what: str) -> None:
    """Wait until there are exactly so many descendants, as long as surplus acceptors may stay (`settled`)."""
    until(what, lambda: len(family(pid)) == size, 2 * DEADLINE)


def children() -> set[psutil.Process]:
    """The descendants of this process, without the residents and theirs."""
    found = set(psutil.Process().children(recursive=True))
    for resident in RESIDENTS:
        found -= {psutil.Process(resident), *family(resident)}
    return found


def fork_server(server: Server, generation: int | None = None) -> int:
    """The pid of a generation's fork server: the master's child with that title."""
    number = server.status()["generation"] if generation is None else generation
    for child in psutil.Process(server.pid).children():
        with suppress(psutil.NoSuchProcess):  # a zombie has no title any more
            if child.cmdline() and child.cmdline()[0].endswith(f" gen {number}"):
                return child.pid
    raise AssertionError(f"no fork server of generation {number}: {family(server.pid)}")


def cut(sock: socket.socket) -> bool:
    """Whether the connection is ended before it says anything more: by a reset when its worker had not read everything."""
    try:
        return not sock.recv(64)
    except ConnectionResetError:
        return True


def named(pid: int, title: str) -> list[int]:
    """The children of a process whose titles begin so."""
    return [child.pid for child in psutil.Process(pid).children() if (child.cmdline() or [""])[0].startswith(title)]


def log_writer(server: Server, path: Path) -> int:
    """The pid of the process that writes a log file."""
    [found] = [pid for pid in named(server.pid, "prefork: log ") if psutil.Process(pid).cmdline()[0].endswith(f" {path}")]
    return found


def descriptors(pid: int) -> dict[int, str]:
    """The open descriptors of a process, and what they are. Those of a master and a fork server are root's to see."""
    if os.geteuid() != 0 and pid != os.getpid() and not os.access(f"/proc/{pid}/fd", os.R_OK):
        pytest.skip("the descriptors of prefork's own processes are root's to see")
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/{pid}/fd/{name}")
        except FileNotFoundError:
            continue  # closed meanwhile
    return found


def pss_kib(pid: int) -> int:
    """Proportional set size: of a page that others have, too, its share. So it grows when they go."""
    return _memory_kib(pid, "Pss")


def anonymous_kib(pid: int) -> int:
    """What the process has allocated and written to, whoever else has it; no files."""
    return _memory_kib(pid, "Anonymous")


def _memory_kib(pid: int, what: str) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1])
    raise AssertionError(f"no {what}")


# Ports below those that the kernel gives out by itself; each process begins elsewhere.
_PORTS = itertools.cycle(range(12_000, 32_000))
_ports = itertools.islice(_PORTS, os.getpid() * 97 % 20_000, None)
_reserved: list[socket.socket] = []


def free_port(among: Iterable[int] = _ports) -> int:
    """A port of 127.0.0.1 that no other process has, and that no other test gets until `release_ports`.

    A socket that is bound and does not listen reserves it: a bind with SO_REUSEADDR, as any server's, succeeds beside it, and the
    one of another test's `free_port`, which is without, does not (socket(7)).
    """
    for port in among:
        sock = socket.socket()
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            sock.close()
            continue
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _reserved.append(sock)
        return port
    raise AssertionError(f"no port is free of {among}")


def release_ports() -> None:
    """Give back the ports that were reserved."""
    while _reserved:
        _reserved.pop().close()


def is_gone(pid: int) -> bool:
    """No such process, or a zombie that only waits to be reaped."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def identity_holds(totals: dict[str, int]) -> bool:
    """The equation that holds at every reading."""
    ended = totals["ok"] + totals["error"] + totals["killed"] + totals["rejected"]
    return ended + totals["serving"] == totals["accepted"]


@contextmanager
def soon(what: str) -> Iterator[None]:
    """The block takes less than DEADLINE. What it must not wait for has to take longer than that, 30 s or more, on any machine."""
    begun = time.monotonic()
    yield
    took = time.monotonic() - begun
    assert took < DEADLINE, f"{what} took {took:.3f} s, not less than {DEADLINE} s"


def is_free(port: int) -> bool:
    """Whether nobody has this port of 127.0.0.1."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have ended do not count
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


@contextmanager
def running(
    command: list[str],
    folder: Path,
    scratch: Path,
    log: Path | None = None,
    *,
    fds: tuple[int, ...] = (),
    environment: dict[str, str] | None = None,
    wait: bool = True,
) -> Iterator[Server]:
    """A daemon that is started by this command line, which serves already or has ended unless there was no ``wait`` for it.

    It is stopped at the end of the block.
    """
    control = str(scratch / "control")
    with (scratch / "output").open("wb") as file:
        process = subprocess.Popen(
            [*command, f"--control={control}"],
            cwd=folder,
            pass_fds=fds,
            stdout=file,
            stderr=file,
            env={**os.environ, "PWD": str(folder), **(environment or {})},
        )
    server = Server(None, process.pid, control, log or scratch / "output", process)
    try:
        until(
            "it serves or has ended",
            lambda: not wait or (server.log_path.exists() and " serving " in server.log()) or process.poll() is not None,
        )
        yield server
    finally:
        server.stop()
