"""Recycling: a worker leaves when it has done its share, and only after somebody else accepts in its place."""

from collections.abc import Callable
from pathlib import Path

import pytest

from prefork.testing import Server
from tests import watch
from tests.conftest import HANDLERS, Gate

Start = Callable[..., Server]
Module = Callable[[str], Path]

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


@pytest.mark.parametrize("max_workers", [1, 4])
def test_the_replacement_is_ready_before_the_recycled_worker_leaves(
    prefork_server: Start, module: Module, gate: Gate, max_workers: int
) -> None:
    folder = module(GATED_START)
    server = prefork_server(
        "mine:loop", folder=folder, workers=1, max_workers=max_workers, max_connections=1, environment=gate.environment
    )
    seen = []
    for _ in range(3):
        with gate.closed():
            worn = pid(server)
            watch.until("its replacement starts", lambda: len(watch.family(server.pid)) == 3)
            # It serves on, whoever comes.
            assert [pid(server) for _ in range(3)] == [worn] * 3
        seen.append(worn)
        watch.until("it has left", lambda worn=worn: watch.is_gone(worn))  # type: ignore[misc]
    assert len(set(seen)) == 3
    status = watch.settled(server, 1)
    assert (status["totals"]["ok"], status["totals"]["killed"], status["deaths"]) == (12, 0, [])


def test_at_the_ceiling_there_is_never_more_than_one_process_more(prefork_server: Start, module: Module, gate: Gate) -> None:
    folder = module(GATED_START)
    server = prefork_server("mine:loop", folder=folder, workers=3, max_workers=3, max_connections=1, environment=gate.environment)
    with gate.closed():
        pid(server)
        watch.until("a replacement starts", lambda: len(watch.family(server.pid)) == 5)
        for _ in range(30):  # each of the three is to be recycled now
            pid(server)
            assert len(watch.family(server.pid)) == 5
    watch.settled(server, 3)


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
