"""accept() that fails: for want of descriptors, for good, and because a handler has spoilt the socket that all share.

Whatever it is, the pool has its acceptors again, the clients that come later are served, and it is told.
"""

import errno
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefork.testing import Server, connect, serve
from tests import watch
from tests.conftest import HANDLERS
from tests.faults.refusals import refusals

Start = Callable[..., Server]
Module = Callable[[str], Path]

LEAKS = """
import socket
kept = []
def loop(sock):
    sock.sendall(sock.recv(100))
    sock.shutdown(socket.SHUT_WR)
    kept.append(sock.detach())
"""
TOO_MANY = os.strerror(errno.EMFILE)
FORBIDDEN = os.strerror(errno.EPERM)


def ask(server: Server, said: bytes = b"hello") -> None:
    """Be one client that is served."""
    with server.connect() as sock:
        sock.sendall(said)
        assert sock.recv(64) == said


def backoff(server: Server) -> str:
    """Why nothing is tried just now; an empty text when nothing is backed off from."""
    return str((server.status()["backoff"] or {}).get("reason", ""))


# -- descriptors


def test_a_handler_that_leaks_descriptors_costs_a_fork_whenever_its_worker_is_full(prefork_server: Start, module: Module) -> None:
    server = prefork_server("mine:loop", folder=module(LEAKS), workers=2, max_workers=8, rlimit="nofile=32")
    for _ in range(150):  # two workers hold fewer than 60
        ask(server)
    totals = watch.quiet(server)
    assert (totals["ok"], totals["killed"]) == (150, 0)
    log = watch.logged(server, "could not accept any more and is replaced")
    assert f"exit status 71: accept failed: {TOO_MANY} (RLIMIT_NOFILE is 32); 1 so far" in log
    assert server.status()["deaths"][0]["cause"] == f"exit status 71: accept failed: {TOO_MANY} (RLIMIT_NOFILE is 32)"
    assert backoff(server) == ""


@pytest.mark.parametrize("more", [{}, {"max_connections": 1}], ids=["for ever", "once"])
def test_a_worker_that_may_open_nothing_any_more_is_replaced_after_its_connection(
    prefork_server: Start, more: dict[str, Any]
) -> None:
    server = prefork_server("spoiling:loop", folder=HANDLERS, workers=2, max_workers=8, spare_timeout=1, **more)
    for _ in range(10):
        ask(server, b"open nothing more")
    assert watch.quiet(server)["ok"] == 10
    watch.settled(server, 2)
    assert server.command("reload")["ok"]
    ask(server)


def test_workers_that_never_get_a_descriptor_are_backed_off_from(prefork_server: Start) -> None:
    server = prefork_server("spoiling:loop", folder=HANDLERS, workers=2, on_worker_start="spoiling:open_nothing_more")
    watch.until("it is told", lambda: TOO_MANY in backoff(server))
    assert backoff(server).startswith("a worker ended before it served anybody: exit status 71")
    status = server.status()
    assert status["totals"]["forked"] < 20
    assert status["listeners"][0]["workers"]["idle"] == 0


def test_a_worker_in_accept_is_retired_although_nothing_can_be_put_in_the_listeners_place(prefork_server: Start) -> None:
    server = prefork_server("spoiling:loop", folder=HANDLERS, workers=1, max_workers=1)
    before = watch.settled(server, 1)["workers"][0]["pid"]
    ask(server, b"leave one number")
    ask(server)
    assert watch.settled(server, 1)["workers"][0]["pid"] == before, "it does accept"
    assert server.command("reload")["ok"]
    watch.until("it has left", lambda: watch.is_gone(before))
    ask(server)
    assert "accept failed" not in server.log()


# The first worker to come here goes on to the gate, the others never do.
PARKS_ONE = """
def start():
    import time
    try:
        os.close(os.open("first", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        time.sleep(600)
    leave_one_number()
"""


