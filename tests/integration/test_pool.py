"""The pool: a constant number of acceptors, whatever handlers and signals do to the workers."""

import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from prefork.testing import Server, connect
from tests import watch
from tests.conftest import HANDLERS

Start = Callable[..., Server]


def hold(stack: ExitStack, server: Server, count: int) -> list[socket.socket]:
    """So many connections that a worker each is serving."""
    held = [stack.enter_context(server.connect()) for _ in range(count)]
    for sock in held:
        assert sock.recv(64)
    return held


def test_a_worker_that_is_killed_is_replaced_at_once(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=3)
    status = watch.settled(server, 3)
    victim = status["workers"][0]["pid"]
    os.kill(victim, signal.SIGKILL)
    watch.until("it has gone from the status", lambda: victim not in [w["pid"] for w in watch.workers(server)])
    status = watch.settled(server, 3)
    assert [(d["pid"], d["cause"], d["peer"]) for d in status["deaths"]] == [(victim, "signal 9 (SIGKILL)", None)]
    assert "died: signal 9 (SIGKILL), serving nobody" in server.log()


def test_a_worker_whose_handler_blocks_is_replaced(prefork_server: Start) -> None:
    server = prefork_server("tiny:who", folder=HANDLERS, workers=2)
    with ExitStack() as stack:
        hold(stack, server, 5)
        status = watch.settled(server, 2)
        assert status["totals"]["serving"] == 5
        assert status["listeners"][0]["workers"]["busy"] == 5
        peers = {w["peer"] for w in status["workers"] if w["state"] == "busy"}
        assert len(peers) == 5


def test_at_the_ceiling_clients_wait_in_the_queue_and_are_served(prefork_server: Start) -> None:
    server = prefork_server("tiny:who", folder=HANDLERS, workers=2, max_workers=4)
    with ExitStack() as stack:
        held = hold(stack, server, 4)
        watch.logged(server, "no acceptor is left")
        late = stack.enter_context(server.connect())
        status = server.status()
        assert status["listeners"][0]["queue"] == 1
        assert len(watch.workers(server)) == 4
        assert status["started_at"] < status["saturated_since"] < time.time()
        held[0].close()
        assert late.recv(64)
        assert server.status()["saturated_seconds"] > 0
    watch.logged(server, "has acceptors again")
    watch.until("it is over", lambda: server.status()["ceiling_since"] is None)
    assert server.status()["saturated_since"] is None


def test_at_the_ceiling_with_acceptors_left_no_client_waits_and_that_is_what_is_told(prefork_server: Start) -> None:
    server = prefork_server("tiny:who", folder=HANDLERS, workers=4, max_workers=4)
    with ExitStack() as stack:
        hold(stack, server, 1)
        watch.logged(server, "fewer than workers = 4 can wait")
        status = server.status()
        assert (status["saturated_seconds"], status["saturated_since"]) == (0, None)
        assert status["ceiling_since"] is not None
        hold(stack, server, 2)
        assert server.status()["saturated_seconds"] == 0
        hold(stack, server, 1)
        begun = time.time()
        since = watch.until("it is saturated", lambda: server.status()["saturated_since"])
        assert since <= begun + 0.5, "who took the last acceptor has rung"
    log = watch.logged(server, "has all its acceptors again")
    assert (log.count("no acceptor is left"), log.count("fewer than workers = 4 can wait")) == (1, 1)


def test_clients_that_wait_for_want_of_a_fork_are_told_of_once_and_counted(
    prefork_server: Start, module: Callable[[str], object]
) -> None:
    folder = module(
        "import os\n"
        "os.register_at_fork(after_in_child=lambda: os._exit(3) if os.path.exists('broken') else None)\n"
        "def loop(sock):\n    sock.sendall(b'served')\n"
    )
    server = prefork_server("mine:loop", folder=folder, workers=2, max_connections=1)
    watch.settled(server, 2)
    broken = f"{folder}/broken"
    with open(broken, "w"):
        pass
    for _ in range(2):
        with server.connect() as sock:
            assert sock.recv(64)
    with server.connect() as waiting:
        log = watch.logged(server, "no worker can be forked")
        watch.until("it is counted", lambda: server.status()["stalled_seconds"] > 0.1)
        status = server.status()
        assert (status["saturated_seconds"], status["stalled_since"] is None) == (0, False)
        os.unlink(broken)
        assert waiting.recv(64)
    log = watch.logged(server, "s in which none could be forked")
    assert log.count("no worker can be forked") == 1
    assert server.status()["stalled_since"] is None


@pytest.mark.slow
def test_surplus_acceptors_go_after_spare_timeout_and_not_before(prefork_server: Start) -> None:
    server = prefork_server("tiny:who", folder=HANDLERS, workers=2, spare_timeout=1.5)
    with ExitStack() as stack:
        hold(stack, server, 4)
        watch.settled(server, 2)
        # The clients end after this: a whole period in which the surplus was not needed begins later still.
        about_to_end = time.monotonic()
    watch.until("four have left again", lambda: server.status()["totals"]["exited"] == 4)
    assert time.monotonic() - about_to_end >= 1.5
    totals = watch.settled(server, 2)["totals"]
    assert (totals["forked"], totals["ok"], totals["killed"]) == (6, 4, 0)


def test_each_listener_keeps_its_own_acceptors_when_another_takes_the_ceiling(prefork_server: Start) -> None:
    server = prefork_server("tiny:who", folder=HANDLERS, workers=2, max_workers=6, bind=["127.0.0.1:0", "[::1]:0"])
    with ExitStack() as stack:
        hold(stack, server, 4)
        watch.logged(server, "max_workers = 6 reached on 127.0.0.1")
        watch.settled(server, 2, listener=1)
        host, _, port = server.status()["listeners"][1]["address"].rpartition(":")
        with connect((host.strip("[]"), int(port))) as sock:
            assert sock.recv(64)


def test_workers_that_die_before_they_are_ready_are_tried_again_ever_more_seldom(
    prefork_server: Start, module: Callable[[str], object]
) -> None:
    folder = module(
        "import os\n"
        "os.register_at_fork(after_in_child=lambda: os._exit(3) if os.path.exists('broken') else None)\n"
        "def loop(sock):\n    pass\n"
    )
    server = prefork_server("mine:loop", folder=folder, workers=2)
    victim = watch.settled(server, 2)["workers"][0]["pid"]
    broken = f"{folder}/broken"
    with open(broken, "w"):
        pass
    os.kill(victim, signal.SIGKILL)
    log = watch.logged(server, "before it was ready: exit status 3")
    assert "1 in a row, next try in 1.5 s" in log
    backoff = server.status()["backoff"]
    assert "before it was ready" in backoff["reason"]
    assert backoff["until"] > time.time()
    os.unlink(broken)
    watch.settled(server, 2)
    assert server.status()["totals"]["forked"] <= 5
    watch.logged(server, "workers start again, after 1 failure")
    assert server.status()["backoff"] is None


def test_a_worker_stopped_by_somebody_is_no_acceptor(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=1)
    victim = watch.settled(server, 1)["workers"][0]["pid"]
    os.kill(victim, signal.SIGSTOP)
    watch.until("another takes its place", lambda: len(watch.workers(server, "idle")) == 2)
    # Who was stopped in accept() is still first in the kernel's row; it serves when it goes on.
    with server.connect() as first, server.connect() as second:
        for sock in (first, second):
            sock.sendall(b"hello")
        os.kill(victim, signal.SIGCONT)
        assert first.recv(5) == second.recv(5) == b"hello"
