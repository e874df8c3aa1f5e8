"""Hostile code and hostile clients: lies, garbage, crowds. Who does it may be lost; the daemon and everybody else are not."""

import array
import fcntl
import os
import resource
import selectors
import signal
import socket
import struct
import termios
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

import psutil

from prefork.testing import Server, serve
from tests import watch
from tests.faults.arena import Arena, Fault, Figures, Rounds, arena
from tests.faults.machine import HOSTILE, order
from tests.load import SIZE, Load, name_of

# Slots of each listener are twice as many (prefork.generation).
MAX_WORKERS = 64
PARTS = ("forged", "own", "others", "states", "tired", "header", "whole", "ones")
# So many slots have been in use, more than there are workers.
EARLIER = 20


def _calm(ring: Arena) -> None:
    """The master is not kept busy by what was done to it."""
    master = psutil.Process(ring.server.pid)
    before = master.cpu_times().user + master.cpu_times().system
    time.sleep(1.0)  # a busy loop is seen by the time that it takes
    used = master.cpu_times().user + master.cpu_times().system - before
    assert used < 0.8, f"the master has used {used:.2f} s of CPU in a second"


def garbage_on_the_board(rounds: Rounds, workload: str) -> Figures:
    """A worker writes random bytes over its generation's board: acceptors are there again, and a reload puts the totals right."""
    with arena(workload, rounds=rounds, module=HOSTILE, max_workers=MAX_WORKERS, exact=False) as ring:
        for number in rounds:
            with ExitStack() as held:
                for _ in range(EARLIER):
                    held.enter_context(ring.server.connect())
                watch.until("they are served", lambda: ring.server.status()["totals"]["serving"] >= EARLIER)
            watch.until("they have left", lambda: len(watch.workers(ring.server)) < EARLIER)
            assert order(ring, f"spoil {PARTS[number % len(PARTS)]} {2 * MAX_WORKERS}") == "spoilt"
            watch.until("the board is true", partial(_is_true, ring))
            ring.serves(200)
            assert ring.server.command("reload")["ok"]
        _calm(ring)
    return ring.figures


def _is_true(ring: Arena) -> bool:
    """Whether there are as many workers as the board says, and acceptors among them."""
    shown = watch.workers(ring.server)
    accepting = [worker for worker in shown if worker["state"] in ("idle", "busy")]
    there = [child for child in watch.family(ring.server.pid) if " worker " in (child.cmdline() or [""])[0]]
    return len(shown) == len(there) and len(accepting) >= ring.workers


def garbage_on_the_doorbell(rounds: Rounds, workload: str) -> Figures:
    """A worker writes random bytes and forged records where workers ring: nothing is believed, and the master does not spin."""
    with arena(workload, rounds=rounds, module=HOSTILE) as ring:
        for _ in rounds:
            assert order(ring, "ring 300").endswith(" rung")
        _calm(ring)
        assert ring.server.status()["state"] == "running"
    return ring.figures


def full_doorbell(rounds: Rounds, workload: str) -> Figures:
    """The master is stopped for ``count`` seconds with the workers' pipe full: they serve on, and the master catches up."""
    with arena(workload, rounds=rounds, module=HOSTILE) as ring:
        os.kill(ring.server.pid, signal.SIGSTOP)
        try:
            order(ring, "ring 100000")
            assert _unread(ring.server.pid) > 60_000, "it is not full"
            before = ring.connections
            for _ in rounds:
                time.sleep(1.0)  # the fault is time itself
            assert ring.connections > before
        finally:
            os.kill(ring.server.pid, signal.SIGCONT)
        ring.recovered()
        _calm(ring)
    return ring.figures


def _unread(pid: int) -> int:
    """The most bytes that wait in a pipe of which this process has the reading end."""
    found = [0]
    for fd, what in watch.descriptors(pid).items():
        if what.startswith("pipe:"):
            with open(f"/proc/{pid}/fd/{fd}", "rb", buffering=0) as pipe:
                waiting = array.array("i", [0])
                fcntl.ioctl(pipe, termios.FIONREAD, waiting)
                found.append(waiting[0])
    return max(found)


# More than a fork server may say that makes no sense.
TOO_MUCH = 12_000


def lies_on_the_channel(rounds: Rounds, workload: str) -> Figures:
    """User code in a fork server says nonsense to the master: it is counted; a fork server that goes on with it is replaced."""
    with arena(workload, rounds=rounds, module=HOSTILE) as ring:
        for number in rounds:
            count = 100 if number % 2 == 0 else TOO_MUCH
            generation = ring.server.status()["generation"]
            (ring.folder / "lies").write_text(str(count))
            os.kill(ring.server.pid, signal.SIGTTIN)  # one more each time, so that one has to be forked
            if count == TOO_MUCH:
                watch.until("it is replaced", lambda at=generation: ring.server.status()["generation"] > at)  # type: ignore[misc]
            else:
                ring.logged(f"reports from processes of generation {generation} made no sense")
            ring.recovered()
    return ring.figures


# -- crowds

# Descriptors of the clients' process that are not theirs.
OURS = 200


