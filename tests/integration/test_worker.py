"""A worker and what handlers do to it: one connection's trouble is one connection's."""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from prefork.system.signals import MASTERS, PARENT_DIED, RETIRE
from prefork.testing import Server
from tests import watch
from tests.conftest import HANDLERS

Start = Callable[..., Server]
Module = Callable[[str], Path]


def tell(server: Server, line: str) -> bytes:
    """One connection with one line; what comes back until the end, or nothing after a reset."""
    with server.connect() as sock:
        sock.sendall(line.encode())
        try:
            got = sock.recv(4096)
            while data := sock.recv(4096):
                got += data
        except ConnectionResetError:
            return b""
    return got


def test_a_worker_has_the_signals_of_a_fresh_process_but_for_its_own(prefork_server: Start) -> None:
    server = prefork_server("tiny:state", folder=HANDLERS, workers=1, max_workers=1)
    told = json.loads(tell(server, ""))
    ours = {signal.SIGTERM, signal.SIGINT, RETIRE, PARENT_DIED}
    ignored = {signal.SIGPIPE, signal.SIGXFSZ}
    for number, handler in told["handlers"].items():
        wanted = repr(signal.SIG_IGN) if int(number) in ignored else repr(signal.SIG_DFL)
        if int(number) in ours:
            assert "Worker" in handler
        elif int(number) in MASTERS:
            assert "_note" in handler, "nothing is done"
        elif handler != "None":
            assert handler == wanted, f"signal {number}: {handler}"
    assert told["mask"] == []
    assert told["blocking"] is True


def test_a_worker_has_no_descriptor_that_it_does_not_need(prefork_server: Start) -> None:
    server = prefork_server("tiny:state", folder=HANDLERS, workers=1, bind=["127.0.0.1:0", "[::1]:0"])
    told = json.loads(tell(server, ""))
    # Standard three, listener, doorbell, /dev/null, the pipe for stacks, and the connection.
    assert len(told["fds"]) == 8
    worker = watch.until("it is idle again", lambda: watch.workers(server, "idle"))[0]["pid"]
    kinds = sorted(what.split(":")[0] for fd, what in watch.descriptors(worker).items() if fd > 2)
    assert kinds == ["/dev/null", "pipe", "pipe", "socket"]


def test_a_reload_leaves_no_descriptor_of_its_client_or_of_older_generations(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=2)
    before = len(watch.descriptors(server.pid)), len(watch.descriptors(watch.fork_server(server)))
    for _ in range(3):
        assert server.command("reload")["ok"]
    watch.family_of(server.pid, 3, "the old generations have gone")
    assert (len(watch.descriptors(server.pid)), len(watch.descriptors(watch.fork_server(server)))) == before


@pytest.mark.parametrize("line", ["raise", "exit"])
def test_a_handler_that_raises_costs_only_its_connection(prefork_server: Start, line: str) -> None:
    server = prefork_server("tiny:obey", folder=HANDLERS, workers=1, max_workers=1)
    pid = watch.settled(server, 1)["workers"][0]["pid"]
    assert tell(server, line) == b""
    assert tell(server, "go on") == f"{pid} go on\n".encode()
    log = watch.logged(server, "the handler raised, serving 127.0.0.1:")
    assert "in obey" in log
    assert "worker.py" not in log
    totals = watch.until("both are counted", lambda: (now := server.status()["totals"])["serving"] == 0 and now)
    assert (totals["error"], totals["ok"], totals["exited"]) == (1, 1, 0)


def test_tracebacks_are_bounded(prefork_server: Start) -> None:
    server = prefork_server("tiny:obey", folder=HANDLERS, workers=1, max_workers=1)
    begun = int(time.monotonic())
    for _ in range(50):
        tell(server, "raise")
    watch.until("all are counted", lambda: server.status()["totals"]["error"] == 50)
    seconds = int(time.monotonic()) - begun + 1
    # Workers race for the last one of a second.
    assert 10 <= server.log().count("RuntimeError: raised as told") <= 11 * seconds


def test_a_worker_that_ends_itself_is_replaced_and_its_connection_counted_as_killed(prefork_server: Start) -> None:
    server = prefork_server("tiny:obey", folder=HANDLERS, workers=2)
    tell(server, "os._exit")
    status = watch.until("its death is known", lambda: (now := server.status())["deaths"] and now)
    assert (status["totals"]["killed"], status["totals"]["exited"]) == (1, 1)
    assert status["deaths"][0]["cause"] == "exit status 3"
    assert status["deaths"][0]["peer"].startswith("127.0.0.1:")
    assert watch.identity_holds(status["totals"])
    watch.settled(server, 2)


def test_a_child_that_the_handler_forks_and_that_returns_does_not_serve(prefork_server: Start) -> None:
    server = prefork_server("tiny:obey", folder=HANDLERS, workers=1, max_workers=1)
    pid = watch.settled(server, 1)["workers"][0]["pid"]
    assert tell(server, "fork") == f"{pid} fork\n".encode()
    watch.until("the child has ended", lambda: all(map(_ended, psutil.Process(pid).children())))
    totals = watch.until("it is counted", lambda: (now := server.status()["totals"])["serving"] == 0 and now)
    assert (totals["accepted"], totals["ok"]) == (1, 1)
    assert tell(server, "go on") == f"{pid} go on\n".encode()


