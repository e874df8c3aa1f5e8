"""Suspend and resume: nobody accepts, the kernel's queue holds clients, and none of them is lost."""

import os
import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from prefork.testing import Server, connect
from tests import watch
from tests.conftest import HANDLERS, Gate
from tests.load import Load

Start = Callable[..., Server]


def waiting(server: Server, sock: socket.socket) -> bool:
    """Whether the client has been connected by the kernel, and nobody has answered it."""
    sock.settimeout(0)
    try:
        return not sock.recv(1)
    except BlockingIOError:
        return bool(server.status()["listeners"][0]["queue"])
    finally:
        sock.settimeout(watch.DEADLINE)


def test_while_suspended_clients_wait_and_after_it_they_are_served(prefork_server: Start) -> None:
    server = prefork_server("tiny:who", folder=HANDLERS, workers=2, spare_timeout=1)
    with ExitStack() as stack:
        held = stack.enter_context(server.connect())
        busy = int(held.recv(64))
        answer = server.command("suspend")
        assert (answer["ok"], answer["busy"]) == (True, 1)
        watch.until("the others have gone", lambda: [w["pid"] for w in watch.workers(server)] == [busy])
        assert server.status()["state"] == "suspended"
        clients = [stack.enter_context(server.connect()) for _ in range(3)]
        watch.until("they wait in the queue", lambda: server.status()["listeners"][0]["queue"] == 3)
        assert waiting(server, clients[0])
        held.sendall(b"go on")
        assert not watch.is_gone(busy)
        assert server.command("resume")["ok"]
        assert [int(client.recv(64)) > 0 for client in clients] == [True] * 3
        assert server.status()["state"] == "running"
    watch.until("the suspended worker has left after its connection", lambda: watch.is_gone(busy))
    watch.settled(server, 2)
    assert watch.quiet(server)["ok"] == 4


def test_twice_is_once(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=1)
    assert server.command("resume")["ok"]
    assert server.command("suspend")["ok"]
    assert server.command("suspend")["ok"]
    assert server.log().count("suspended: nobody accepts") == 1
    assert server.command("resume")["ok"]
    watch.settled(server, 1)


def test_a_reload_a_scale_and_a_dead_fork_server_leave_it_suspended(prefork_server: Start) -> None:
    server = prefork_server("tiny:who", folder=HANDLERS, workers=2, spare_timeout=1)
    assert server.command("suspend")["ok"]
    with server.connect() as sock:
        assert server.command("reload")["ok"]
        assert server.command("scale", workers="3")["ok"]
        os.kill(watch.fork_server(server), signal.SIGKILL)
        watch.logged(server, "generation 3 serves")
        watch.until("it is suspended again", lambda: server.status()["state"] == "suspended" and not watch.workers(server))
        assert waiting(server, sock)
        assert server.command("resume")["ok"]
        assert sock.recv(64)
    watch.settled(server, 3)
    assert watch.quiet(server)["ok"] == 1


def test_a_stop_serves_those_who_wait(prefork_server: Start) -> None:
    server = prefork_server("tiny:obey", folder=HANDLERS, workers=2)
    assert server.command("suspend")["ok"]
    with ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in range(5)]
        for client in clients:
            client.sendall(b"hello\n")
        os.kill(server.pid, signal.SIGTERM)
        assert [client.recv(64).split()[1:] for client in clients] == [[b"hello"]] * 5
    assert server.stop() == 0
    assert "stopped: 5 connections accepted, 0 cut" in server.log()


@pytest.mark.parametrize("rounds", [10])
def test_suspending_and_resuming_under_load_loses_nobody(prefork_server: Start, rounds: int) -> None:
    server = prefork_server("echo:loop", workers=4, spare_timeout=1)
    with Load(server.address, clients=4) as load:
        for _ in range(rounds):
            assert server.command("suspend")["ok"]
            before = load.connections
            assert server.command("resume")["ok"]
            watch.until("clients are served again", lambda before=before: load.connections > before + 10)  # type: ignore[misc]
    assert not load.failures, load.classes
    watch.settled(server, 4)
    totals = watch.quiet(server)
    assert totals["accepted"] == totals["ok"] == load.connections


