"""A handler against prefork's own processes: what it writes, says and takes harms no other process and ends no master."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from prefork.system import process
from prefork.system.credentials import WORKER_OOM_SCORE
from prefork.testing import Server, connect
from tests import public, watch
from tests.conftest import HANDLERS
from tests.watch import logged, until

NOBODY = 65534
AS_NOBODY = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
# One ordinary user, and root whose handlers are another's.
USERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {"one user": (AS_NOBODY, ()), "two users": ((), ("--user=nobody",))}
# /proc as a unit with ProtectProc=invisible and ProcSubset=pid has it, and none.
HIDDEN = ("unshare", "--mount", "sh", "-c", 'mount -t proc -o hidepid=invisible,subset=pid proc /proc && exec "$@"', "sh")
NO_PROC = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh")
READ_ONLY_PROC = ("unshare", "--mount", "sh", "-c", 'mount --bind /proc /proc && mount -o remount,bind,ro /proc && exec "$@"', "sh")
Start = Callable[..., AbstractContextManager[Server]]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Everybody can read it, and import prefork and the handler there; ``run`` is nobody's."""
    with public.copy() as copied:
        shutil.copy(HANDLERS / "prying.py", copied)
        # Else every start, and each of an upgrade's programs, compiles all of it.
        subprocess.run([public.PYTHON, "-m", "compileall", "-q", copied / "prefork", copied / "click"], check=True)
        (copied / "run").mkdir()
        os.chown(copied / "run", NOBODY, NOBODY)
        yield copied


