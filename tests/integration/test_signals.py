"""Signals to the master: stop in its three forms, and one acceptor more or fewer."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from prefork.master import SAME_INTERRUPT
from prefork.system import process, signals
from prefork.system.standing import standing
from prefork.testing import Server, connect
from tests import watch
from tests.conftest import HANDLERS, Gate

Start = Callable[..., Server]


@pytest.mark.parametrize("signo", [signal.SIGTERM, signal.SIGINT])
def test_a_graceful_stop_lets_connections_finish(prefork_server: Start, signo: int) -> None:
    server = prefork_server("echo:loop", workers=2)
    with server.connect() as sock:
        os.kill(server.pid, signo)
        watch.logged(server, "no longer listening")
        sock.sendall(b"still here")
        assert sock.recv(64) == b"still here"
        with pytest.raises(ConnectionRefusedError):
            connect(server.address)
    assert server.stop() == 0
    assert "stopped: 1 connection accepted, 0 cut" in server.log()


def test_a_graceful_stop_serves_whom_the_kernel_has_connected(prefork_server: Start) -> None:
    server = prefork_server("tiny:who", folder=HANDLERS, workers=1, max_workers=1)
    with server.connect() as first:
        assert first.recv(64)
        with server.connect() as queued:
            os.kill(server.pid, signal.SIGTERM)
            watch.logged(server, "stopping")
            for _ in range(2):  # each answer is a turn of the master: a listener that it closed too early is closed by now
                assert server.status()["state"] == "stopping"
            first.shutdown(socket.SHUT_WR)
            assert queued.recv(64)
    assert server.stop() == 0
    assert "2 connections accepted, 0 cut" in server.log()


def test_connections_past_graceful_timeout_are_cut_and_named(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=2, graceful_timeout=0.3)
    with server.connect() as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        peer = f"127.0.0.1:{sock.getsockname()[1]}"
        assert server.stop() == 0
        assert sock.recv(1) == b""
    assert f"is killed, serving {peer}: still there at the end of graceful_timeout" in server.log()
    assert "1 connection accepted, 1 cut" in server.log()


@pytest.mark.parametrize(("signo", "announced"), [(signal.SIGINT, 1), (signal.SIGTERM, 0)])
def test_after_ctrl_c_a_second_one_is_announced_while_there_is_something_to_cut(
    prefork_server: Start, signo: int, announced: int
) -> None:
    server = prefork_server("echo:loop", workers=1)
    with server.connect() as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        os.kill(server.pid, signo)
        watch.logged(server, "no longer listening")
        assert server.log().count("Ctrl-C (SIGINT) once more stops at once, and cuts") == announced
    assert server.stop() == 0


def test_ctrl_c_at_rest_ends_without_further_words(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=1)
    os.kill(server.pid, signal.SIGINT)
    watch.until("it has ended", lambda: watch.is_gone(server.pid))
    assert "once more" not in server.log()


@pytest.mark.parametrize("how", ["QUIT", "INT twice"])
def test_a_quick_stop_waits_for_nobody(prefork_server: Start, how: str) -> None:
    server = prefork_server("echo:loop", workers=4)
    with server.connect() as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        pids = [child.pid for child in watch.family(server.pid)]
        if how == "INT twice":
            os.kill(server.pid, signal.SIGINT)
            watch.logged(server, "stopping (SIGINT)")
            time.sleep(SAME_INTERRUPT)  # within it, a second one is the echo of the first
        with watch.soon("a quick stop"):
            assert server.stop(signal.SIGQUIT if how == "QUIT" else signal.SIGINT) == 0
        assert all(map(watch.is_gone, pids))


def test_ttin_and_ttou_are_one_acceptor_more_and_one_fewer(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=2)
    watch.settled(server, 2)
    os.kill(server.pid, signal.SIGTTIN)
    watch.settled(server, 3)
    for idle in (2, 1):
        os.kill(server.pid, signal.SIGTTOU)
        watch.settled(server, idle)
    os.kill(server.pid, signal.SIGTTOU)
    os.kill(server.pid, signal.SIGHUP)
    watch.logged(server, "generation 2 serves")
    watch.settled(server, 2)


def test_every_process_has_a_group_of_its_own_in_the_masters_session(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=2)
    family = [child.pid for child in watch.family(server.pid)]
    assert len({os.getpgid(pid) for pid in (server.pid, *family)}) == 4, "a handler's killpg ends one worker"
    assert {os.getsid(pid) for pid in family} == {os.getsid(server.pid)}


def test_a_stopped_worker_is_not_hung_up_when_its_fork_server_goes(prefork_server: Start) -> None:
    """The kernel sends SIGHUP to a process group with a stopped member that has lost its last parent in the session."""
    server = prefork_server("echo:loop", workers=1)
    (idle,) = watch.settled(server, 1)["workers"]
    with server.connect() as sock:
        sock.sendall(b"a")
        assert sock.recv(1) == b"a"
        os.kill(idle["pid"], signal.SIGSTOP)
        watch.until("it is stopped", lambda: process.state(idle["pid"]) == b"T")
        fork_server = psutil.Process(idle["pid"]).ppid()
        os.kill(fork_server, signal.SIGKILL)
        watch.until("it is the master's child", lambda: psutil.Process(idle["pid"]).ppid() == server.pid)
        assert process.state(idle["pid"]) == b"T"
        os.kill(idle["pid"], signal.SIGCONT)
        sock.sendall(b"b")
        assert sock.recv(1) == b"b"


def test_sighup_while_stopping_and_term_while_reloading_are_understood(prefork_server: Start) -> None:
    server = prefork_server("gated:loop", folder=HANDLERS, workers=2)
    with server.connect() as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        os.kill(server.pid, signal.SIGHUP)
        os.kill(server.pid, signal.SIGTERM)
        watch.logged(server, "stopping")
        os.kill(server.pid, signal.SIGHUP)
        watch.logged(server, "reload (SIGHUP) ignored: the daemon is stopping")
    assert server.stop() == 0


def test_term_before_the_first_ready_ends_the_daemon(prefork_server: Start, gate: Gate) -> None:
    # Start it in a thread: the fixture waits for a READY that never comes.
    started: list[str] = []

    def start() -> None:
        try:
            prefork_server("gated:loop", folder=HANDLERS, environment=gate.environment, name="early")
        except Exception as error:
            started.append(str(error))

    thread = threading.Thread(target=start)
    with gate.closed():
        thread.start()
        pid = watch.until("the fork server runs", lambda: _master_of("prefork: early gen 1"))
        os.kill(pid, signal.SIGTERM)
        with watch.soon("ending a daemon that boots"):
            thread.join()
    assert "exit status 0" in started[0]


def _master_of(title: str) -> int | None:
    for child in watch.family(os.getpid()):
        with suppress(psutil.NoSuchProcess):  # who has read the command line is gone soon
            if child.cmdline()[:1] == [title]:
                return child.ppid()
    return None


# A mask goes through fork and exec, so the daemon has that of whoever starts it: a JVM's threads block most signals.
BLOCKED = "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())\n"
STARTS = {
    "serve": BLOCKED + "os.execv(sys.executable, [sys.executable, '-m', 'prefork', 'serve', '--module=echo:loop', *sys.argv[1:]])",
    "Server": BLOCKED
    + "import prefork; prefork.Server('echo:loop', bind='127.0.0.1:0', workers=2, control=sys.argv[-1].partition('=')[2]).run()",
}


@contextmanager
def ended_at_a_failure(server: Server) -> Iterator[None]:
    """One that does not hear its stop would be waited for."""
    try:
        yield
    except BaseException:
        server.process.kill()
        raise


@pytest.mark.parametrize("start", [*STARTS, pytest.param("upgrade", marks=pytest.mark.slow)])
def test_signals_that_whoever_started_the_daemon_has_blocked_are_heard(tmp_path: Path, start: str) -> None:
    command = [sys.executable, "-c", STARTS.get(start, STARTS["serve"]), "--bind=127.0.0.1:0", "--workers=2"]
    with watch.running(command, tmp_path, tmp_path) as server, ended_at_a_failure(server):
        os.kill(watch.settled(server, 2)["workers"][0]["pid"], signal.SIGKILL)
        [death] = watch.until("the fork server has heard of it", lambda: server.status()["deaths"])
        assert death["cause"] == "signal 9 (SIGKILL)"
        os.kill(server.pid, signal.SIGHUP)
        watch.logged(server, "generation 2 serves")
        old = watch.fork_server(server)
        os.kill(old, signal.SIGKILL)
        watch.logged(server, "generation 3 serves")  # by its SIGCHLD
        os.kill(server.pid, signal.SIGTTIN)
        watch.settled(server, 3)
        if start == "upgrade":
            os.kill(server.pid, signal.SIGUSR2)
            watch.logged(server, "generation 4 serves")
            os.kill(server.pid, signal.SIGHUP)
            watch.logged(server, "generation 5 serves")
        os.kill(server.pid, signal.SIGTERM)
        assert server.process.wait(watch.DEADLINE) == 0


@pytest.mark.parametrize("signo", signals.MASTERS)
def test_what_a_process_manager_sends_to_all_but_the_master_costs_no_connection(prefork_server: Start, signo: int) -> None:
    server = prefork_server("echo:loop", workers=2, max_workers=3)
    fork_server = watch.fork_server(server)
    with server.connect() as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        for child in watch.family(server.pid):
            os.kill(child.pid, signo)
        for _ in range(4):
            with server.connect() as other:
                other.sendall(b"other")
                assert other.recv(5) == b"other"
        sock.sendall(b"y")
        assert sock.recv(1) == b"y"
    watch.quiet(server)
    assert watch.fork_server(server) == fork_server
    status = server.status()
    assert (status["deaths"], status["totals"]["killed"], status["generation"]) == ([], 0, 1)
    assert server.stop() == 0
    assert "died" not in server.log()
    assert "ERROR" not in server.log()


@pytest.mark.parametrize("signo", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_of_all_processes_while_the_handler_is_imported_is_in_order(
    module: Callable[[str], Path], gate: Gate, tmp_path: Path, signo: int
) -> None:
    importing = tmp_path / "importing"
    says = f"import os\nwith open({str(importing)!r}, 'w') as file:\n    file.write(str(os.getpid()))\n"
    folder = module(says + (HANDLERS / "gated.py").read_text())
    command = [sys.executable, "-m", "prefork", "serve", "--module=mine:loop", "--bind=127.0.0.1:0", "--name=early"]
    with gate.closed(), watch.running(command, folder, tmp_path, environment=gate.environment, wait=False) as server:
        fork_server = int(watch.until("the import runs", lambda: importing.read_text() if importing.exists() else ""))
        os.kill(fork_server, signo)
        watch.until("it has taken it", lambda: (how := standing(fork_server)) is None or how.has_taken(signo))
        assert not watch.is_gone(fork_server)
        os.kill(server.pid, signo)
        assert server.process.wait(watch.DEADLINE) == 0
    assert "ERROR" not in server.log()
    assert "Traceback" not in server.log()


INSTALLS = """
import faulthandler, os, signal

