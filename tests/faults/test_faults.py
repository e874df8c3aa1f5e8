"""One instance of each fault, and with `-m slow` a tenth of its counts; `python -m tests.faults` runs the same with full ones."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from prefork.testing import Server, serve
from tests import watch
from tests.conftest import HANDLERS, Gate
from tests.faults import campaign
from tests.faults.arena import Rounds
from tests.faults.refusals import refusals

Start = Callable[..., Server]


# One instance of these takes seconds.
LONG = {
    "accept_errors",
    "addresses",
    "fork_errors",
    "full_doorbell",
    "full_log_pipe",
    "garbage_on_the_board",
    "killed_fork_server",
    "lies_on_the_channel",
    "recycling",
    "refused",
    "steady",
    "stopped_fork_server_for_long",
    "stopped_master",
    "syn_burst",
    "unknown_accept_errors",
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in LONG else [])
        for name, fault in campaign.FAULTS.items()
        if fault.small
    ],
)
def test_one_instance_of_each_fault(name: str) -> None:
    fault = campaign.FAULTS[name]
    fault.run(Rounds(fault.small), fault.workloads[-1])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "workload"), [(name, w) for name, fault in campaign.FAULTS.items() if fault.small for w in fault.workloads]
)
def test_a_tenth_of_each_fault(name: str, workload: str) -> None:
    fault = campaign.FAULTS[name]
    fault.run(Rounds(fault.share(fault.full // 10)), workload)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("seed", "exact", "log"), [(8, True, "disk"), (10, False, "pipe")])
def test_a_daemon_that_is_prepared_for_all_faults_holds_each_in_its_turn(seed: int, exact: bool, log: str) -> None:
    figures = campaign.in_turn(seed)
    assert (figures["exact"], figures["log"]) == (exact, log)


def test_a_fork_server_that_can_not_be_replaced_is_tried_again_and_its_workers_serve_on(
    prefork_server: Start, module: Callable[[str], Path]
) -> None:
    source = "def loop(sock):\n    sock.sendall(b'x')\n"
    server = prefork_server("mine:loop", folder=module(source), workers=2)
    module(source + "1 / 0\n")
    os.kill(watch.fork_server(server), signal.SIGKILL)
    log = watch.logged(server, "a new fork server in 2.2 s")
    assert server.status()["reload"] is None, "nobody has asked for one"
    assert "a new fork server in 1.5 s" in log
    assert "ZeroDivisionError" in log
    assert "ZeroDivisionError" in server.status()["backoff"]["reason"]
    for _ in range(10):
        with server.connect() as sock:
            assert sock.recv(1) == b"x"
    module(source)
    # A reload heals at once; nobody has to wait for the next try.
    assert server.command("reload")["ok"]
    assert server.status()["backoff"] is None
    watch.settled(server, 2)


def test_an_address_is_free_when_master_and_fork_server_are_dead_and_a_connection_is_served_to_its_end(
    prefork_server: Start, module: Callable[[str], Path]
) -> None:
    source = "from prefork.examples.echo import loop\n"
    server = prefork_server("mine:loop", folder=module(source), workers=2)
    with server.connect() as held:
        held.sendall(b"x")
        assert held.recv(64) == b"x"
        watch.settled(server, 2)
        family = watch.family(server.pid)
        module(source + "1 / 0\n")
        os.kill(watch.fork_server(server), signal.SIGKILL)
        watch.logged(server, "a new fork server in 1.5 s")
        os.kill(server.pid, signal.SIGKILL)
        watch.until("the address is free", lambda: watch.is_free(server.address[1]))
        held.sendall(b"y")
        assert held.recv(64) == b"y"
    watch.until("all have gone", lambda: all(watch.is_gone(child.pid) for child in family))


def test_a_dead_master_leaves_the_queue_to_the_last_generation_whatever_earlier_ones_serve(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=1, max_workers=2)
    with ExitStack() as stack:
        first = stack.enter_context(server.connect())
        first.sendall(b"x")
        assert first.recv(64) == b"x"
        [old] = watch.workers(server, "busy")
        assert server.command("reload")["ok"]
        watch.until("the master is its parent", lambda: psutil.Process(old["pid"]).ppid() == server.pid)
        second = stack.enter_context(server.connect())
        second.sendall(b"x")
        assert second.recv(64) == b"x"
        queued = stack.enter_context(server.connect())
        queued.sendall(b"waited")
        os.kill(server.pid, signal.SIGKILL)
        watch.until("the old worker knows", lambda: psutil.Process(old["pid"]).ppid() != server.pid)
        first.sendall(b"y")
        assert first.recv(64) == b"y"
        second.close()  # whose worker has half a second for who waits
        assert queued.recv(64) == b"waited"


def test_stops_without_the_right_to_a_filter_lose_nobody_either() -> None:
    if os.geteuid() != 0:
        pytest.skip("without root every test of a stop is this one, where the kernel wants CAP_NET_ADMIN for a filter")
    command = ["setpriv", "--bounding-set=-net_admin", sys.executable, "-m", "tests.faults", "graceful_stops", "--count=3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_scaled_while_a_fork_server_is_replaced_stays_so(prefork_server: Start, gate: Gate) -> None:
    server = prefork_server("gated:loop", folder=HANDLERS, workers=2, environment=gate.environment)
    with ThreadPoolExecutor() as pool:
        with gate.closed():
            os.kill(watch.fork_server(server), signal.SIGKILL)
            watch.until("it is being replaced", lambda: server.status()["state"] == "reloading")
            asked = pool.submit(server.command, "scale", workers="3")
            watch.until("it is scaled", lambda: server.status()["listeners"][0]["workers"]["target"] == 3)
        assert asked.result()["ok"]
    watch.logged(server, "generation 2 serves")
    assert watch.settled(server, 3)["listeners"][0]["workers"]["target"] == 3


# Of the first generation both sides of a fork wait for as long as there is a file.
SLOW_FORKS = """
import os, time

