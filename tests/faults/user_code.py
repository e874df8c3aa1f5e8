"""Strikes by what user code does to its own process, to the socket that all share, and to what the master hears; and by clients of
the control socket. Of each no client may fail: who does it serves its own client to the end first.

Not here: a listener that is shut down (`tests.faults.test_accepting`). Until it is open again clients are refused, those of other
strikes too, and nothing says how many.
"""

import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from tests.faults.arena import Arena
from tests.faults.machine import order
from tests.faults.strikes import BRIEFLY

# The worker's own want of descriptors: leaks, and the limit of a sandbox.
WANTS = (b"leaks every descriptor", b"opens nothing more")
# What every user of the listening socket suffers from; of these the second is inherited by connections, too.
NON_BLOCKING, TIMEOUT = "make_non_blocking", "give_a_timeout"
# How long a reload that has to come first is waited for; another one may be under way, or taken back.
LONGEST_WAIT = 3.0
# Control clients at once.
ASKERS = 4
REQUEST = b'{"command": "status"}\n'


def no_descriptors_of_its_own(ring: Arena) -> None:
    """A handler leaves its worker without a descriptor for the next connection: it ends, and another takes its place."""
    ring.ask(ring.chance.choice(WANTS))


def spoilt_listener(ring: Arena) -> None:
    """A handler has accept() come back empty-handed in all workers.

    With a time-out in inexact runs only, in which connections have one of their own that covers the one that they inherit.
    """
    order(ring, "spoil_listener " + (NON_BLOCKING if ring.exact else ring.chance.choice((NON_BLOCKING, TIMEOUT))))


def asleep_in_the_kernel(ring: Arena) -> None:
    """A worker is in state D (vfork(2)) while the master reloads or upgrades: neither waits for it."""
    fifo = ring.folder / f"fifo.{time.monotonic_ns()}"
    os.mkfifo(fifo)
    fifo.chmod(0o644)
    with ThreadPoolExecutor(1) as pool:
        answered = pool.submit(order, ring, f"wait_in_vfork {fifo}")
        try:
            os.kill(ring.server.pid, ring.chance.choice((signal.SIGHUP, signal.SIGUSR2)))
            time.sleep(BRIEFLY)
        finally:
            writer = os.open(fifo, os.O_RDWR)  # until the answer is there: the order may have to wait for a worker
            try:
                answered.result()
            finally:
                os.close(writer)
                fifo.unlink()


def fleeting_workers(ring: Arena) -> None:
    """For a moment each new worker leaves 10 ms after it could accept, and is replaced, more and more slowly if none serves."""
    flag = ring.folder / "fleeting"
    with ring.module_lock:  # whose trials have to have been of the code that is tried
        generation = ring.generation()
        flag.touch()
        try:
            os.kill(ring.server.pid, signal.SIGHUP)
            end = time.monotonic() + LONGEST_WAIT
            while ring.generation() == generation and time.monotonic() < end:
                time.sleep(0.01)
            time.sleep(BRIEFLY)
        finally:
            flag.unlink()


def heaps_of_rings(ring: Arena) -> None:
    """For a moment a worker rings as fast as it can."""
    order(ring, f"rings_in_heaps {BRIEFLY}")


def control_clients(ring: Arena) -> None:
    """For a moment clients of the control socket ask for the status as fast as they can."""
    end = time.monotonic() + BRIEFLY

    def ask() -> None:
        while time.monotonic() < end:
            # Who is turned away, or meets an upgrade, asks again.
            with socket.socket(socket.AF_UNIX) as sock, suppress(OSError):
                sock.settimeout(BRIEFLY)
                sock.connect(str(ring.server.control))
                sock.sendall(REQUEST)
                sock.recv(65_536)

    askers = [threading.Thread(target=ask) for _ in range(ASKERS)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()


def lies_of_ends(ring: Arena) -> None:
    """The fork server says of all its workers, who serve on, that they have ended."""
    (ring.folder / "lies").write_text("ends")
    os.kill(ring.server.pid, signal.SIGTTIN)


EXACT = (
    no_descriptors_of_its_own,
    spoilt_listener,
    asleep_in_the_kernel,
    fleeting_workers,
    heaps_of_rings,
    control_clients,
)
# Of a worker that ends while the lie is on its way it is believed, and how it ended is not known.
INEXACT = (lies_of_ends,)