@contextmanager
def crowd(server: Server, count: int) -> Iterator[list[socket.socket]]:
    """Clients that have begun to connect, and say nothing. Who is still there at the end leaves."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], min(limits[1], count + OURS)), limits[1]))
    clients = []
    try:
        for _ in range(count):
            client = socket.socket()
            clients.append(client)
            client.setblocking(False)
            with suppress(BlockingIOError):
                client.connect(server.address)
        yield clients
    finally:
        for client in clients:
            if client.fileno() != -1:
                # With a reset: a FIN that the full queue has dropped is sent again after up to a minute.
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def silent_clients(rounds: Rounds, workload: str) -> Figures:
    """So many clients connect and say nothing, at a ceiling of 64: no more processes, the daemon answers, and goes on after it."""
    figures: Figures = {}
    with serve("echo:loop", workers=8, max_workers=MAX_WORKERS, spare_timeout=1) as server:
        watch.settled(server, 8)
        with crowd(server, rounds.count):
            watch.until("the ceiling is reached", lambda: server.status()["totals"]["serving"] == MAX_WORKERS)
            answered = [_answer_time(server) for _ in range(20)]
            processes = len(watch.family(server.pid))
            assert processes <= MAX_WORKERS + 1, processes
            assert server.status()["state"] == "running"
            queue = server.status()["listeners"][0]["queue"]
            begun = time.monotonic()
        totals = watch.until("all have left", lambda: _nobody_waits(server), 2 * watch.DEADLINE)
        served = time.monotonic() - begun
        with Load(server.address) as load:
            watch.until("clients are served", lambda: load.connections > 500)
        after = watch.quiet(server)
        assert not load.failures
        assert after["accepted"] - totals["accepted"] == load.connections
        assert after["ok"] == after["accepted"]
        watch.settled(server, 8)
        rounds.done = rounds.count
        figures |= {"connections": totals["accepted"] + load.connections, "silent": rounds.count, "queue": queue, "failures": {}}
        figures |= {"answered_worst": max(answered), "served_after": served, "worst": load.worst, "processes": processes}
    return figures


def _answer_time(server: Server) -> float:
    begun = time.monotonic()
    server.status()
    return time.monotonic() - begun


def _nobody_waits(server: Server) -> dict[str, int] | None:
    # Totals are counted before the queue is read, and who has just left it may not have been counted yet: so they are those of
    # looks after the one that has found it empty, and stay what they are.
    if server.status()["listeners"][0]["queue"]:
        return None
    first, second = (server.status()["totals"] for _ in range(2))
    return second if first == second and not second["serving"] else None


BACKLOG, BURST = 64, 300
# The kernel tries again after 1, 2, 4, 8, 16 s.
LONGEST_RETRY = 32.0


def syn_burst(rounds: Rounds, workload: str) -> Figures:
    """More clients at once than the queue holds: the kernel lets them try again, and each is served."""
    waits: list[float] = []
    # Not exact: the kernel has once made 10 connections more than the 6,900 clients of bursts. With its queue full it sends SYN
    # cookies, and takes three acknowledgements for each that it has sent (SyncookiesRecv, SyncookiesSent): late copies, it seems.
    # They have no client that could end them, so a time-out does.
    with arena(workload, rounds=rounds, backlog=BACKLOG, exact=False, socket_timeout=5) as ring:
        for _ in rounds:
            waits += burst(ring, BURST)
    figures = ring.figures | {"burst": BURST, "waited_worst": max(waits)}
    ghosts = figures["ghosts"] = figures["totals"]["accepted"] - ring.connections - len(ring.own)
    assert 0 <= ghosts <= len(ring.own) // 100, figures
    return figures


def burst(ring: Arena, count: int) -> list[float]:
    """So many clients begin to connect at once. Returns how long each took until it was answered; who was not is lost."""
    took: list[float] = []
    begun = time.monotonic()
    with crowd(ring.server, count) as clients, selectors.DefaultSelector() as selector:
        for client in clients:
            selector.register(client, selectors.EVENT_WRITE, client)
        while selector.get_map():
            events = selector.select(LONGEST_RETRY)
            assert events, f"{len(selector.get_map())} of {count} were not served"
            for key, happened in events:
                client = key.data
                try:
                    if happened & selectors.EVENT_WRITE:
                        client.send(b"x" * SIZE)
                        selector.modify(client, selectors.EVENT_READ, client)
                        continue
                    answer = client.recv(SIZE)
                except (ConnectionResetError, BrokenPipeError):
                    answer = b""
                if answer:
                    assert answer == b"x" * SIZE
                    took.append(time.monotonic() - begun)
                else:
                    ring.lost.append(name_of(client))
                ring.own.append(answer != b"")
                selector.unregister(client)
                client.close()
    return took


FAULTS = {
    "garbage_on_the_board": Fault(garbage_on_the_board, 100, len(PARTS), ("short",)),
    "garbage_on_the_doorbell": Fault(garbage_on_the_doorbell, 100, 3, ("mixed",)),
    "full_doorbell": Fault(full_doorbell, 30, 2, ("short",)),
    "lies_on_the_channel": Fault(lies_on_the_channel, 20, 2, ("long",)),
    "silent_clients": Fault(silent_clients, 10_000, 1_000, ("short",)),
    "syn_burst": Fault(syn_burst, 30, 1, ("short",)),
}