FIRST = os.path.exists("first")

def wait():
    while FIRST and os.path.exists("hold"):
        time.sleep(0.01)

os.register_at_fork(after_in_parent=wait, after_in_child=wait)

def loop(sock):
    sock.sendall(b"x")
"""


def test_a_worker_that_was_forked_by_a_fork_server_that_died_and_comes_late_serves_nobody(
    prefork_server: Start, module: Callable[[str], Path]
) -> None:
    folder = module(SLOW_FORKS)
    first, hold = folder / "first", folder / "hold"
    first.touch()
    server = prefork_server("mine:loop", folder=folder, workers=2, log_level="debug")
    watch.settled(server, 2)
    hold.touch()
    try:
        os.kill(server.pid, signal.SIGTTIN)
        watch.until("it is forked", lambda: len(watch.family(server.pid)) == 4)
        first.unlink()
        os.kill(watch.fork_server(server), signal.SIGKILL)
        watch.logged(server, "generation 1 has ended")
        assert len(watch.family(server.pid)) == 5
    finally:
        hold.unlink()
    watch.family_of(server.pid, 4, "it has gone")
    watch.settled(server, 3)


BUGGY = """
import errno, os, sys
from prefork import Server
from prefork.master import Master

def bug(*_):
    raise ZeroDivisionError("a bug")

def no_more_forks(*_):
    def fork():
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    os.fork = fork
    print("no more forks", file=sys.stderr, flush=True)

Master.scale = {"bug": bug, "no more forks": no_more_forks}[sys.argv[1]]
before = os.listdir("/proc/self/fd")
status = Server("tiny:obey", bind=sys.argv[2], control=sys.argv[3], pid_file=sys.argv[4], workers=2).run()
print("left open:", len(os.listdir("/proc/self/fd")) - len(before), file=sys.stderr, flush=True)
if status:
    sys.stdin.read()
