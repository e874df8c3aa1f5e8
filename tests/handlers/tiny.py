"""Handlers that do one thing, good or bad. Each first line from the client may say what."""

import json
import os
import signal
import socket
import sys
import time

from prefork import Connection

served: list[int] = []


def who(sock: socket.socket) -> None:
    """Answer with this worker's pid, and hold the connection until the client ends it."""
    sock.sendall(f"{os.getpid()}\n".encode())
    while sock.recv(4096):
        pass


def about(sock: socket.socket, conn: Connection) -> None:
    """Answer with what the connection is told, then with `stopping` for each line."""
    told = {name: getattr(conn, name) for name in ("id", "peer", "local", "listener", "worker", "generation", "accepted_at")}
    sock.sendall(json.dumps(told).encode() + b"\n")
    while sock.recv(4096):
        sock.sendall(json.dumps(conn.stopping).encode() + b"\n")


def state(sock: socket.socket) -> None:
    """Answer with the worker's signal dispositions, mask and descriptors."""
    numbers = [n for n in sorted(signal.valid_signals()) if n not in (signal.SIGKILL, signal.SIGSTOP)]
    told = {
        "handlers": {int(n): repr(signal.getsignal(n)) for n in numbers},
        "mask": sorted(int(n) for n in signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "fds": sorted(int(fd) for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")),
        "served": len(served),
        "blocking": sock.getblocking(),
        "session": os.getsid(0),
    }
    served.append(1)
    sock.sendall(json.dumps(told).encode())


def obey(sock: socket.socket) -> None:
    """Do what the client's line says, then echo what follows."""
    line = sock.recv(4096).decode().strip()
    if line == "raise":
        raise RuntimeError("raised as told")
    if line == "exit":
        sys.exit(3)
    if line == "os._exit":
        os._exit(3)
    if line == "fork" and os.fork() == 0:
        return
    if line == "alarm":
        signal.signal(signal.SIGALRM, _raise)
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        return
    if line == "default timeout":
        socket.setdefaulttimeout(0.01)
    if line == "sleep":
        time.sleep(1.0)
    sock.sendall(f"{os.getpid()} {line}\n".encode())


def _raise(signo: int, frame: object) -> None:
    raise TimeoutError("a left-over alarm")


not_callable = 3


def too_many(one: object, two: object, three: object) -> None:
    """Not a handler."""
