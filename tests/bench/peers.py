"""The servers that are compared: prefork, and what a user would take instead. Each is started in an account of its own.

What they have in common: 127.0.0.1, a listen queue of BACKLOG, and a handler that sends back what it reads, 4096 bytes at most
at a time. Sources are in `tests/bench/sources`. A server that is not installed has a reason.
"""

import functools
import importlib.util
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from prefork import __version__
from prefork.testing import Server, serve
from tests import watch
from tests.bench import cpu
from tests.bench.load import BenchError
from tests.bench.sources.handlers import LATE_SECONDS

SOURCES = Path(__file__).parent / "sources"
BACKLOG = 4096
# A machine that others use, too.
START_DEADLINE, STOP_DEADLINE = 30.0, 30.0
HANDLERS = {"echo": "echo:loop", "late": "handlers:late", "http": "handlers:Http", "computing": "handlers:computing"}


@dataclass(frozen=True, slots=True)
class Running:
    """A server that serves. ``daemon`` is there for prefork alone."""

    peer: "Peer"
    port: int
    account: cpu.Account
    daemon: Server | None = None


@dataclass(frozen=True, slots=True)
class Wish:
    """How a server is to be started: which handler, acceptors, processes where their number is ``fixed``, options of prefork's."""

    handler: str = "echo"
    workers: int = 8
    fixed: int = 8
    max_workers: int = 256
    spare_timeout: float = 10.0
    scheduling: str = "batch"


