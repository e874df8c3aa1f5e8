"""What user code's import has left open that all workers would share: connections, listening sockets, event loops.

Workers that write to one connection get each other's answers, without an error anywhere. A connection is a stream socket with a
peer that has an address: an Internet address, or the name of a Unix socket. A socketpair has none, and is a process' own.

Workers that share an event loop's epoll are woken for each other's clients, and look in vain until these are served.
"""

import gc
import os
import select
import socket
import stat
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from prefork.net.address import peer_text
from prefork.system import process

# So many are named; the first is as good as all.
_NAMED = 5


@dataclass(frozen=True, slots=True)
class LeftOpen:
    """What was found, as people read it: ``descriptor 7 to 10.0.0.5:5432``."""

    connections: tuple[str, ...] = ()
    listening: tuple[str, ...] = ()
    event_loops: tuple[str, ...] = ()


def sockets() -> frozenset[int]:
    """The sockets that this process has, by inode: standard descriptors and what was inherited among them."""
    return frozenset(inode for _, inode in _sockets())


def since(before: Container[int]) -> LeftOpen:
    """The connections and listening sockets that have been opened since, and all event loops: there was none before."""
    found = _look(before)
    if found == LeftOpen():
        return found
    gc.collect()  # what nothing refers to any more may only wait to be closed
    return _look(before)


def _look(before: Container[int]) -> LeftOpen:
    connections, listening = [], []
    for fd, inode in _sockets():
        if inode in before:
            continue
        with _borrowed(fd) as sock:
            if sock is None or sock.type != socket.SOCK_STREAM:
                continue
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                listening.append(f"descriptor {fd} at {_name(sock, sock.getsockname())}")
            elif (peer := _peer(sock)) is not None:
                connections.append(f"descriptor {fd} to {peer}")
    event_loops = [f"descriptor {fd}" for fd in process.descriptors() if _is_epoll(fd)]
    return LeftOpen(tuple(connections[:_NAMED]), tuple(listening[:_NAMED]), tuple(event_loops[:_NAMED]))


def _is_epoll(fd: int) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventpoll]"
    except FileNotFoundError:  # no /proc: it is not told
        return False


def _sockets() -> Iterator[tuple[int, int]]:
    for fd in process.descriptors():
        found = os.fstat(fd)
        if stat.S_ISSOCK(found.st_mode):
            yield fd, found.st_ino


@contextmanager
def _borrowed(fd: int) -> Iterator[socket.socket | None]:
    """The socket at ``fd``, which stays open. None where the kernel tells no name of it (AF_ALG)."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError:
        yield None
        return
    try:
        yield sock
    finally:
        sock.detach()


def _peer(sock: socket.socket) -> str | None:
    """Who is at the other end of a connection that lives; None where that has no address."""
    try:
        address = sock.getpeername()
    except OSError:  # not connected
        return None
    if sock.family not in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX) or not address:
        return None
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    if poll.poll(0):  # its peer has closed it
        return None
    return _name(sock, address)


def _name(sock: socket.socket, address: object) -> str:
    if sock.family == socket.AF_UNIX:
        return f"unix:{os.fsdecode(address)}".replace(":\0", ":@", 1)  # type: ignore[arg-type]
    return peer_text(sock.family, address)