sys.exit(status)
"""


@contextmanager
def with_a_fault(tmp_path: Path, fault: str) -> Iterator[Server]:
    """A daemon whose master has this fault from the first SIGTTIN on."""
    control, port = tmp_path / "control", watch.free_port()
    command = [sys.executable, "-c", BUGGY, fault, f"127.0.0.1:{port}", str(control), str(tmp_path / "pid")]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=HANDLERS, stderr=log, stdin=subprocess.PIPE)
    server = Server(("127.0.0.1", port), process.pid, str(control), tmp_path / "log", process)
    try:
        watch.until("it listens", control.exists)
        watch.settled(server, 2)
        yield server
    finally:
        assert process.stdin
        process.stdin.close()
        server.stop()


def test_a_fork_server_that_can_not_be_forked_refuses_the_reload_with_the_limits_to_look_at(tmp_path: Path) -> None:
    with with_a_fault(tmp_path, "no more forks") as server:
        os.kill(server.pid, signal.SIGTTIN)
        watch.logged(server, "no more forks")
        for _ in range(2):
            answer = server.command("reload")
            assert answer["reason"].startswith("can't start a fork server: Resource temporarily unavailable: see RLIMIT_NPROC")
        fds = len(watch.descriptors(server.pid))
        assert not server.command("reload")["ok"]
        assert len(watch.descriptors(server.pid)) == fds
        with server.connect() as sock:
            sock.sendall(b"hello\n")
            assert sock.recv(64).endswith(b"hello\n")
        assert server.stop() == 0


NO_FORKS = """
import errno, os, sys
from prefork import Server
from prefork.errors import PreforkError

def fork():
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

os.fork = fork
try:
    Server("tiny:obey", bind=sys.argv[1], control=sys.argv[2], pid_file=sys.argv[3]).run()
except PreforkError as error:
    sys.exit(str(error))
"""


def test_a_start_that_can_not_fork_leaves_nothing_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-c", NO_FORKS, f"unix:{tmp_path}/socket", f"{tmp_path}/control", f"{tmp_path}/pid"]
    done = subprocess.run(command, cwd=HANDLERS, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("can't start a fork server: Resource temporarily unavailable: see RLIMIT_NPROC")
    assert list(tmp_path.iterdir()) == []


def test_an_upgrade_needs_no_process_to_read_its_command_line(prefork_server: Start, gate: Gate, tmp_path: Path) -> None:
    with refusals(tmp_path) as orders:
        server = prefork_server("gated:loop", folder=HANDLERS, workers=1, environment={**orders.environment, **gate.environment})
        with gate.closed():
            number = server.command("upgrade")["upgrade"]  # its trial waits at the gate
            orders.forks(server.pid, errno.EAGAIN, 1)
        outcome = server.command("outcome", upgrade=number)
        assert (outcome["ok"], outcome["generation"], orders.left) == (True, 2, 0), outcome
        watch.settled(server, 1)


def test_a_bug_in_the_master_costs_nobody_their_connection(tmp_path: Path) -> None:
    with with_a_fault(tmp_path, "bug") as server:
        family = watch.family(server.pid)
        with server.connect() as held:
            os.kill(server.pid, signal.SIGTTIN)
            watch.logged(server, "left open: 0")  # the program lives on, and is master of nobody
            held.sendall(b"still here\n")
            assert held.recv(64).endswith(b"still here\n")
        watch.until("all have gone", lambda: all(watch.is_gone(child.pid) for child in family))
        assert watch.is_free(server.address[1])
        assert server.process.stdin
        server.process.stdin.close()
        assert server.process.wait(watch.DEADLINE) == 70
    assert "internal error in the master" in server.log()
    assert "ZeroDivisionError: a bug" in server.log()
    assert "accept failed" not in server.log()
    assert (os.path.exists(server.control), (tmp_path / "pid").exists(), watch.is_free(server.address[1])) == (False, False, True)


def test_a_fork_server_that_is_stopped_is_replaced(prefork_server: Start) -> None:
    server = prefork_server("tiny:who", folder=HANDLERS, workers=1, boot_timeout=1.5)
    watch.settled(server, 1)
    os.kill(watch.fork_server(server), signal.SIGSTOP)
    with server.connect() as held:
        # It can't fork the replacement that this connection needs.
        assert held.recv(64)
        watch.logged(server, "does not answer: it is killed")
        log = watch.logged(server, "generation 2 serves")
        assert log.count("does not answer") == 1
        with server.connect() as sock:
            assert sock.recv(64)
    watch.until("all is counted", lambda: server.status()["totals"]["ok"] == 2)


GARBAGE = """
import os, mmap

def loop(sock):
    line = sock.recv(64)
    if line == b"pipe":
        for name in os.listdir("/proc/self/fd"):
            try:
                if os.readlink(f"/proc/self/fd/{name}").startswith("pipe:") and int(name) > 2:
                    for _ in range(2000):
                        os.write(int(name), os.urandom(64))
            except OSError:
                pass
    if line == b"board":
        import gc
        from prefork.pool.scoreboard import Scoreboard
        for found in gc.get_referrers(Scoreboard):
            if isinstance(found, Scoreboard):
                for slot in range(8):
                    record = found.record(slot)
                    found.words[record : record + 64] = memoryview(os.urandom(512)).cast(found.words.format)
    sock.sendall(line)