def mine(signo, frame):
    came.append(signo)

def raises(signo, frame):
    raise SystemExit

came = []
dumped = open("dumped", "w+")
for signo in (signal.SIGUSR1, signal.SIGALRM, signal.SIGTERM, signal.SIGWINCH, signal.SIGRTMIN + 5):
    signal.signal(signo, mine)
signal.signal(signal.SIGHUP, raises)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
faulthandler.register(signal.SIGUSR2, dumped)
# What it forks ends by what ends any process.
ready, is_there = os.pipe()
child = os.fork()
if not child:
    os.write(is_there, b"x")
    while True:
        signal.pause()
os.read(ready, 1)
os.kill(child, signal.SIGINT)
try:
    os.waitpid(child, 0)
except ChildProcessError:  # reaped by the kernel, as SIGCHLD is ignored
    pass

def loop(sock):
    kept = (signal.SIGUSR1, signal.SIGALRM, signal.SIGRTMIN + 5)
    assert all(signal.getsignal(signo) is mine for signo in kept)
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) is not mine
    for signo in (*kept, signal.SIGUSR2):
        os.kill(os.getpid(), signo)
    assert came == list(kept)
    came.clear()
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    assert os.path.getsize("dumped")
    sock.sendall(b"as it was installed")
"""


def test_signal_handlers_of_the_import_stay_where_workers_do_not_need_the_signal(
    prefork_server: Start, module: Callable[[str], Path]
) -> None:
    server = prefork_server("mine:loop", folder=module(INSTALLS), workers=1, max_workers=1)
    undone = "that the import or on_boot of mine:loop has installed for SIGPIPE, SIGTERM, SIGWINCH are undone"
    assert undone in server.log()
    fork_server = watch.fork_server(server)
    for signo in (signal.SIGHUP, signal.SIGALRM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGRTMIN + 5):
        os.kill(fork_server, signo)  # user code is not called there
    for _ in range(2):
        with server.connect() as sock:
            assert sock.recv(64) == b"as it was installed"
    idle = watch.settled(server, 1)["workers"][0]["pid"]
    os.kill(idle, signal.SIGHUP)
    watch.logged(server, "a signal handler raised while no client was served")
    watch.until("it is replaced", lambda: watch.settled(server, 1)["workers"][0]["pid"] != idle)
    assert watch.fork_server(server) == fork_server
    assert "internal error" not in server.log()
