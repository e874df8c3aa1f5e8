"""Echo that carries out orders: what a handler can do to its own process, and to what it shares. The faults serve a copy."""

import ctypes
import fcntl
import os
import resource
import secrets
import socket
import time
from collections.abc import Callable, Iterator

import prefork
from prefork.pool import scoreboard, wire
from prefork.pool.scoreboard import IDLE, Layout

ORDER = b"hostile: "
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def loop(sock: socket.socket) -> None:
    """Send back everything that arrives on ``sock``; an order is carried out first, and answered with what it returns."""
    while data := sock.recv(4096):
        if data.startswith(ORDER):
            deed, *arguments = data.removeprefix(ORDER).decode().split()
            data = DEEDS[deed](*arguments).encode()
        sock.sendall(data)


def eat(mebibytes: str) -> str:
    """Touch so much memory, a mebibyte at a time, and keep it until the answer is written."""
    eaten = [secrets.token_bytes(1 << 20) for _ in range(int(mebibytes))]
    return f"{len(eaten)} eaten"


def pid() -> str:
    """Who serves this connection."""
    return str(os.getpid())


def clock() -> str:
    """The time of day, as this process knows it."""
    return str(time.time())


def spoil(what: str, capacity: str) -> str:
    """Random bytes over a part of the board, through the mapping that /proc/self/maps tells of.

    ``forged``: all say IDLE; ``ones``: a stray memset(-1).
    """
    with open("/proc/self/maps") as maps:
        start = next(int(line.split("-")[0], 16) for line in maps if "prefork-board" in line)
    for at, length in _places(what, Layout(1, int(capacity))):
        byte = {"forged": bytes([IDLE]), "ones": b"\xff"}.get(what)
        ctypes.memmove(start + at, byte * length if byte else secrets.token_bytes(length), length)
    return "spoilt"


def _places(what: str, layout: Layout) -> Iterator[tuple[int, int]]:
    record = scoreboard.RECORD_WORDS * 8
    own = layout.records_at + prefork.current().worker * record
    if what == "own":
        yield own, record
    elif what == "others":
        yield layout.records_at, own - layout.records_at
        yield own + record, layout.board_bytes - own - record
    elif what in ("states", "forged"):
        yield 4096, layout.slots
    elif what == "tired":
        yield layout.tired_at, layout.slots
    elif what == "header":
        yield 0, 4096
    elif what in ("whole", "ones"):
        yield 0, layout.board_bytes


def ring(count: str) -> str:
    """Random bytes and forged records on every pipe that takes them, until it is full or ``count`` were written."""
    written = 0
    for fd in _pipes():
        try:
            for number in range(int(count)):
                os.write(fd, secrets.token_bytes(1 + number % 64))
                for why in wire.Ring:
                    os.write(fd, wire.doorbell_of(why, number % 3)(secrets.randbelow(64), secrets.randbelow(1 << 22)))
                written += 1
        except BlockingIOError:
            continue
    return f"{written} rung"


def _pipes() -> Iterator[int]:
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        try:
            is_ours = fd > 2 and os.readlink(f"/proc/self/fd/{fd}").startswith("pipe:")
            if is_ours and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY:
                yield fd
        except OSError:
            continue  # closed: it was the listing's own


DEEDS: dict[str, Callable[..., str]] = {
    "eat": eat,
    "pid": pid,
    "clock": clock,
    "spoil": spoil,
    "ring": ring,
}


def lie() -> None:
    """In the fork server, before a fork: what the file ``lies`` says on its channel, once: so much nonsense, or the ends of all."""
    try:
        with open("lies") as file:
            what = file.read()
        os.unlink("lies")
    except FileNotFoundError:
        return
    with _channel() as channel:
        channel.setblocking(True)
        for said in _ends() if what == "ends" else _nonsense(int(what)):
            channel.send(said)
        channel.setblocking(False)


def _nonsense(count: int) -> Iterator[bytes]:
    for number in range(count):
        kind = (wire.Kind.FORKED, wire.Kind.EXITED, wire.Kind.STOPPED, wire.Kind.FORK_FAILED)[number % 4]
        lie = wire.pack_report(wire.Report(kind, 1_000 + number, 1, 0))
        yield lie if number % 2 else secrets.token_bytes(number % 99 + 1)


def _ends() -> Iterator[bytes]:
    """Each living worker's, by its title."""
    with open(f"/proc/self/task/{os.getpid()}/children") as children:
        pids = [int(pid) for pid in children.read().split()]
    for pid in pids:
        try:
            with open(f"/proc/{pid}/cmdline") as title:
                _, found, slot = title.read().rstrip("\0").rpartition(" worker ")
        except OSError:
            continue  # it has ended
        if found:
            yield wire.pack_report(wire.Report(wire.Kind.EXITED, int(slot), pid, 0))


def _channel() -> socket.socket:
    for name in os.listdir("/proc/self/fd"):
        try:
            copy = os.dup(int(name))
        except OSError:
            continue  # what the list was read with
        try:
            sock = socket.socket(fileno=copy)
        except OSError:
            os.close(copy)  # no socket
            continue
        if sock.family == socket.AF_UNIX and sock.type == socket.SOCK_SEQPACKET:
            return sock
        sock.close()
    raise AssertionError("no channel")


os.register_at_fork(before=lie)
