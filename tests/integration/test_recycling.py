"""Recycling: a worker leaves when it has done its share, and only after somebody else accepts in its place."""

import collections
import itertools
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from prefork.testing import Server
from tests import watch
from tests.conftest import HANDLERS, Gate

Start = Callable[..., Server]
Module = Callable[[str], Path]

WHO = """
import os
def loop(sock):
    sock.sendall(b"%d" % os.getpid())
"""
# A worker's start waits as long as somebody holds the gate.
GATED_START = """
import fcntl, os
def wait():
    with open(os.environ["GATE"]) as gate:
        fcntl.flock(gate, fcntl.LOCK_SH)
os.register_at_fork(after_in_child=wait)
def loop(sock):
    sock.sendall(b"%d" % os.getpid())
"""


def pid(server: Server) -> int:
    with server.connect() as sock:
        return int(sock.makefile("rb").read())


@pytest.mark.slow  # it waits for seconds
@pytest.mark.parametrize("max_workers", [1, 4])
def test_a_worker_waits_for_its_replacement_and_serves_on_when_that_does_not_come(
    prefork_server: Start, module: Module, gate: Gate, max_workers: int
) -> None:
    folder = module(GATED_START)
    server = prefork_server(
        "mine:loop", folder=folder, workers=1, max_workers=max_workers, max_connections=2, environment=gate.environment
    )
    with gate.closed():
        worn = pid(server)
        assert pid(server) == worn
        watch.until("its replacement starts", lambda: len(watch.family(server.pid)) == 3)
        assert [pid(server) for _ in range(3)] == [worn] * 3
    watch.until("it has left", lambda: watch.is_gone(worn))
    status = watch.settled(server, 1)
    assert (status["totals"]["ok"], status["totals"]["killed"], status["deaths"]) == (5, 0, [])


def test_an_old_worker_serves_on_until_its_replacement_is_ready(prefork_server: Start, module: Module, gate: Gate) -> None:
    folder = module(GATED_START)
    server = prefork_server("mine:loop", folder=folder, workers=1, max_lifetime=0.0001, environment=gate.environment)
    with gate.closed():
        worn = pid(server)
        watch.until("its replacement starts", lambda: len(watch.family(server.pid)) == 3 or watch.is_gone(worn))
        assert not watch.is_gone(worn)
        assert [pid(server) for _ in range(3)] == [worn] * 3
    watch.until("it has left", lambda: watch.is_gone(worn))
    watch.settled(server, 1)


def test_at_the_ceiling_there_is_never_more_than_one_process_more(prefork_server: Start, module: Module, gate: Gate) -> None:
    folder = module(GATED_START)
    server = prefork_server("mine:loop", folder=folder, workers=3, max_workers=3, max_lifetime=0.0001, environment=gate.environment)
    with gate.closed():
        pid(server)
        watch.until("a replacement starts", lambda: len(watch.family(server.pid)) == 5)
        for _ in range(30):  # each of the three is to be recycled now
            pid(server)
            assert len(watch.family(server.pid)) == 5
    watch.settled(server, 3)


def test_a_worker_that_serves_once_serves_nobody_else_though_nothing_can_take_its_place(
    prefork_server: Start, module: Module, gate: Gate
) -> None:
    server = prefork_server("mine:loop", folder=module(GATED_START), workers=1, max_connections=1, environment=gate.environment)
    with gate.closed():
        first = pid(server)
        watch.until("it has left", lambda: watch.is_gone(first))
        waiting = server.connect()
        assert not watch.readable(waiting, 0.1)
    with waiting:
        assert int(waiting.makefile("rb").read()) != first
    totals = watch.quiet(server)
    assert (totals["ok"], totals["killed"], totals["accepted"]) == (2, 0, 2)
    assert server.status()["deaths"] == []


GATED_IMPORT = """
import fcntl, os
with open(os.environ["GATE"]) as gate:
    fcntl.flock(gate, fcntl.LOCK_SH)
def loop(sock):
    sock.sendall(b"%d" % os.getpid())
"""


