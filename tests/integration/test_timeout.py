"""`timeout`, and what is told of workers that hang or crash."""

import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from prefork.testing import Server
from tests import log_schema, watch
from tests.conftest import HANDLERS

Start = Callable[..., Server]
Module = Callable[[str], Path]


def begin(server: Server, deed: str) -> tuple[socket.socket, int]:
    """A connection whose worker does something; and that worker's pid."""
    sock = server.connect()
    pid = int(sock.recv(64))
    sock.sendall(deed.encode())
    return sock, pid


def death(server: Server, pid: int) -> dict[str, Any]:
    """The death of this worker, once it is told."""

    def look() -> dict[str, Any] | None:
        return next((death for death in server.status()["deaths"] if death["pid"] == pid), None)

    return watch.until(f"{pid} is among the deaths", look)


# -- hung


@pytest.mark.parametrize(
    ("deed", "where"),
    [
        ("sleeps for ever", "in sleeps_for_ever"),
        ("computes for ever", "in computes_for_ever"),
        ("keeps the gil in c", "in keeps_the_gil_in_c"),
        ("waits for a thread", "in sleeps_for_ever"),
        ("waits for its child", "in waits_for_its_child"),
    ],
)
def test_a_hung_worker_is_killed_and_its_stack_is_told(prefork_server: Start, deed: str, where: str) -> None:
    server = prefork_server("stuck:loop", folder=HANDLERS, workers=2, timeout=1, log_format="json")
    begun = time.monotonic()
    sock, pid = begin(server, deed)
    with sock:
        assert watch.cut(sock)
    assert time.monotonic() - begun > 1.0
    died = death(server, pid)
    assert died["cause"] == "timeout after 1 s (SIGKILL)"
    assert died["peer"]
    assert where in died["stack"]
    assert "worker.py" not in died["stack"].partition("Current thread")[2]
    status = watch.settled(server, 2)
    assert (status["totals"]["killed"], status["totals"]["ok"], status["totals"]["serving"]) == (1, 0, 0)
    hung = [entry for entry in log_schema.read(server.log()) if entry["event"] == "hung"]
    assert [(e["level"], e["pid"], e["peer"], e["text"]) for e in hung] == [("error", pid, died["peer"], died["stack"])]
    assert hung[0]["duration"] >= 1.0


def test_one_that_hears_no_signal_is_killed_without_a_stack(prefork_server: Start) -> None:
    server = prefork_server("stuck:loop", folder=HANDLERS, workers=1, timeout=0.5)
    sock, pid = begin(server, "blocks every signal")
    with sock:
        assert watch.cut(sock)
    died = death(server, pid)
    assert (died["cause"], died["stack"]) == ("timeout after 0.5 s (SIGKILL)", None)


def test_time_in_which_a_worker_was_stopped_counts(prefork_server: Start) -> None:
    server = prefork_server("stuck:loop", folder=HANDLERS, workers=1, timeout=1)
    sock, pid = begin(server, "")
    with sock:
        os.kill(pid, signal.SIGSTOP)
        assert death(server, pid)["cause"] == "timeout after 1 s (SIGKILL)"


def test_many_that_hang_all_go(prefork_server: Start) -> None:
    server = prefork_server("stuck:loop", folder=HANDLERS, workers=2, timeout=1)
    held = [begin(server, "sleeps for ever") for _ in range(12)]
    for sock, pid in held:
        assert watch.cut(sock)
        assert "in sleeps_for_ever" in death(server, pid)["stack"]
        sock.close()
    assert watch.quiet(server)["killed"] == 12