def test_a_child_that_raises_late_is_told_with_its_own_client(prefork_server: Start, module: Callable[[str], Path]) -> None:
    source = (
        "import os\n"
        "def loop(sock):\n"
        "    if sock.recv(64) == b'fork' and os.fork() == 0:\n"
        "        sock.recv(64)\n"
        "        raise ValueError('late')\n"
    )
    server = prefork_server("mine:loop", folder=module(source), workers=1, max_workers=1)
    with server.connect() as first:
        first.sendall(b"fork")
        host, port = first.getsockname()
        with server.connect() as second:  # the only worker serves somebody else meanwhile
            second.sendall(b"x")
            assert second.recv(64) == b""
        first.sendall(b"go on")
        assert f"the handler raised, serving {host}:{port}\n" in watch.logged(server, "the handler raised, serving")


def _ended(child: psutil.Process) -> bool:
    return watch.is_gone(child.pid)


ENDS_LATER = """
import faulthandler, time

def loop(sock):
    if sock.recv(5) == b"leave":
        faulthandler.dump_traceback_later(0.5, exit=True)
    else:
        time.sleep(1.0)
    sock.sendall(b"done")
"""


def test_a_time_limit_that_a_handler_leaves_does_not_end_the_next_client(prefork_server: Start, module: Module) -> None:
    server = prefork_server("mine:loop", folder=module(ENDS_LATER), workers=1, max_workers=1)
    assert [tell(server, line) for line in ("leave", "other")] == [b"done", b"done"]
    assert server.status()["totals"]["exited"] == 0


def test_an_alarm_that_a_handler_leaves_harms_neither_the_next_client_nor_retiring(prefork_server: Start) -> None:
    server = prefork_server("tiny:obey", folder=HANDLERS, workers=1, max_workers=1)
    old = watch.settled(server, 1)["workers"][0]["pid"]
    tell(server, "alarm")
    for _ in range(20):
        assert tell(server, "go on") == f"{old} go on\n".encode()
    assert server.command("reload")["ok"]
    watch.until("it has left", lambda: watch.is_gone(old), 5.0)


def test_a_default_timeout_left_behind_does_not_reach_the_next_connection(prefork_server: Start) -> None:
    server = prefork_server("tiny:obey", folder=HANDLERS, workers=1, max_workers=1)
    tell(server, "default timeout")
    with server.connect() as sock:
        # Longer than the time-out that was left behind: only a blocking socket is still there.
        assert tell_late(sock) == b"go on"


def tell_late(sock: socket.socket) -> bytes:
    """Say something only once the other side must have been waiting for a while."""
    deadline = time.monotonic() + 0.1
    while time.monotonic() < deadline:
        assert sock.gettimeout() is not None
        time.sleep(0.01)
    sock.sendall(b"go on")
    return sock.recv(64).split()[1] + b" on"


def test_a_file_made_of_the_socket_and_kept_does_not_keep_the_connection(
    prefork_server: Start, module: Callable[[str], object]
) -> None:
    folder = module("kept = []\ndef loop(sock):\n    kept.append(sock.makefile('rwb'))\n    sock.sendall(b'x')\n")
    server = prefork_server("mine:loop", folder=folder, workers=1)
    with server.connect(timeout=5.0) as sock:
        assert sock.recv(1) == b"x"
        assert sock.recv(1) == b""


def test_the_connection_object_tells_who_where_and_which(prefork_server: Start) -> None:
    server = prefork_server("tiny:about", folder=HANDLERS, workers=1)
    with server.connect() as sock:
        told = json.loads(sock.recv(4096))
        assert told["peer"] == f"127.0.0.1:{sock.getsockname()[1]}"
        assert told["local"] == told["listener"] == f"127.0.0.1:{server.address[1]}"
        assert (told["worker"], told["generation"], told["id"]) == (0, 1, "1.0.1")
        assert abs(told["accepted_at"] - time.monotonic()) < 10


def test_retiring_a_worker_signalled_from_outside_loses_nobody(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=2)
    with server.connect() as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        busy = watch.workers(server, "busy")[0]["pid"]
        os.kill(busy, signal.SIGTERM)
        sock.sendall(b"y")
        assert sock.recv(1) == b"y"
    watch.until("it has left", lambda: watch.is_gone(busy))
    watch.settled(server, 2)
    assert server.status()["deaths"] == []