"""


@pytest.mark.parametrize("what", ["pipe", "board"])
def test_garbage_from_a_worker_changes_nothing_for_others(prefork_server: Start, module: Callable[[str], Path], what: str) -> None:
    server = prefork_server("mine:loop", folder=module(GARBAGE), workers=4)
    watch.settled(server, 4)
    for _ in range(3):
        with server.connect() as sock:
            sock.sendall(what.encode())
            assert sock.recv(64) == what.encode()
    # Pids on a spoilt board are anybody's: ask the kernel for the workers.
    killed = [child.pid for child in watch.family(server.pid) if child.pid != watch.fork_server(server)]
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    watch.until("they have gone", lambda: all(map(watch.is_gone, killed)))
    with server.connect() as sock:
        sock.sendall(b"hello")
        assert sock.recv(64) == b"hello"
    watch.until("the pool is whole", lambda: len(watch.family(server.pid)) >= 5)
    assert server.status()["state"] == "running"
    assert "internal error" not in server.log()


def test_the_orders_of_the_master_can_not_be_overwritten_by_a_worker(prefork_server: Start, module: Callable[[str], Path]) -> None:
    folder = module(
        "import ctypes, gc\n"
        "from prefork.worker import Worker\n"
        "def loop(sock):\n"
        "    line = sock.recv(64)\n"
        "    if line == b'orders':\n"
        "        with open('/proc/self/maps') as maps:\n"
        "            at = next(int(l.split('-')[0], 16) for l in maps if 'prefork-orders' in l)\n"
        "        ctypes.memset(at, 0, 4096)\n"
        "    sock.sendall(line)\n"
    )
    server = prefork_server("mine:loop", folder=folder, workers=2)
    with server.connect() as sock:
        sock.sendall(b"orders")
        try:
            assert sock.recv(64) == b""
        except ConnectionResetError:
            pass  # how the kernel ends a dead process' connection with unread data
    status = watch.until("its death is known", lambda: (now := server.status())["deaths"] and now)
    assert status["deaths"][0]["cause"] == "signal 11 (SIGSEGV)"


def test_a_worker_outlives_neither_its_master_nor_its_fork_server() -> None:
    # Both die at once: nobody is left to signal the workers but the kernel.
    with serve("echo:loop", workers=2) as server:
        status = watch.settled(server, 2)
        kill_at_once(server, status)
        they_leave(status)


def kill_at_once(server: Server, status: dict[str, Any]) -> None:
    """Kill the master and its fork server: no process is left to signal the workers but the kernel."""
    fork_server = watch.fork_server(server, status["generation"])
    os.kill(server.pid, signal.SIGSTOP)
    os.kill(fork_server, signal.SIGKILL)
    os.kill(server.pid, signal.SIGKILL)
    server.process.wait()


def they_leave(status: dict[str, Any]) -> None:
    """Wait until the workers of that status have gone."""
    watch.until("the workers have gone", lambda: all(watch.is_gone(worker["pid"]) for worker in status["workers"]))


ANOTHER_FOR_A_MOMENT = """
import os
def loop(sock):
    os.setegid(65534), os.seteuid(65534), os.seteuid(0), os.setegid(0)
    sock.sendall(b"done")
    sock.recv(64)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user for a moment")
@pytest.mark.parametrize("meanwhile", [False, True], ids=["after", "meanwhile"])
def test_nor_does_one_whose_handler_was_another_user_for_a_moment(module: Callable[[str], Path], *, meanwhile: bool) -> None:
    """The kernel has forgotten by then that it is to signal the worker; ``meanwhile``: its parents die before it is told again."""
    with serve("mine:loop", folder=module(ANOTHER_FOR_A_MOMENT), workers=1, max_workers=1) as server:
        status = watch.settled(server, 1)
        with server.connect() as sock:
            assert sock.recv(64) == b"done"
            if meanwhile:
                kill_at_once(server, status)
        if not meanwhile:
            watch.settled(server, 1)
            kill_at_once(server, status)
        they_leave(status)