@pytest.mark.slow
def test_a_connection_that_is_younger_is_never_cut(prefork_server: Start, module: Module) -> None:
    source = (
        "import time\ndef loop(sock):\n    seconds = float(sock.recv(64))\n    time.sleep(seconds)\n    sock.sendall(b'in time')\n"
    )
    timeout = 0.3
    server = prefork_server("mine:loop", folder=module(source), workers=4, max_workers=4, timeout=timeout)
    cut: list[float] = []
    served: list[float] = []

    def client(seed: int) -> None:
        # As long as the timeout, a little more or less: what a worker serves is never what it served when it was looked at.
        dice = random.Random(seed)
        # One is certain to be served, and one to be cut, on any machine.
        for seconds in (0.0, *(dice.uniform(timeout - 0.06, timeout + 0.06) for _ in range(12)), 600.0):
            begun = time.monotonic()
            with server.connect() as sock:
                sock.sendall(b"%f" % seconds)
                answer = sock.makefile("rb").read()
            took = time.monotonic() - begun
            (served if answer else cut).append(took)

    clients = [threading.Thread(target=client, args=(seed,)) for seed in range(4)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    assert served
    assert cut
    assert min(cut) >= timeout
    totals = watch.quiet(server)
    assert (totals["ok"], totals["killed"], totals["error"]) == (len(served), len(cut), 0)


@pytest.mark.slow
def test_the_master_punishes_nobody_for_time_in_which_it_was_stopped(prefork_server: Start) -> None:
    server = prefork_server("tiny:who", folder=HANDLERS, workers=2, timeout=3)
    master = psutil.Process(server.pid)
    with server.connect() as known:
        assert known.recv(64)
        watch.settled(server, 2)
        master.suspend()
        try:
            with server.connect() as unknown:
                assert unknown.recv(64)
                time.sleep(3.2)  # the very time that must not count
                master.resume()
                time.sleep(1.2)  # so long after a look everybody has been looked at
        finally:
            master.resume()
    totals = watch.quiet(server)
    assert (totals["ok"], totals["killed"]) == (2, 0)


def test_an_adopted_worker_is_the_masters_to_end(prefork_server: Start) -> None:
    server = prefork_server("stuck:loop", folder=HANDLERS, workers=1, timeout=1)
    sock, pid = begin(server, "sleeps for ever")
    with sock:
        os.kill(watch.fork_server(server), signal.SIGKILL)
        assert watch.cut(sock)
    died = death(server, pid)
    assert (died["cause"], died["generation"]) == ("timeout after 1 s (SIGKILL)", 1)
    assert "in sleeps_for_ever" in died["stack"]


@pytest.mark.parametrize("then", ["reload", "suspend", "stop"])
def test_it_holds_after_a_reload_while_suspended_and_during_a_stop(prefork_server: Start, then: str) -> None:
    server = prefork_server("stuck:loop", folder=HANDLERS, workers=1, timeout=1, graceful_timeout=60)
    sock, pid = begin(server, "sleeps for ever")
    with sock:
        if then == "stop":
            with watch.soon("a stop that waits for a hung connection"):
                assert server.stop() == 0
        else:
            assert server.command(then)["ok"]
            assert death(server, pid)["cause"] == "timeout after 1 s (SIGKILL)"
        assert watch.cut(sock)
    assert "in sleeps_for_ever" in server.log()


# -- crashed


@pytest.mark.parametrize(
    ("deed", "signo", "where"),
    [
        ("reads at zero", signal.SIGSEGV, "in reads_at_zero"),
        ("aborts", signal.SIGABRT, "in aborts"),
        ("kills itself with sigbus", signal.SIGBUS, "in kills_itself_with_sigbus"),
    ],
)
def test_the_stack_of_a_crash_is_told(prefork_server: Start, deed: str, signo: signal.Signals, where: str) -> None:
    server = prefork_server("stuck:loop", folder=HANDLERS, workers=2, log_format="json")
    sock, pid = begin(server, deed)
    with sock:
        assert watch.cut(sock)
    died = death(server, pid)
    assert died["cause"] == f"signal {signo} ({signo.name})"
    assert died["stack"].startswith("Fatal Python error: ")
    assert where in died["stack"]
    [entry] = [entry for entry in log_schema.read(server.log()) if entry["event"] == "worker_died"]
    assert entry["text"] == died["stack"]


def test_crashes_one_after_the_other_have_whole_stacks_of_their_own(prefork_server: Start) -> None:
    server = prefork_server("stuck:loop", folder=HANDLERS, workers=4)
    pids = {}
    for number in range(24):
        sock, pid = begin(server, "aborts" if number % 2 else "reads at zero")
        pids[pid] = "in aborts" if number % 2 else "in reads_at_zero"
        with sock:
            assert watch.cut(sock)  # while its end is still on its way the next one crashes
    for pid, where in pids.items():
        stack = death(server, pid)["stack"]
        assert stack.count("Fatal Python error") == stack.count("Extension modules") == stack.count(where) == 1


def test_handlers_that_user_code_has_replaced_are_back_for_the_next_connection(prefork_server: Start) -> None:
    server = prefork_server("stuck:loop", folder=HANDLERS, workers=1, max_workers=1, timeout=1)
    for deed, where in (("reads at zero", "in reads_at_zero"), ("sleeps for ever", "in sleeps_for_ever")):
        first, before = begin(server, "replaces the handlers")
        with first:
            assert first.makefile("rb").read() == b"done\n"
        sock, pid = begin(server, deed)
        with sock:
            assert pid == before
            assert watch.cut(sock)
        assert where in death(server, pid)["stack"]


def test_a_handlers_child_tells_nothing_and_writes_to_nobodys_file(prefork_server: Start, module: Module) -> None:
    source = (
        "import os\n"
        "def loop(sock):\n"
        "    if sock.recv(64) == b'child' and os.fork() == 0:\n"
        "        for _ in range(32):\n"  # one of them gets the number of the pipe that was closed
        "            os.open('file', os.O_WRONLY | os.O_CREAT | os.O_APPEND)\n"
        "        os.abort()\n"
        "    elif os.wait():\n"
        "        sock.sendall(b'done')\n"
    )
    folder = module(source)
    server = prefork_server("mine:loop", folder=folder, workers=1)
    with server.connect() as sock:
        sock.sendall(b"child")
        assert sock.recv(64) == b"done"
    assert (folder / "file").read_bytes() == b""
    assert "Fatal Python error" not in server.log()


def test_faulthandler_is_left_to_user_code_that_uses_it(prefork_server: Start, module: Module) -> None:
    source = "import faulthandler, os\nfaulthandler.enable()\ndef loop(sock):\n    sock.recv(1)\n    os.abort()\n"
    server = prefork_server("mine:loop", folder=module(source), workers=1)
    with server.connect() as sock:
        sock.sendall(b"x")
        assert watch.cut(sock)
    watch.logged(server, "died: signal 6 (SIGABRT)")
    assert server.status()["deaths"][0]["stack"] is None
    assert server.log().count("Fatal Python error: Aborted") == 1, "on standard error, where it wants it"


def test_a_worker_that_crashes_at_its_start_is_told_with_its_stack(prefork_server: Start, module: Module) -> None:
    server = prefork_server("mine:loop", folder=module("def loop(sock): pass\n"), workers=1)
    module("import os\nos.register_at_fork(after_in_child=os.abort)\ndef loop(sock): pass\n")
    refused = server.command("reload")
    assert not refused["ok"]
    assert "died before it was ready: signal 6 (SIGABRT)" in refused["reason"]
    assert "Fatal Python error: Aborted" in refused["reason"]
