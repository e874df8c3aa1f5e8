"""A handler that does what it must not, and one that serves: the client's line says what, and is answered with how things are."""

import ctypes
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

FOREVER = 600.0


def loop(sock: socket.socket) -> None:
    deed = DEEDS.get(sock.recv(4096).decode().strip())
    told = deed(sock) if deed is not None else None
    if sock.fileno() != -1:
        sock.sendall(json.dumps({"pid": os.getpid(), "told": told, "state": state(sock)}).encode())


def state(sock: socket.socket) -> dict[str, object]:
    """What of this process the next connection's code depends on."""
    return {
        "folder": os.getcwd(),
        "signals": [repr(signal.getsignal(n)).partition(" of ")[0] for n in (signal.SIGTERM, signal.SIGALRM, signal.SIGCHLD)],
        "mask": [int(n) for n in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
        "blocking": sock.getblocking(),
    }


def raises(sock: socket.socket) -> None:
    raise RuntimeError("raised as told")


def exits(sock: socket.socket) -> None:
    sys.exit(3)


def leaves_at_once(sock: socket.socket) -> None:
    os._exit(3)


def forks(sock: socket.socket) -> None:
    if os.fork() == 0:
        sock.close()


def leaves_a_thread(sock: socket.socket) -> None:
    threading.Thread(target=time.sleep, args=(FOREVER,), daemon=False).start()


def leaves_children(sock: socket.socket) -> list[int]:
    """By fork, by subprocess, and by C code that tells Python nothing of it."""
    forked = os.fork()
    if forked == 0:
        sock.close()
        time.sleep(FOREVER)
    started = subprocess.Popen(["sleep", str(FOREVER)])
    libc = ctypes.PyDLL(None)
    hidden = int(libc.fork())
    if hidden == 0:
        sock.close()
        time.sleep(FOREVER)
    return [forked, started.pid, hidden]


def closes_its_socket(sock: socket.socket) -> None:
    sock.close()


def closes_its_descriptor(sock: socket.socket) -> None:
    os.close(sock.detach())


def closes_every_descriptor(sock: socket.socket) -> None:
    sock.detach()
    os.closerange(0, 256)


def blocks_sigterm(sock: socket.socket) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())


def replaces_sigterm(sock: socket.socket) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)


def changes_the_working_directory(sock: socket.socket) -> None:
    os.chdir("/proc")
    os.chdir("/")


def changes_it_and_raises(sock: socket.socket) -> None:
    os.chdir("/")
    raise RuntimeError("raised as told")


def sets_the_default_timeout(sock: socket.socket) -> None:
    socket.setdefaulttimeout(0.01)


def segfaults(sock: socket.socket) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.string_at(0)


def leaves_an_alarm(sock: socket.socket) -> None:
    signal.signal(signal.SIGALRM, _ring)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)


def _ring(signo: int, frame: object) -> None:
    raise TimeoutError("a left-over alarm")


DEEDS: dict[str, Callable[[socket.socket], object]] = {
    deed.__name__.replace("_", " "): deed
    for deed in (
        raises,
        exits,
        leaves_at_once,
        forks,
        leaves_a_thread,
        leaves_children,
        closes_its_socket,
        closes_its_descriptor,
        closes_every_descriptor,
        blocks_sigterm,
        replaces_sigterm,
        changes_the_working_directory,
        changes_it_and_raises,
        sets_the_default_timeout,
        segfaults,
        leaves_an_alarm,
    )
}