def test_a_worker_at_the_gate_leaves_although_nothing_can_be_put_in_its_place(prefork_server: Start, module: Module) -> None:
    source = (HANDLERS / "spoiling.py").read_text()
    folder = module(source + "def start(): pass\n")
    server = prefork_server("mine:loop", folder=folder, workers=2, on_worker_start="mine:start")
    module(source + PARKS_ONE)
    os.kill(server.pid, signal.SIGHUP)
    parked = watch.until("one is at the gate", lambda: _parked(server))
    os.kill(parked, signal.SIGTERM)
    watch.until("it has left", lambda: watch.is_gone(parked))
    assert "internal error" not in server.log()
    ask(server)


def _parked(server: Server) -> int | None:
    return next((worker["pid"] for worker in watch.workers(server) if worker["generation"] == 2 and worker["since"]), None)


# -- what the machine lacks, and what is forbidden


def test_workers_wait_for_what_the_machine_lacks_and_are_no_acceptors_meanwhile(tmp_path: Path) -> None:
    with (
        refusals(tmp_path) as orders,
        serve("echo:loop", workers=2, max_workers=2, environment=orders.environment) as server,
    ):
        # A worker may be in accept() before the master has heard of its fork.
        watch.until("both forks are counted", lambda: watch.settled(server, 2)["totals"]["forked"] == 2)
        orders.accepts(errno.ENFILE, 1_000_000)
        for _ in range(2):  # whoever has waited in accept() already is served first
            ask(server)
        watch.until("all pause", lambda: server.status()["listeners"][0]["workers"]["paused"] == 2)
        watch.until("it is told", lambda: "accept fails in 2 workers" in backoff(server))
        assert f"accept failed: {os.strerror(errno.ENFILE)}: see fs.file-max; trying again every 0.1 s" in server.log()
        counted = server.status()["listeners"][0]["workers"]
        assert (counted["starting"], counted["busy"], counted["retiring"]) == (0, 0, 0)
        orders.accepts(errno.ENFILE, 0)
        ask(server)
        watch.settled(server, 2)
        assert backoff(server) == ""
        assert server.status()["totals"]["forked"] == 2, "another worker could not have accepted either"


def test_an_accept_that_is_forbidden_for_good_ends_its_worker(prefork_server: Start) -> None:
    server = prefork_server("spoiling:loop", folder=HANDLERS, workers=2, max_workers=2)
    ask(server, b"forbid accept")
    log = watch.logged(server, "could not accept any more and is replaced")
    # RETRIES at once, PATIENCE in pauses, and the last.
    assert f"exit status 71: accept failed: {FORBIDDEN}, 104 times in a row; 1 so far" in log
    assert f"accept failed: {FORBIDDEN}: a sandbox forbids accept: allow it (SystemCallFilter= in a unit, " in log
    watch.settled(server, 2)
    for _ in range(20):
        ask(server)
    assert backoff(server) == ""


def test_workers_that_are_all_forbidden_to_accept_are_backed_off_from(prefork_server: Start) -> None:
    server = prefork_server("spoiling:loop", folder=HANDLERS, workers=2, on_worker_start="spoiling:forbid_accept")
    watch.until("it is told", lambda: f"accept failed: {FORBIDDEN}, 104 times in a row" in backoff(server))
    assert server.status()["totals"]["forked"] < 20


# -- the socket that all share


@pytest.mark.parametrize(
    ("order", "what"), [(b"make non-blocking", "O_NONBLOCK"), (b"give a timeout", "SO_RCVTIMEO")], ids=["non-blocking", "time-out"]
)
@pytest.mark.parametrize("bind", ["127.0.0.1:0", "unix"])
def test_a_listener_that_a_handler_lets_return_empty_handed_blocks_again(
    prefork_server: Start, tmp_path: Path, order: bytes, what: str, bind: str
) -> None:
    bind = f"unix:{tmp_path}/sock" if bind == "unix" else bind
    server = prefork_server("spoiling:loop", folder=HANDLERS, workers=2, max_workers=2, bind=bind)
    pids = {worker["pid"] for worker in watch.settled(server, 2)["workers"]}
    ask(server, order)
    watch.logged(server, f"a handler has set {what} on the listening socket, which all share: undone (1 so far)")
    for _ in range(100):
        ask(server)
    assert {worker["pid"] for worker in watch.settled(server, 2)["workers"]} == pids
    assert watch.quiet(server)["ok"] == 101


