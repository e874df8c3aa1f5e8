"""Workers that SIGKILL ends late or not at all: nothing else waits for them, and what is so is told."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from prefork.system import process
from prefork.testing import Server
from tests import watch
from tests.conftest import HANDLERS
from tests.integration.test_timeout import begin, death

Start = Callable[..., Server]

TIMEOUT = "timeout after 1 s (SIGKILL)"
# Attaches to a process, and does not wait for it any more: what is left of it after its end stays, until this one ends.
TRACER = """
import ctypes, os, sys
PTRACE_ATTACH = 16
pid = int(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
if libc.ptrace(PTRACE_ATTACH, pid, None, None) != 0:
    print(os.strerror(ctypes.get_errno()), flush=True)
    sys.exit()
os.waitpid(pid, 0)
print("traced", flush=True)
sys.stdin.read()
"""


@contextmanager
def traced(pid: int) -> Iterator[int]:
    """During the block a process of ours traces this one, which stands still. Gives the tracer's pid."""
    command = [sys.executable, "-c", TRACER, str(pid)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as tracer:
        assert tracer.stdin is not None
        assert tracer.stdout is not None
        said = tracer.stdout.readline().decode().strip()
        try:
            if said != "traced":
                pytest.skip(f"ptrace is not allowed here: {said}")
            yield tracer.pid
        finally:
            tracer.stdin.close()


def test_a_worker_that_sleeps_in_the_kernel_is_killed(prefork_server: Start, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    server = prefork_server("stuck:loop", folder=HANDLERS, workers=1, timeout=1, environment={"FIFO": str(fifo)})
    sock, pid = begin(server, "waits in vfork")
    with sock:
        watch.until("it is in state D", lambda: process.state(pid) == b"D")
        try:
            assert death(server, pid)["cause"] == TIMEOUT
        finally:
            os.close(os.open(fifo, os.O_RDWR))  # its child goes on, and closes what it has of the connection
        assert watch.cut(sock)
    assert watch.quiet(server)["killed"] == 1


def test_a_worker_that_others_keep_going_on_is_killed(prefork_server: Start) -> None:
    server = prefork_server("stuck:loop", folder=HANDLERS, workers=1, timeout=1)
    sock, pid = begin(server, "sleeps for ever")
    worker = os.pidfd_open(pid)  # the number may be given again

    def keep_it_going() -> None:
        with suppress(ProcessLookupError):
            while True:
                signal.pidfd_send_signal(worker, signal.SIGCONT)

    storm = threading.Thread(target=keep_it_going)
    storm.start()
    try:
        with sock:
            assert watch.cut(sock)
    finally:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(worker, signal.SIGKILL)  # the storm ends with it, whatever has failed
        storm.join()
        os.close(worker)
    assert death(server, pid)["cause"] == TIMEOUT


@pytest.mark.slow
def test_no_reload_upgrade_scale_or_suspend_waits_for_what_is_left_of_a_traced_worker(prefork_server: Start) -> None:
    server = prefork_server("stuck:loop", folder=HANDLERS, workers=1, timeout=1)
    sock, pid = begin(server, "sleeps for ever")
    with sock, traced(pid) as tracer:
        assert watch.cut(sock)
        watch.logged(server, f"(pid {pid}) since 1 s, state Z (zombie), traced by process {tracer}")
        [late] = server.status()["overdue"]
        assert (late["pid"], late["generation"], late["what"]) == (pid, 1, "killed")
        for command, options in (("reload", {}), ("scale", {"workers": "2"}), ("suspend", {}), ("resume", {}), ("reload", {})):
            assert server.command(command, **options)["ok"]
        number = server.command("upgrade")["upgrade"]
        assert server.command("outcome", upgrade=number)["ok"]
        watch.logged(server, f"(pid {pid}) since 1 s", times=2)  # by the new program
        assert [late["pid"] for late in server.status()["overdue"]] == [pid]
        assert [child.pid for child in watch.family(server.pid) if child.pid == pid] == [pid]
    assert death(server, pid)["cause"] == TIMEOUT
    assert server.status()["overdue"] == []
    totals = watch.quiet(server)
    assert (totals["killed"], totals["accepted"]) == (1, 1)


@pytest.mark.slow
def test_a_stop_does_not_wait_for_it_either_and_names_it(prefork_server: Start) -> None:
    server = prefork_server("stuck:loop", folder=HANDLERS, workers=1, timeout=1, graceful_timeout=3600)
    sock, pid = begin(server, "sleeps for ever")
    with sock, traced(pid):
        assert watch.cut(sock)
        assert server.stop() == 0
        assert f"can't be ended by us, and are left behind: {pid}" in server.log()