def test_workers_serve_on_while_there_is_no_fork_server(prefork_server: Start, module: Module, gate: Gate) -> None:
    folder = module(GATED_IMPORT)
    server = prefork_server("mine:loop", folder=folder, workers=2, max_connections=3, environment=gate.environment)
    before = {worker["pid"] for worker in watch.settled(server, 2)["workers"]}
    with gate.closed():
        os.kill(watch.fork_server(server), signal.SIGKILL)
        watch.logged(server, "fork server")
        served = collections.Counter(pid(server) for _ in range(12))
        assert set(served) <= before
    for worker in before:
        watch.until("it has left", lambda worker=worker: watch.is_gone(worker))  # type: ignore[misc]
    watch.settled(server, 2)
    assert watch.quiet(server)["ok"] == 12


def test_workers_that_serve_once_leave_clients_in_the_queue_while_there_is_no_fork_server(
    prefork_server: Start, module: Module, gate: Gate
) -> None:
    folder = module(GATED_IMPORT)
    server = prefork_server("mine:loop", folder=folder, workers=2, max_connections=1, environment=gate.environment)
    before = {worker["pid"] for worker in watch.settled(server, 2)["workers"]}
    with gate.closed():
        os.kill(watch.fork_server(server), signal.SIGKILL)
        watch.logged(server, "fork server")
        assert {pid(server), pid(server)} == before
        waiting = server.connect()
        watch.logged(server, "no worker can be forked (its fork server has ended): new clients wait")
        watch.until("it is counted", lambda: server.status()["stalled_seconds"] > 0.1)
        assert not watch.readable(waiting, 0)
    with waiting:
        assert int(waiting.makefile("rb").read()) not in before
    assert watch.quiet(server)["ok"] == 3
    assert server.log().count("no worker can be forked") == 1
    status = server.status()
    assert (status["stalled_since"], status["stalled_seconds"] > 0, status["saturated_seconds"]) == (None, True, 0)


@pytest.mark.parametrize(("limit", "clients", "each"), [(1, 4, 20), (1, 64, 2), (10, 4, 100), (10, 64, 10)])
def test_under_load_no_worker_serves_more(prefork_server: Start, module: Module, limit: int, clients: int, each: int) -> None:
    server = prefork_server("mine:loop", folder=module(WHO), workers=4, max_connections=limit)

    def client() -> list[int]:
        return [int(pid(server)) for _ in range(each)]

    with ThreadPoolExecutor(clients) as pool:
        pids = [future.result() for future in [pool.submit(client) for _ in range(clients)]]
    served = collections.Counter(itertools.chain.from_iterable(pids))
    assert max(served.values()) <= limit
    totals = watch.quiet(server)
    assert (totals["ok"], totals["accepted"]) == (clients * each, clients * each)


def test_workers_that_serve_once_do_so_during_an_upgrade(prefork_server: Start, module: Module) -> None:
    server = prefork_server("mine:loop", folder=module(WHO), workers=2, max_connections=1)
    done = threading.Event()

    def client() -> list[int]:
        seen = []
        while not done.is_set():
            seen.append(pid(server))
        return seen

    with ThreadPoolExecutor(3) as pool:
        clients = [pool.submit(client) for _ in range(3)]
        try:
            number = server.command("upgrade")["upgrade"]
            assert server.command("outcome", upgrade=number)["ok"]
        finally:
            done.set()
    served = collections.Counter(itertools.chain.from_iterable(future.result() for future in clients))
    assert set(served.values()) == {1}
    assert watch.quiet(server)["ok"] == len(served)


def test_a_worker_leaves_after_its_number_of_connections(prefork_server: Start) -> None:
    # At its ceiling: else another worker would serve, too, whenever the first takes its time.
    server = prefork_server("tiny:who", folder=HANDLERS, workers=1, max_workers=1, max_connections=3, log_level="debug")
    served: dict[int, int] = {}
    for number in range(1, 13):
        with server.connect() as sock:
            worker = int(sock.recv(64))
        served[worker] = served.get(worker, 0) + 1
        if number % 3 == 0:
            watch.until("it has left", lambda gone=worker: watch.is_gone(gone))  # type: ignore[misc]
    assert list(served.values()) == [3, 3, 3, 3]
    assert "is recycled" in server.log()