def test_a_time_out_that_connections_inherit_is_found_by_the_first_that_suffers(prefork_server: Start, module: Module) -> None:
    """Where clients come all the time no accept() ever runs into it."""
    source = (HANDLERS / "spoiling.py").read_text() + "SHORTLY = struct.pack('@ll', 600, 0)\n"
    source += "def fails(sock):\n    if sock.recv(64) == b'spoil': give_a_timeout()\n    raise BlockingIOError\n"
    server = prefork_server("mine:fails", folder=module(source), workers=1)
    with server.connect() as sock:
        sock.sendall(b"spoil")
        assert sock.recv(64) == b""
    watch.logged(server, "a handler has set SO_RCVTIMEO on the listening socket")


@pytest.mark.parametrize("bind", ["127.0.0.1:0", "127.0.0.1", "[::1]:0", ":0"])
def test_a_tcp_listener_that_a_handler_shuts_down_is_opened_again(prefork_server: Start, bind: str) -> None:
    bind = f"{bind}:{watch.free_port()}" if bind == "127.0.0.1" else bind
    server = prefork_server("spoiling:loop", folder=HANDLERS, workers=2, max_workers=2, bind=bind)
    watch.settled(server, 2)
    address = server.address
    for times in range(1, 3):
        ask(server, b"shut down")
        watch.logged(server, f"shutdown undone ({times} so far)")
        for _ in range(100):
            ask(server)
    status = watch.settled(server, 2)
    assert (server.address, status["generation"], status["totals"]["exited"]) == (address, 1, 0)
    assert server.stop() == 0
    assert watch.is_free(address[1])


@pytest.mark.parametrize("order", [b"shut down", b"connect elsewhere"])
def test_a_listener_that_can_not_be_put_right_is_opened_anew(prefork_server: Start, tmp_path: Path, order: bytes) -> None:
    bind = f"unix:{tmp_path}/sock?mode=0640" if order == b"shut down" else "127.0.0.1:0"
    server = prefork_server("spoiling:loop", folder=HANDLERS, workers=2, spare_timeout=1, bind=bind)
    address = server.address
    assert server.command("scale", workers="3")["ok"]
    os.kill(server.pid, signal.SIGSTOP)  # else it may open the listener again before that is connected elsewhere
    try:
        ask(server, order)
    finally:
        os.kill(server.pid, signal.SIGCONT)
    watch.logged(server, "it is opened anew; not again within 1.5 s")
    watch.logged(server, "generation 2 serves")
    for _ in range(100):
        ask(server)
    assert watch.settled(server, 3)["generation"] == 2, "what was scaled stays"
    assert server.address == address
    if order == b"shut down":
        assert (tmp_path / "sock").stat().st_mode & 0o777 == 0o640
    assert server.command("reload")["ok"]
    ask(server)
    assert server.stop() == 0
    assert not (tmp_path / "sock").exists()


def test_a_listener_that_no_client_reaches_any_more_is_put_right_by_a_reload(prefork_server: Start) -> None:
    """No accept() fails of it."""
    server = prefork_server("spoiling:loop", folder=HANDLERS, workers=2)
    address = server.address
    ask(server, b"hear nobody")
    assert server.command("reload")["ok"]
    ask(server)
    assert server.address == address


def test_a_stop_ends_well_whatever_a_handler_has_made_of_the_listener(tmp_path: Path) -> None:
    """Without the right to put a filter on it, or to have it leave its interface."""
    unprivileged = ["setpriv", "--bounding-set=-net_admin,-net_raw"] if os.geteuid() == 0 else []
    command = [*unprivileged, sys.executable, "-m", "prefork", "serve", "--module=spoiling:loop", "--workers=2"]
    with watch.running([*command, "--bind=127.0.0.1:0"], HANDLERS, tmp_path) as server:
        host, _, port = server.status()["listeners"][0]["address"].partition(":")
        os.kill(server.pid, signal.SIGSTOP)  # else it opens the listener anew
        try:
            with connect((host, int(port))) as sock:
                sock.sendall(b"bind and connect elsewhere")
                assert sock.recv(64) == b"bind and connect elsewhere"
            os.kill(server.pid, signal.SIGTERM)
        finally:
            os.kill(server.pid, signal.SIGCONT)
        assert server.stop() == 0
        assert "internal error" not in server.log()