@pytest.fixture(params=list(USERS))
def start(request: pytest.FixtureRequest, folder: Path) -> Start:
    """Starts a daemon, of one user or of two."""
    prefix, user = USERS[request.param]

    @contextmanager
    def start(*options: str, within: tuple[str, ...] = ()) -> Iterator[Server]:
        control, log = folder / "run" / "control", folder / "log"
        line = [*within, *prefix, public.PYTHON, "-B", "-m", "prefork", "serve", "--module=prying:loop", "--bind=127.0.0.1:0"]
        line += [f"--control={control}", "--workers=2", "--log-level=debug", *user, *options]
        with log.open("wb") as file:
            daemon = subprocess.Popen(line, cwd=folder, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        server = Server(("127.0.0.1", 0), daemon.pid, str(control), log, daemon)
        try:
            serving = re.compile(r" serving prying:loop on (127\.0\.0\.1):([0-9]+):")
            until("it serves or has ended", lambda: serving.search(server.log()) or daemon.poll() is not None)
            assert daemon.poll() is None, server.log()
            [(host, port)] = serving.findall(server.log())
            yield Server((host, int(port)), daemon.pid, str(control), log, daemon)
        finally:
            server.stop()
        assert "internal error" not in server.log()

    return start


def ask(server: Server, order: str) -> Any:
    """What the handler answers to an order."""
    with connect(server.address) as sock:
        sock.sendall(order.encode())
        answer = sock.makefile("rb").read()
    assert answer, server.log()
    return json.loads(answer)


# -- what it writes


@pytest.mark.parametrize("byte", ["ff", "00"])
def test_a_stray_memset_of_the_board_costs_no_client_its_connection(start: Start, byte: str) -> None:
    with start("--max-workers=8") as server:
        for _ in range(5):
            ask(server, "hello")
        assert ask(server, f"smash {byte}") == "smashed"
        for _ in range(20):
            assert ask(server, "hello") == "hello"
        assert server.command("reload")["ok"]
        # Workers that leave write down what they have counted, whatever stands on their board.
        until("all are counted", lambda: watch.quiet(server)["ok"] == 26)
        assert {key: watch.quiet(server)[key] for key in ("accepted", "error", "killed")} == {
            "accepted": 26,
            "error": 0,
            "killed": 0,
        }
        ask(server, "hello")
        until("it is counted", lambda: watch.quiet(server)["ok"] == 27)
        status = server.status()
        assert status["deaths"] == []
        assert 0 < status["duration"]["p99"] < 60, "durations that were overwritten are forgotten"


@pytest.mark.slow
@pytest.mark.parametrize("order", ["backdate 1", "backdate 0", "smash 00", "smash ff", "smash 01"])
def test_what_a_handler_writes_ends_no_other_connection_before_its_time(start: Start, order: str) -> None:
    timeout = 3.0
    with start(f"--timeout={timeout}", "--max-workers=8", "--graceful-timeout=1") as server:
        watch.settled(server, 2)
        began = time.monotonic()
        with connect(server.address) as held:
            held.sendall(b"wait")
            until("it is served", lambda: server.status()["totals"]["serving"] == 1)
            ask(server, order)
            if order.startswith("smash"):
                # Its slot says now that nobody is there. One that begins afterwards is ended in its time, and so is only that.
                began = time.monotonic()
                with connect(server.address) as last:
                    last.sendall(b"wait")
                    last.settimeout(watch.DEADLINE)
                    assert last.recv(1) == b""
            else:
                held.settimeout(watch.DEADLINE)
                assert held.recv(1) == b""
        assert time.monotonic() - began >= timeout
        logged(server, "timeout after 3 s (SIGKILL)")
        assert server.log().count("timeout after 3 s (SIGKILL)") == 1


def test_a_handler_has_no_way_to_write_the_orders(start: Start) -> None:
    with start() as server:
        assert ask(server, "write_orders") == "EACCES"
        assert ask(server, "boards") == []
        os.kill(server.pid, signal.SIGUSR1)
        assert server.command("reload")["ok"]


def test_without_proc_the_start_says_that_the_orders_are_exposed(start: Start) -> None:
    with start(within=NO_PROC) as server:
        assert "there is no /proc: C code of generation 1's handlers can make writable" in server.log()
        assert ask(server, "hello") == "hello"


# -- what it takes


def test_master_and_fork_server_keep_memory_and_descriptors_to_themselves(start: Start) -> None:
    with start() as server:
        watch.settled(server, 2)
        us, fork_server, master = ask(server, "pids")
        assert master == server.pid
        assert ask(server, f"take {fork_server}") == []
        assert ask(server, f"take {master}") == []
        # Before and after: what makes the answer empty is not that nothing can ever be taken.
        own = ask(server, "own")
        assert own == {"score": _score(server.pid) + WORKER_OOM_SCORE, "dumpable": 1, "environ": True}
        os.kill(server.pid, signal.SIGUSR2)
        logged(server, "goes on where prefork")
        logged(server, "generation 2 serves")
        watch.settled(server, 2)
        us, fork_server, master = ask(server, "pids")
        assert master == server.pid
        assert ask(server, f"take {fork_server}") == []
        assert ask(server, f"take {master}") == []
        assert ask(server, "own") == own
        assert us != fork_server


# -- what it says


@pytest.fixture
def victim(folder: Path) -> Iterator[Callable[[Server], int]]:
    """Gives a process that has become the master's child, and that no fork server has forked."""
    os.mkfifo(folder / "begin")
    yield lambda server: _adopted(folder, server)
    (folder / "begin").unlink()
    with suppress(FileNotFoundError, ProcessLookupError):
        os.kill(int((folder / "victim").read_text()), signal.SIGKILL)
    (folder / "victim").unlink(missing_ok=True)


# Beside the daemon, as an entrypoint starts something: it becomes a daemon once it is told to.
WITH_ANOTHER = (
    "sh",
    "-c",
    '(read line < begin; setsid sleep 600 >/dev/null 2>&1 & echo $! > victim.new; mv victim.new victim) & exec "$@"',
    "sh",
)


def _adopted(folder: Path, server: Server) -> int:
    (folder / "begin").write_text("now\n")
    until("there is a process", (folder / "victim").exists)
    pid = int((folder / "victim").read_text())
    until("the master has adopted it", lambda: psutil.Process(pid).ppid() == server.pid)
    # Starts are known to a tick.
    until(
        "it is older than an order to come", lambda: process.clock_of_starts() - (process.started_at(pid) or 0) > 2 * process.TICK
    )
    return pid


@pytest.mark.parametrize(("what", "then"), [("forked", ""), ("forked", "then die"), ("board", "then die")])
def test_what_a_fork_server_has_not_forked_is_no_worker(
    start: Start, folder: Path, victim: Callable[[Server], int], what: str, then: str
) -> None:
    with start(f"--chdir={folder}", within=WITH_ANOTHER) as server:
        watch.settled(server, 2)
        pid = victim(server)
        (folder / "run" / "forge").write_text(f"{what} {pid} {then}")
        os.kill(server.pid, signal.SIGTTIN)
        if what == "forked":
            logged(server, "reports from processes of generation 1 made no sense")
        if not then:
            os.kill(watch.fork_server(server), signal.SIGKILL)
        logged(server, "generation 2 serves")
        until("the old ones have left", lambda: "generation 1 has ended" in server.log())
        assert server.stop() == 0
        assert not watch.is_gone(pid)
        assert f"(pid {pid})" not in server.log()


def test_workers_that_live_are_not_believed_to_have_ended(start: Start, folder: Path) -> None:
    with start(f"--chdir={folder}", "--max-workers=8") as server:
        for more in range(3):
            watch.settled(server, 2 + more)
            (folder / "run" / "forge").write_text("exited 0")
            os.kill(server.pid, signal.SIGTTIN)
            until("it was told", lambda: not (folder / "run" / "forge").exists())
        watch.settled(server, 5)
        until("the master has heard of all", lambda: server.status()["totals"]["forked"] >= 5)
        totals = server.status()["totals"]
        assert (totals["forked"], totals["exited"]) == (5, 0)
        assert len(watch.family(server.pid)) == 1 + 5
        logged(server, "reports from processes of generation 1 made no sense")


def test_forks_that_are_said_to_have_failed_leave_no_process(start: Start, folder: Path) -> None:
    with start(f"--chdir={folder}", "--max-workers=8") as server:
        for more in range(3):
            watch.settled(server, 2 + more)
            (folder / "run" / "forge").write_text("failed 0")
            os.kill(server.pid, signal.SIGTTIN)
            until("it was told", lambda: not (folder / "run" / "forge").exists())
            logged(server, "fork failed: Resource temporarily unavailable")
        watch.settled(server, 5)
        watch.family_of(server.pid, 1 + 5, "those that were denied have left")
        assert server.stop() == 0


# -- what the master sees of others


# Before every program of that environment: a kernel that can't be asked by a pidfd.
OLD_KERNEL = """
import fcntl
ioctl = fcntl.ioctl
def of_old(fd, request, *arguments):
    if request >> 8 & 0xFF == 0xFF:
        raise OSError(25, "Inappropriate ioctl for device")
    return ioctl(fd, request, *arguments)
fcntl.ioctl = of_old
"""


@pytest.mark.parametrize("kernel", ["this", pytest.param("before 6.13", marks=pytest.mark.slow)])
def test_where_proc_hides_processes_workers_are_known_orphans_adopted_and_all_ended(
    start: Start, folder: Path, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel != "this":
        (folder / "old").mkdir(exist_ok=True)
        (folder / "old" / "sitecustomize.py").write_text(OLD_KERNEL)
        monkeypatch.setenv("PYTHONPATH", str(folder / "old"))
    with start("--timeout=60", within=HIDDEN) as server:
        watch.settled(server, 2)
        own = ask(server, "own")
        assert own == {"score": _score(server.pid) + WORKER_OOM_SCORE, "dumpable": 1, "environ": True}
        os.kill(watch.workers(server)[0]["pid"], signal.SIGKILL)
        logged(server, "died: signal 9")
        watch.settled(server, 2)
        os.kill(watch.fork_server(server), signal.SIGKILL)
        logged(server, "generation 2 serves")
        logged(server, "generation 1 has ended")
        os.kill(server.pid, signal.SIGUSR2)
        logged(server, "generation 3 serves")
        logged(server, "generation 2 has ended")
        watch.settled(server, 2)
        assert server.status()["totals"]["forked"] - server.status()["totals"]["exited"] == 2
        family = watch.family(server.pid)
        assert server.stop() == 0
        assert all(watch.is_gone(one.pid) for one in family)
        assert "made no sense" not in server.log()


def _score(pid: int) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


def test_where_proc_can_not_be_written_workers_serve_with_their_parents_score(start: Start) -> None:
    with start(within=READ_ONLY_PROC) as server:
        assert ask(server, "own")["score"] == _score(server.pid)