def test_jitter_makes_the_number_another_for_each_worker(prefork_server: Start) -> None:
    server = prefork_server("tiny:who", folder=HANDLERS, workers=1, max_connections=1, max_connections_jitter=20)
    served: dict[int, int] = {}
    while len(served) < 9:
        with server.connect() as sock:
            worker = int(sock.recv(64))
        served[worker] = served.get(worker, 0) + 1
    # Eight equal draws out of 21 come once in 21**7 times.
    assert len(set(list(served.values())[:-1])) > 1


def test_a_worker_that_serves_for_long_is_replaced_at_once_and_leaves_after_its_connection(prefork_server: Start) -> None:
    server = prefork_server("tiny:who", folder=HANDLERS, workers=1, max_connections=1)
    with server.connect() as held:
        first = int(held.recv(64))
        assert [w["pid"] for w in watch.settled(server, 1)["workers"] if w["state"] == "busy"] == [first]
        held.sendall(b"still here")
        assert not watch.is_gone(first)
    watch.until("it has left", lambda: watch.is_gone(first))
    watch.settled(server, 1)


def test_a_worker_that_is_too_old_leaves_after_its_connection(prefork_server: Start) -> None:
    server = prefork_server("tiny:who", folder=HANDLERS, workers=1, max_lifetime=0.2)
    with server.connect() as sock:
        first = int(sock.recv(64))
        watch.until("it is old enough", lambda: server.status()["uptime"] > 0.6)
        assert not watch.is_gone(first), "an idle or serving worker is left alone"
    watch.until("it has left", lambda: watch.is_gone(first))
    assert watch.settled(server, 1)["totals"]["ok"] == 1


def test_a_worker_that_is_too_large_leaves_after_its_connection(prefork_server: Start, module: Module) -> None:
    source = (
        "import os\nkept = []\n"
        "def loop(sock):\n"
        "    if sock.recv(64) == b'grow':\n"
        "        kept.append(b'x' * (64 << 20))\n"
        "    sock.sendall(b'%d' % os.getpid())\n"
    )
    server = prefork_server("mine:loop", folder=module(source), workers=1, max_workers=1, max_memory="70M")

    def asked(what: bytes) -> int:
        with server.connect() as sock:
            sock.sendall(what)
            return int(sock.recv(64))

    first = asked(b"stay")
    assert asked(b"stay") == first
    assert asked(b"grow") == first
    watch.until("it has left", lambda: watch.is_gone(first))
    assert asked(b"stay") != first


def test_at_the_ceiling_recycling_goes_on_while_a_recycled_worker_still_serves(prefork_server: Start) -> None:
    server = prefork_server("tiny:who", folder=HANDLERS, workers=2, max_workers=2, max_connections=3)
    with server.connect() as held:
        # It takes the one place beyond the ceiling, for as long as it likes.
        slow = int(held.recv(64))
        served: dict[int, int] = {}

        def serve_one() -> bool:
            with server.connect() as sock:
                worker = int(sock.recv(64))
            served[worker] = served.get(worker, 0) + 1
            return len(served) == 6

        watch.until("six workers have come and gone", serve_one)
        assert not watch.is_gone(slow)
    watch.settled(server, 2)


def test_a_handler_that_has_used_up_its_descriptors_is_too_large(prefork_server: Start, module: Module) -> None:
    source = (
        "import os\nkept = []\n"
        "def loop(sock):\n"
        "    sock.sendall(b'%d' % os.getpid())\n"
        "    if sock.recv(64) == b'all':\n"
        "        try:\n"
        "            while True:\n"
        "                kept.append(os.open('/dev/null', os.O_RDONLY))\n"
        "        except OSError:\n"
        "            kept.append(sock.detach())\n"
    )
    server = prefork_server("mine:loop", folder=module(source), workers=1, max_memory="1G", rlimit="nofile=64")
    with server.connect() as sock:
        first = int(sock.recv(64))
        sock.sendall(b"all")
    watch.until("it has left", lambda: watch.is_gone(first))
    watch.settled(server, 1)
    assert "internal error" not in server.log()
