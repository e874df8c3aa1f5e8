"""What user code can try on prefork's own processes.

The handler carries out orders: each is a line, each answer a line of JSON. In the fork server the file ``forge`` says what is told
to the master in its name before the next fork, once.
"""

import ctypes
import errno
import json
import os
import signal
import socket
import time
from collections.abc import Callable

from prefork.pool import scoreboard
from prefork.pool.scoreboard import Layout
from prefork.pool.wire import Kind, Report, pack_report

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_PIDFD_GETFD = 438
_PTRACE_ATTACH, _PTRACE_DETACH = 16, 17


def loop(sock: socket.socket) -> None:
    """Carry out one order: a name below, with its arguments."""
    line = sock.recv(4096).decode().split()
    if line:
        sock.sendall(json.dumps(ORDERS[line[0]](*line[1:])).encode())


def _maps(name: str) -> tuple[int, int]:
    with open("/proc/self/maps") as maps:
        line = next(line for line in maps if f"prefork-{name}" in line)
    low, high = (int(end, 16) for end in line.split()[0].split("-"))
    return low, high


def hello() -> str:
    """Be served."""
    return "hello"


def pids() -> list[int]:
    """This process, the fork server and the master."""
    with open(f"/proc/{os.getppid()}/status") as status:
        parents = [line.split()[1] for line in status if line.startswith("PPid:")]
    return [os.getpid(), os.getppid(), *map(int, parents)]


def smash(byte: str) -> str:
    """A stray memset over the whole board."""
    low, high = _maps("board")
    ctypes.memset(low, int(byte, 16), high - low)
    return "smashed"


def backdate(since: str) -> str:
    """Say of every connection that it is served since then."""
    low, _ = _maps("board")
    for slot in range(SLOTS):
        at = LAYOUT.records_at + (slot * scoreboard.RECORD_WORDS + scoreboard.SINCE) * 8
        ctypes.memmove(low + at, int(since).to_bytes(8, "little"), 8)
    return "written"


def wait() -> str:
    """Serve until the client leaves, or the time is over."""
    time.sleep(600)
    return "waited"


def write_orders() -> str:
    """Make the master's orders writable: an errno's name."""
    low, high = _maps("orders")
    if LIBC.mprotect(low, high - low, 3) != 0:
        return errno.errorcode[ctypes.get_errno()]
    ctypes.memset(low, 0xFF, high - low)
    return "written"


def boards() -> list[str]:
    """Descriptors of boards and orders in this process."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            continue  # the listing's own
    return [path for path in found if "prefork-board" in path or "prefork-orders" in path]


def take(pid: str) -> list[str]:
    """Take another process's descriptors, open its files and memory, and trace it: what of that is possible."""
    found = []
    number = os.pidfd_open(int(pid))
    for fd in range(100):
        if (taken := LIBC.syscall(_PIDFD_GETFD, number, fd, 0)) >= 0:
            found.append(f"descriptor {fd}")
            os.close(taken)
    os.close(number)
    attempts: dict[str, Callable[[], object]] = {
        "list": lambda: os.listdir(f"/proc/{pid}/fd"),
        "memory": lambda: os.close(os.open(f"/proc/{pid}/mem", os.O_RDONLY)),
    }
    for what, attempt in attempts.items():
        try:
            attempt()
        except OSError:
            continue
        found.append(what)
    LIBC.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    if LIBC.ptrace(_PTRACE_ATTACH, int(pid), None, None) == 0:
        os.waitpid(int(pid), 0x40000000)  # __WALL
        LIBC.ptrace(_PTRACE_DETACH, int(pid), None, None)
        found.append("ptrace")
    return found


def own() -> dict[str, object]:
    """What this process may do with itself."""
    with open("/proc/self/oom_score_adj") as score:
        told: dict[str, object] = {"score": int(score.read()), "dumpable": LIBC.prctl(3, 0, 0, 0, 0)}
    try:
        with open("/proc/self/environ", "rb"):
            told["environ"] = True
    except OSError:
        told["environ"] = False
    return told


# -- in the fork server

SLOTS = 16
LAYOUT = Layout(1, 512)  # of one address and the default max_workers


def forge() -> None:
    """WHAT PID: this process is a worker, by a report (``forked``) or on the ``board``; or forks have ``failed``, or all workers
    have ended; ``then die``.
    """
    try:
        with open("run/forge") as file:
            what, pid, *then = file.read().split()
        os.unlink("run/forge")
    except FileNotFoundError:
        return
    channel = _channel()
    low, _ = _maps("board")
    for slot in range(SLOTS):
        if what == "board":
            at = LAYOUT.records_at + (slot * scoreboard.RECORD_WORDS + scoreboard.PID) * 8
            ctypes.memmove(low + at, int(pid).to_bytes(8, "little"), 8)
        elif what == "failed":
            channel.send(pack_report(Report(Kind.FORK_FAILED, slot, status=errno.EAGAIN)))
        elif what == "forked":
            channel.send(pack_report(Report(Kind.FORKED, slot, int(pid))))
        else:
            for child in _children():
                channel.send(pack_report(Report(Kind.EXITED, slot, child)))
    channel.detach()
    if then:
        os.kill(os.getpid(), signal.SIGKILL)


def _children() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(pid) for pid in file.read().split()]


def _channel() -> socket.socket:
    for name in os.listdir("/proc/self/fd"):
        try:
            sock = socket.socket(fileno=int(name))
        except OSError:
            continue
        if sock.family == socket.AF_UNIX and sock.type == socket.SOCK_SEQPACKET:
            return sock
        sock.detach()
    raise AssertionError("no channel")


os.register_at_fork(before=forge)

ORDERS: dict[str, Callable[..., object]] = {
    "hello": hello,
    "pids": pids,
    "smash": smash,
    "backdate": backdate,
    "wait": wait,
    "write_orders": write_orders,
    "boards": boards,
    "take": take,
    "own": own,
}
