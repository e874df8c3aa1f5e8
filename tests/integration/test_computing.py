"""Workers whose left-behind threads compute: healthy acceptors, and those that keep a client from being served."""

import os
import signal
from collections.abc import Callable
from contextlib import suppress

import pytest

from prefork.net import address, held
from prefork.system.standing import cpu_seconds
from prefork.testing import Server
from tests import watch
from tests.conftest import HANDLERS
from tests.integration.test_timeout import begin, death

Start = Callable[..., Server]


def leaves(server: Server, what: str) -> int:
    """A worker that waits for its next client beside a thread that computes; its pid."""
    sock, pid = begin(server, f"leaves a thread that {what}")
    with sock:
        assert sock.makefile("rb").read() == b"done\n"
    before = cpu_seconds(pid) or 0.0
    watch.until("the thread computes", lambda: (cpu_seconds(pid) or 0.0) > before + 0.2)
    return pid


def test_a_worker_that_hears_nothing_is_ended_after_a_reload_and_was_nobodys(prefork_server: Start) -> None:
    server = prefork_server("stuck:loop", folder=HANDLERS, workers=1, timeout=0.5)
    pid = leaves(server, "keeps the gil")
    assert server.command("reload")["ok"]
    watch.logged(server, f"has not left: worker 0 (pid {pid}) since 1 s, state ")
    watch.logged(server, "is killed, serving nobody: it was asked to leave")
    watch.until("it has gone", lambda: watch.is_gone(pid))
    totals = watch.quiet(server)
    assert (totals["accepted"], totals["ok"], totals["killed"]) == (1, 1, 0)


def test_one_that_was_stopped_is_named_and_nothing_waits_for_it(prefork_server: Start) -> None:
    server = prefork_server("tiny:who", folder=HANDLERS, workers=2, timeout=0.5)
    pid = watch.settled(server, 2)["workers"][1]["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        assert server.command("suspend")["overdue"] == 1
        [late] = server.status()["overdue"]
        assert (late["pid"], late["what"]) == (pid, "asked to leave")
        assert "state T (stopped)" in watch.logged(server, "has not left", times=2)  # its time-out is long over
        assert server.command("resume")["ok"]
        assert server.command("scale", workers="1")["ok"]
        assert server.command("reload")["ok"]
        assert not watch.is_gone(pid)
    finally:
        os.kill(pid, signal.SIGCONT)
    watch.until("it has left", lambda: not server.status()["overdue"])
    assert "is killed" not in server.log()


@pytest.mark.slow
def test_a_client_that_a_worker_has_accepted_and_can_not_serve_is_cut_and_counted(prefork_server: Start) -> None:
    server = prefork_server("stuck:loop", folder=HANDLERS, workers=1, timeout=1)
    pid = leaves(server, "keeps the gil")
    with server.connect() as sock:
        name = "{}:{}".format(*sock.getsockname())
        host, _, port = server.status()["listeners"][0]["address"].rpartition(":")
        where = address.parse(f"{host}:{port}")
        watch.until("it has accepted", lambda: (seen := held.connections(pid, where)) is None or len(seen) == 1)
        if held.connections(pid, where) is None:
            pytest.skip("nobody may look into another process' descriptors here (pidfd_getfd)")
        assert server.status()["totals"]["serving"] == 0
        # A pool that is at rest is not looked at. One more acceptor serves other clients meanwhile.
        assert server.command("scale", workers="2")["ok"]
        with suppress(ConnectionResetError):
            assert sock.recv(1) == b""
    died = death(server, pid)
    assert (died["cause"], died["peer"]) == ("timeout after 1 s (SIGKILL)", name)
    totals = watch.quiet(server)
    assert (totals["accepted"], totals["ok"], totals["killed"]) == (2, 1, 1)
    assert watch.identity_holds(totals)
    with server.connect() as sock:
        assert sock.recv(64)


@pytest.mark.slow
def test_an_acceptor_beside_a_thread_that_computes_is_left_alone(prefork_server: Start) -> None:
    server = prefork_server("stuck:loop", folder=HANDLERS, workers=1, timeout=1)
    pid = leaves(server, "computes")
    for number in range(8):
        # Each is a look, and within the next second there is another.
        assert server.command("scale", workers=str(1 + number % 2))["ok"]
        before = cpu_seconds(pid) or 0.0
        watch.until("it has computed for longer", lambda before=before: (cpu_seconds(pid) or 0.0) > before + 0.5)  # type: ignore[misc]
    assert "says that it waits" not in server.log()
    assert watch.quiet(server)["killed"] == 0