HOLDS = """
def hold(sock):
    loop(sock)
    sock.recv(64)
"""


def test_a_stop_does_not_wait_for_the_queue_of_a_listener_that_was_shut_down(
    prefork_server: Start, module: Module, tmp_path: Path
) -> None:
    folder = module((HANDLERS / "spoiling.py").read_text() + HOLDS)
    bind = f"unix:{tmp_path}/sock"
    server = prefork_server("mine:hold", folder=folder, workers=1, max_workers=1, bind=bind, graceful_timeout="10m")
    with server.connect() as sock:
        sock.sendall(b"shut down")
        assert sock.recv(64) == b"shut down"
        os.kill(server.pid, signal.SIGTERM)
        watch.logged(server, "no longer listening on")
    watch.until("it has gone", lambda: watch.is_gone(server.pid))


@pytest.mark.slow
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX], ids=["TCP", "Unix"])
def test_somebody_elses_listener_that_was_shut_down_is_opened_again_or_told(tmp_path: Path, family: socket.AddressFamily) -> None:
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as service managers do
        listener.bind(("127.0.0.1", 0) if family == socket.AF_INET else f"{tmp_path}/theirs")
        listener.listen(16)
        bind = f"--bind=fd:{listener.fileno()}"
        command = [sys.executable, "-m", "prefork", "serve", "--module=spoiling:loop", "--workers=2", bind]
        with watch.running(command, HANDLERS, tmp_path, fds=(listener.fileno(),)) as server:
            _ask_at(listener, b"shut down")
            if family == socket.AF_INET:
                watch.logged(server, "shutdown undone (1 so far)")
                _ask_at(listener, b"hello")
            else:
                watch.logged(server, "which is another program's: have that open it anew")
                watch.until("workers are backed off from", lambda: os.strerror(errno.EINVAL) in backoff(server))
            assert server.log().count("another program's") == (family == socket.AF_UNIX)
    (tmp_path / "theirs").unlink(missing_ok=True)


def _ask_at(listener: socket.socket, said: bytes) -> None:
    with socket.socket(listener.family) as sock:
        sock.settimeout(watch.DEADLINE)
        sock.connect(listener.getsockname())
        sock.sendall(said)
        assert sock.recv(64) == said


# A child by C code, of which prefork's hooks do not hear: it has the listening socket, and accepts.
ACCEPTING_CHILD = """
import ctypes
def loop(sock):
    if sock.recv(64) != b"fork":
        sock.sendall(b"worker")
        return
    child = ctypes.CDLL(None).fork()
    if child:
        sock.sendall(str(child).encode())
        return
    with _listener() as listener:
        while True:
            try:
                taken, _ = listener.accept()
            except OSError:
                os._exit(0)
            taken.sendall(b"child")
            taken.close()
"""


def test_a_child_with_a_copy_of_the_listener_accepts_until_the_stop(prefork_server: Start, module: Module) -> None:
    folder = module((HANDLERS / "spoiling.py").read_text() + ACCEPTING_CHILD)
    server = prefork_server("mine:loop", folder=folder, workers=1, max_workers=1)
    with server.connect() as sock:
        sock.sendall(b"fork")
        child = int(sock.recv(64))
    assert server.command("reload")["ok"]
    watch.until("it takes a client", lambda: _answer(server) == b"child")
    assert server.stop() == 0
    watch.until("its accept has ended", lambda: watch.is_gone(child))


def _answer(server: Server) -> bytes:
    with server.connect() as sock:
        sock.sendall(b"who")
        try:
            return sock.recv(64)
        except ConnectionResetError:  # the child does not read first
            return b""