def test_clients_of_an_address_that_is_removed_meanwhile_are_served(prefork_server: Start, tmp_path: Path) -> None:
    stays, goes, file = watch.free_port(), watch.free_port(), tmp_path / "prefork.toml"
    file.write_text(f"bind = ['127.0.0.1:{stays}', '127.0.0.1:{goes}']")
    server = prefork_server("tiny:obey", folder=HANDLERS, bind=[], workers=1, arguments=("--config", str(file)))
    assert server.command("suspend")["ok"]
    with connect(("127.0.0.1", stays)) as waits, connect(("127.0.0.1", goes)) as last:
        last.sendall(b"hello\n")
        waits.sendall(b"hello\n")
        file.write_text(f"bind = ['127.0.0.1:{stays}']")
        assert server.command("reload")["ok"]
        assert last.recv(64).endswith(b"hello\n")
        watch.logged(server, f"no longer listening on 127.0.0.1:{goes}")
        assert server.status()["state"] == "suspended"
        assert waiting(server, waits)
        assert server.command("resume")["ok"]
        assert waits.recv(64).endswith(b"hello\n")


def test_a_stop_serves_those_who_wait_when_the_fork_server_is_dead(prefork_server: Start, gate: Gate) -> None:
    server = prefork_server("gated:loop", folder=HANDLERS, workers=2, environment=gate.environment)
    assert server.command("suspend")["ok"]
    with ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in range(5)]
        for client in clients:
            client.sendall(b"hello")
        with gate.closed():
            os.kill(watch.fork_server(server), signal.SIGKILL)
            os.kill(server.pid, signal.SIGTERM)
            watch.logged(server, "stopping (SIGTERM)")
        for client in clients:
            assert client.recv(64) == b"hello"
            client.close()
    assert server.stop() == 0
    assert "stopped: 5 connections accepted, 0 cut" in server.log()


def test_a_reload_says_that_nobody_accepts(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=1)
    assert server.command("suspend")["ok"]
    assert server.command("reload") == {"ok": True, "generation": 2, "suspended": True}


def test_a_stop_with_a_dead_fork_server_serves_one_address_when_another_is_closed_already(
    prefork_server: Start, gate: Gate
) -> None:
    quiet, waited_for = watch.free_port(), watch.free_port()
    server = prefork_server(
        "gated:loop",
        folder=HANDLERS,
        bind=[f"127.0.0.1:{quiet}", f"127.0.0.1:{waited_for}"],
        workers=1,
        environment=gate.environment,
    )
    assert server.command("suspend")["ok"]
    os.kill(server.pid, signal.SIGSTOP)
    with connect(("127.0.0.1", waited_for)) as sock:
        sock.sendall(b"hello")
        with gate.closed():
            os.kill(watch_fork_server_of_stopped(server), signal.SIGKILL)
            os.kill(server.pid, signal.SIGTERM)
            os.kill(server.pid, signal.SIGCONT)
            watch.logged(server, f"no longer listening on 127.0.0.1:{quiet}")
        assert sock.recv(64) == b"hello"
    assert server.stop() == 0
    assert "internal error" not in server.log()
    assert "stopped: 1 connection accepted, 0 cut" in server.log()


def watch_fork_server_of_stopped(server: Server) -> int:
    """A stopped master can't be asked: its only child is the fork server."""
    [child] = psutil.Process(server.pid).children()
    return child.pid


def test_a_stop_during_a_reload_serves_those_who_wait_when_the_fork_server_is_dead(prefork_server: Start, gate: Gate) -> None:
    server = prefork_server("gated:loop", folder=HANDLERS, workers=2, environment=gate.environment)
    assert server.command("suspend")["ok"]
    with ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in range(3)]
        for client in clients:
            client.sendall(b"hello")
        fork_server = watch.fork_server(server)
        with gate.closed():
            os.kill(server.pid, signal.SIGHUP)
            watch.until("it reloads", lambda: server.status()["state"] == "reloading")
            os.kill(fork_server, signal.SIGKILL)
            watch.logged(server, "died (signal 9 (SIGKILL))")
            os.kill(server.pid, signal.SIGTERM)
            watch.logged(server, "stopping (SIGTERM)")
        for client in clients:
            assert client.recv(64) == b"hello"
            client.close()
    assert server.stop() == 0
    assert "stopped: 3 connections accepted, 0 cut" in server.log()