@dataclass(frozen=True, slots=True)
class Peer:
    """One kind of server.

    ``missing`` says why it can't run here; ``command`` builds what has to be built in a folder and gives the command line for a
    port; ``holds`` is how many connections it can hold at a time: None for as many as there are.
    """

    name: str
    what: str
    version: Callable[[], str]
    command: Callable[[Path, int, Wish], list[str]]
    missing: Callable[[], str | None] = lambda: None
    holds: int | None = 8
    handlers: tuple[str, ...] = ("echo",)

    @contextmanager
    def running(self, folder: Path, wish: Wish) -> Iterator[Running]:
        """Start it, and end it and all that it has started."""
        with cpu.account() as account:
            run = self._daemon(account, wish) if self.name == "prefork" else self._program(account, folder, wish)
            with run as running:
                yield running

    @contextmanager
    def _daemon(self, account: cpu.Account, wish: Wish) -> Iterator[Running]:
        options = {name: getattr(wish, name) for name in ("workers", "max_workers", "spare_timeout", "scheduling")}
        with ExitStack() as stack:
            with account.born_here():
                daemon = stack.enter_context(serve(HANDLERS[wish.handler], folder=SOURCES, backlog=BACKLOG, **options))
            account.adopt(daemon.pid)
            yield Running(self, daemon.address[1], account, daemon)

    @contextmanager
    def _program(self, account: cpu.Account, folder: Path, wish: Wish) -> Iterator[Running]:
        port = watch.free_port()
        command, log = self.command(folder, port, wish), folder / f"{self.name}.log"
        with log.open("wb") as output, account.born_here():
            process = subprocess.Popen(
                command, cwd=SOURCES, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        try:
            account.adopt(process.pid)
            _wait_for(process, port, self.name, log)
            yield Running(self, port, account)
        finally:
            _end(process)


def _wait_for(process: "subprocess.Popen[bytes]", port: int, name: str, log: Path) -> None:
    end = time.monotonic() + START_DEADLINE
    while True:
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return
        if process.poll() is not None or time.monotonic() > end:
            raise BenchError(f"{name} does not serve (exit status {process.poll()}):\n{log.read_text(errors='replace')}")
        time.sleep(0.01)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(STOP_DEADLINE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    try:
        os.killpg(process.pid, signal.SIGKILL)  # its session, in which nobody may have stayed
    except ProcessLookupError:
        pass  # nobody has


# -- what each is made of


def first_line(*command: str) -> str:
    """What a program says first."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).partition("\n")[0].strip()


def interpreter() -> str:
    """Which Python: pyenv's and Debian's differ by how they were compiled."""
    return f"{platform.python_implementation()} {platform.python_version()} ({platform.python_compiler()}), {sys.executable}"


def _python(*words: object) -> list[str]:
    return [sys.executable, *map(str, words)]


def _without(program: str, package: str) -> str | None:
    return None if shutil.which(program) else f"{program} is not installed (Debian: {package})"


def _compiled(folder: Path) -> Path:
    program = folder / "floor"
    if not program.exists():
        subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", program, SOURCES / "floor.c"], check=True)
    return program


def _go(folder: Path, port: int, wish: Wish) -> list[str]:
    program = folder / "echo-go"
    if not program.exists():
        environment = {**os.environ, "GOCACHE": str(folder / "go-cache"), "GOFLAGS": "-mod=mod", "GO111MODULE": "off"}
        subprocess.run(["go", "build", "-o", program, SOURCES / "echo.go"], check=True, env=environment)
    return [str(program), str(port)]


def _erlang(folder: Path, port: int, wish: Wish) -> list[str]:
    if not (folder / "echo.beam").exists():
        subprocess.run(["erlc", "-o", folder, SOURCES / "echo.erl"], check=True)
    return ["erl", "-noinput", "-pa", str(folder), "-s", "echo", "start", str(port), str(wish.workers), str(BACKLOG)]


@functools.cache
def _net_server() -> str:
    done = subprocess.run(
        ["perl", "-MNet::Server", "-e", "print $Net::Server::VERSION"], capture_output=True, text=True, check=False
    )
    return done.stdout


def _without_net_server() -> str | None:
    if reason := _without("perl", "perl"):
        return reason
    return None if _net_server() else "Perl's Net::Server is not installed (Debian: libnet-server-perl)"


def _library(which: str) -> Callable[[Path, int, Wish], list[str]]:
    return lambda _folder, port, _wish: _python("library.py", which, port, BACKLOG)


def _bare(folder: Path, port: int, wish: Wish) -> list[str]:
    return _python("bare.py", port, wish.fixed, BACKLOG, *([LATE_SECONDS] if wish.handler == "late" else []))


def _gunicorn(folder: Path, port: int, wish: Wish) -> list[str]:
    options = [f"--workers={wish.workers}", f"--bind=127.0.0.1:{port}", f"--backlog={BACKLOG}", "--worker-class=sync"]
    return _python("-m", "gunicorn", *options, "--log-level=warning", "--no-control-socket", "handlers:application")


def _impossible(folder: Path, port: int, wish: Wish) -> list[str]:
    raise AssertionError("prefork is started by prefork.testing")


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "prefork",
            "this, with its defaults",
            lambda: f"{__version__}",
            _impossible,
            holds=None,
            handlers=tuple(HANDLERS),
        ),
        Peer(
            "floor",
            "C, processes that block in accept(), no supervision",
            lambda: first_line("cc", "--version"),
            lambda folder, port, wish: [str(_compiled(folder)), str(port), str(wish.fixed), str(BACKLOG)],
            lambda: _without("cc", "gcc"),
        ),
        Peer(
            "bare",
            "Python, processes that block in listener.accept(), no supervision",
            platform.python_version,
            _bare,
            handlers=("echo", "late"),
        ),
        Peer(
            "go",
            "net.Listen, a goroutine for each connection",
            lambda: first_line("go", "version").removeprefix("go version "),
            _go,
            lambda: _without("go", "golang-go"),
            holds=None,
        ),
        Peer(
            "erlang",
            "a process for each connection, their parent starts the next acceptor",
            lambda: (
                "OTP "
                + first_line(
                    "erl",
                    "-noinput",
                    "-eval",
                    'io:format("~s, erts ~s~n", [erlang:system_info(otp_release), erlang:system_info(version)]), halt().',
                )
            ),
            _erlang,
            lambda: _without("erlc", "erlang-base"),
            holds=None,
        ),
        Peer("asyncio", "streams, one process", platform.python_version, _library("asyncio"), holds=None),
        Peer("threading", "socketserver.ThreadingTCPServer", platform.python_version, _library("threading"), holds=None),
        Peer("forking", "socketserver.ForkingTCPServer", platform.python_version, _library("forking"), holds=40),
        Peer(
            "net_server",
            "Perl, Net::Server::PreFork",
            lambda: f"{_net_server()}, Perl " + first_line("perl", "-e", "print $^V"),
            lambda _folder, port, wish: ["perl", "echo.pl", str(port), str(wish.workers), str(BACKLOG)],
            _without_net_server,
        ),
        Peer(
            "gunicorn",
            "sync workers, WSGI",
            lambda: version("gunicorn"),
            _gunicorn,
            lambda: None if importlib.util.find_spec("gunicorn") else "gunicorn is not installed (pip install '.[bench]')",
            handlers=("http",),
        ),
    )
}