def test_what_the_import_has_opened_stays_open_in_workers_and_goes_to_no_client(
    prefork_server: Start, module: Callable[[str], Path]
) -> None:
    source = (
        "import logging, sqlite3\n"
        "logger = logging.getLogger('mine')\n"
        "logger.addHandler(logging.FileHandler('app.log'))\n"
        "def start():\n"
        "    global db\n"
        "    db = sqlite3.connect('app.db')\n"
        "    db.execute('CREATE TABLE IF NOT EXISTS t (x)')\n"
        "def loop(sock):\n"
        "    logger.warning('client served')\n"
        "    sock.sendall(b'done')\n"
    )
    folder = module(source)
    server = prefork_server("mine:loop", folder=folder, workers=2, on_worker_start="mine:start")
    for _ in range(4):
        with server.connect() as sock:
            assert sock.makefile("rb").read() == b"done"
    assert (folder / "app.log").read_text() == "client served\n" * 4


def test_a_worker_holds_none_of_the_fork_servers_descriptors(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=1, bind=["127.0.0.1:0", "127.0.0.1:0"])
    worker = watch.settled(server, 1)["workers"][0]["pid"]
    ours = set(watch.descriptors(watch.fork_server(server)).values())
    # Standard descriptors, listener, doorbell, /dev/null, the pipe for stacks; and its own copy of the log, when that is a pipe.
    assert len(watch.descriptors(worker)) <= 7
    shared = ours & {what for what in watch.descriptors(worker).values() if what.startswith("socket:")}
    assert len(shared) == 1, "one listener, and not the channel to the master"


def test_a_handler_that_kills_its_process_group_ends_itself_only(prefork_server: Start, module: Callable[[str], Path]) -> None:
    source = (
        "import os, signal\n"
        "def loop(sock):\n"
        "    while data := sock.recv(64):\n"
        "        if data == b'killpg':\n"
        "            os.killpg(os.getpgid(0), signal.SIGKILL)\n"
        "        sock.sendall(data)\n"
    )
    server = prefork_server("mine:loop", folder=module(source), workers=2)
    with server.connect() as other, server.connect() as sock:
        other.sendall(b"x")
        assert other.recv(64) == b"x"
        sock.sendall(b"killpg")
        assert sock.recv(64) == b""
        other.sendall(b"still here")
        assert other.recv(64) == b"still here"
    assert watch.quiet(server)["killed"] == 1


def test_a_worker_that_somebody_stopped_outlives_its_fork_server(prefork_server: Start) -> None:
    server = prefork_server("tiny:who", folder=HANDLERS, workers=1)
    with server.connect() as held:
        worker = int(held.recv(64))
        os.kill(worker, signal.SIGSTOP)
        assert server.command("reload")["ok"]
        watch.until("the old fork server has left", lambda: len(psutil.Process(server.pid).children()) == 2)
        os.kill(worker, signal.SIGCONT)
        held.sendall(b"still here")
        assert not watch.is_gone(worker)
    assert watch.quiet(server)["ok"] == 1


POLICY = "import os\ndef loop(sock):\n    sock.sendall(b'%d' % os.sched_getscheduler(0))\n"
# Has sched_setscheduler(2) fail with EPERM from now on (seccomp(2), a filter of four instructions).
FORBIDDING = """
import ctypes, platform, struct
number = {"x86_64": 144, "aarch64": 119}[platform.machine()]
program = b"".join(struct.pack("HBBI", *one) for one in (
    (0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)))
class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("program", ctypes.c_char_p)]
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, ctypes.c_ulong(1), 0, 0, 0) == 0
assert libc.prctl(22, ctypes.c_ulong(2), ctypes.byref(Filter(4, program)), 0, 0) == 0, ctypes.get_errno()
"""


@pytest.mark.parametrize(("scheduling", "policy"), [("batch", os.SCHED_BATCH), ("inherit", os.SCHED_OTHER)])
def test_workers_interrupt_nobody_and_those_who_look_after_them_may(
    prefork_server: Start, module: Callable[[str], Path], scheduling: str, policy: int
) -> None:
    server = prefork_server("mine:loop", folder=module(POLICY), workers=2, scheduling=scheduling)
    assert tell(server, "") == b"%d" % policy
    assert os.sched_getscheduler(server.pid) == os.sched_getscheduler(watch.fork_server(server)) == os.SCHED_OTHER


def test_a_scheduling_policy_that_the_daemon_was_given_is_its_workers_too(module: Callable[[str], Path], tmp_path: Path) -> None:
    watch.needs("chrt")
    command = ["chrt", "--idle", "0", sys.executable, "-m", "prefork", "serve", "--module=mine:loop", "--bind=127.0.0.1:0"]
    with watch.running(command, module(POLICY), tmp_path) as server:
        worker = watch.settled(server, 8)["workers"][0]["pid"]
        assert os.sched_getscheduler(worker) == os.SCHED_IDLE


def test_where_no_policy_may_be_chosen_workers_serve_with_the_usual_one(
    prefork_server: Start, module: Callable[[str], Path]
) -> None:
    server = prefork_server("mine:loop", folder=module(FORBIDDING + POLICY), workers=2)
    assert tell(server, "") == b"%d" % os.SCHED_OTHER
    watch.logged(server, "workers keep the usual scheduling policy, another can't be had here: Operation not permitted")
