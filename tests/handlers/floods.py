"""Handlers that keep the master busy, or other workers waiting, in the way that the client's line names."""

import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress

from prefork import worker
from prefork.pool import wire

SECONDS = 4.0


def loop(sock: socket.socket) -> None:
    """Say who serves, do what the client's line says, say so, and wait for the client to go."""
    sock.sendall(f"{os.getpid()}\n".encode())
    deed = DEEDS.get(sock.recv(64).decode())
    if deed is not None:
        deed()
    sock.sendall(b"done\n")
    sock.recv(64)


def _here() -> worker.Worker:
    assert worker._here is not None
    return worker._here


def _until_over(deed: Callable[[], object], seconds: float = SECONDS) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        deed()


def has_others_wait() -> None:
    """The pipes that workers write to are full, and whoever shares our open file waits in write(2)."""
    for pipe in (_here().brief.doorbell, _here().brief.stacks):
        with suppress(BlockingIOError):
            while True:
                os.write(pipe, b"x" * 4096)
        os.set_blocking(pipe, True)


def rings() -> None:
    ring = wire.doorbell_of(wire.Ring.ACCEPTED, _here().brief.generation)(_here().slot, os.getpid())

    def write() -> None:
        with suppress(BlockingIOError):
            os.write(_here().brief.doorbell, ring)

    _until_over(write)


def rings_in_heaps(seconds: float = SECONDS) -> None:
    ring = wire.doorbell_of(wire.Ring.ACCEPTED, _here().brief.generation)(_here().slot, os.getpid())

    def write() -> None:
        try:
            os.write(_here().brief.doorbell, ring * 200)
        except BlockingIOError:
            os.sched_yield()

    _until_over(write, seconds)


def _stop_and_continue(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    os.kill(pid, signal.SIGCONT)


def is_stopped() -> None:
    """By a child of its own, and continued, again and again."""
    pid = os.getpid()
    child = os.fork()
    if child == 0:
        _until_over(lambda: _stop_and_continue(pid))
        os._exit(0)
    os.waitpid(child, 0)


def leaves_orphans() -> None:
    """Each is the master's child when it ends."""

    def leave() -> None:
        child = os.fork()
        if child == 0:
            if os.fork() == 0:
                os._exit(0)
            os._exit(0)
        os.waitpid(child, 0)

    _until_over(leave)


def stops_an_orphan() -> None:
    """One that is the master's child, and continues it, again and again."""
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        orphan = os.fork()
        if orphan == 0:
            time.sleep(2 * SECONDS)
            os._exit(0)
        os.write(there, str(orphan).encode())
        os._exit(0)
    os.waitpid(child, 0)
    orphan = int(os.read(here, 20))
    _until_over(lambda: _stop_and_continue(orphan))
    os.kill(orphan, signal.SIGKILL)


def asks() -> None:
    """The control socket, which is its own user's."""

    def ask() -> None:
        with socket.socket(socket.AF_UNIX) as sock, suppress(OSError):
            sock.connect(os.environ["CONTROL"])
            sock.sendall(b'{"command": "status"}\n')
            sock.recv(65536)

    _until_over(ask)


DEEDS: dict[str, Callable[[], None]] = {
    deed.__name__: deed for deed in (has_others_wait, rings, rings_in_heaps, is_stopped, leaves_orphans, stops_an_orphan, asks)
}
