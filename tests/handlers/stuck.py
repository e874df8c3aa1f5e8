"""Handlers that hang, or crash, in the way that the client's line names."""

import ctypes
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import prefork

FOREVER = 600.0


def loop(sock: socket.socket) -> None:
    """Say who serves, do what the client's line says, then echo."""
    sock.sendall(f"{os.getpid()}\n".encode())
    deed = DEEDS.get(sock.recv(64).decode())
    if deed is not None:
        deed()
    sock.sendall(b"done\n")


def lines(sock: socket.socket) -> None:
    """Answer each line, until the input ends; then say goodbye."""
    with sock.makefile("rwb") as file:
        file.write(f"{os.getpid()}\n".encode())
        file.flush()
        for line in file:
            file.write(line)
            file.flush()
        file.write(b"goodbye\n")


def sleeps_for_ever() -> None:
    time.sleep(FOREVER)


def computes_for_ever() -> None:
    while True:
        pass


def keeps_the_gil_in_c() -> None:
    re.match("(a+)+$", "a" * 64 + "b")


def waits_for_a_thread() -> None:
    thread = threading.Thread(target=sleeps_for_ever)
    thread.start()
    thread.join()


def waits_for_its_child() -> None:
    """Who ends with it: children of killed workers are left alone."""
    here, there = os.pipe()
    if os.fork() == 0:
        os.close(there)
        os.read(here, 1)
        os._exit(0)
    os.wait()


def leaves_a_thread_that_keeps_the_gil() -> None:
    """Once the worker waits for its next client the thread takes Python's lock, and never gives it back."""
    threading.Thread(target=_when_it_waits, args=(keeps_the_gil_in_c,), daemon=True).start()


def leaves_a_thread_that_computes() -> None:
    threading.Thread(target=computes_for_ever, daemon=True).start()


def _when_it_waits(then: Callable[[], None]) -> None:
    seen = 0
    while seen < 5:
        time.sleep(0.01)
        # The main thread is the process' first. While it serves a connection prefork knows it.
        waits = Path(f"/proc/self/task/{os.getpid()}/stat").read_text().rpartition(")")[2].split()[0] == "S"
        try:
            prefork.current()
        except RuntimeError:
            seen = seen + 1 if waits else 0
    then()


def waits_in_vfork() -> None:
    """State D: until the child has executed another program this process sleeps in the kernel. SIGSTOP does not stop it."""
    opening = (os.POSIX_SPAWN_OPEN, 0, os.environ["FIFO"], os.O_RDONLY, 0)
    os.posix_spawn("/bin/true", ["true"], {}, file_actions=[opening])


def blocks_every_signal() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    time.sleep(FOREVER)


def reads_at_zero() -> None:
    ctypes.string_at(0)


def aborts() -> None:
    os.abort()


def kills_itself_with_sigbus() -> None:
    os.kill(os.getpid(), signal.SIGBUS)


def replaces_the_handlers() -> None:
    for signo in (signal.SIGSEGV, signal.SIGRTMIN + 3):
        signal.signal(signo, signal.SIG_IGN)


DEEDS: dict[str, Callable[[], None]] = {
    deed.__name__.replace("_", " "): deed
    for deed in (
        sleeps_for_ever,
        computes_for_ever,
        keeps_the_gil_in_c,
        waits_for_a_thread,
        waits_for_its_child,
        waits_in_vfork,
        leaves_a_thread_that_keeps_the_gil,
        leaves_a_thread_that_computes,
        blocks_every_signal,
        reads_at_zero,
        aborts,
        kills_itself_with_sigbus,
        replaces_the_handlers,
    )
}
