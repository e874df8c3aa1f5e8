"""Handlers that end by an error: of their client's socket, of another one, or made up. The client's line says which."""

import errno
import json
import os
import select
import socket
import struct
from collections.abc import Callable

import prefork

RESET = struct.pack("ii", 1, 0)


def hung_up(sock: socket.socket) -> None:
    """Wait until the peer has gone; that takes no error off the socket."""
    poll = select.poll()
    poll.register(sock, 0)
    assert poll.poll(10_000)


def pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection of the handler's own."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        return ours, listener.accept()[0]


def lost_backend() -> socket.socket:
    """A connection of the handler's own whose other end has reset it."""
    ours, theirs = pair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    theirs.close()
    hung_up(ours)
    return ours


def _send_twice(sock: socket.socket) -> None:
    """The first one may be told what the peer has done, and not that this can't be sent."""
    try:
        sock.send(b"x")
    except ConnectionResetError:
        sock.send(b"x")


def _refused(_: socket.socket) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        socket.create_connection(nobody.getsockname())


# What a call on a socket whose peer has reset it fails with.
CALLS: dict[str, Callable[[socket.socket], object]] = {
    "ECONNRESET": lambda sock: sock.recv(1),
    "EPIPE": _send_twice,
    "ENOTCONN": lambda sock: sock.getpeername(),
    "ENOTCONN at the end": lambda sock: sock.shutdown(socket.SHUT_RDWR),
}


def loop(sock: socket.socket) -> None:
    """End by an error as the client's line says: of which ``call`` (on a lost ``backend``), which ``kind``, or which ``errno``.

    Before that it waits until the client has ``gone``, or says something more, and makes something of the connection (``made``).
    """
    order = json.loads(sock.makefile().readline())
    sock.sendall(b"!")
    if order.get("gone"):
        hung_up(sock)
    else:
        sock.recv(1)  # the client has ended its direction, or says one more byte
    MADE[order.get("made", "nothing")](sock)
    if order.get("call") == "ECONNREFUSED":
        _refused(sock)
    if order.get("call"):
        CALLS[order["call"]](lost_backend() if order.get("backend") else sock)
        raise AssertionError("no error")
    if order.get("kind"):
        raise KINDS[order["kind"]]
    raise OSError(getattr(errno, order["errno"]), "as told")


class OddError(ConnectionError):
    """One that can't be told, nor be asked for its number."""

    @property
    def errno(self) -> int:  # type: ignore[override]
        """Raise."""
        raise RuntimeError("no number")

    def __str__(self) -> str:
        raise RuntimeError("no words")


KINDS: dict[str, BaseException] = {
    "OddError": OddError(),
    "ConnectionResetError": ConnectionResetError("of a library"),
    "TimeoutError": TimeoutError("timed out"),
    "ValueError": ValueError("of the handler"),
}


def _put(sock: socket.socket, file: int) -> None:
    os.dup2(file, sock.fileno())
    os.close(file)


def _detached(sock: socket.socket) -> None:
    kept.append(socket.socket(fileno=sock.detach()))


def _hung_up_pipe(sock: socket.socket) -> None:
    read, write = os.pipe()
    os.close(read)
    _put(sock, write)


kept: list[socket.socket] = []
# What a handler may have made of its connection by then.
MADE: dict[str, Callable[[socket.socket], object]] = {
    "nothing": lambda _: None,
    "closed": lambda sock: sock.close(),
    "detached": _detached,
    "a lost backend": lambda sock: _put(sock, lost_backend().detach()),
    "a pipe": _hung_up_pipe,
}


def checked(sock: socket.socket) -> None:
    """Meet a load balancer's health check: it connects, and resets."""
    hung_up(sock)
    sock.getpeername()


def about(sock: socket.socket) -> None:
    """Tell the client's address."""
    sock.sendall(json.dumps(prefork.current().client_address).encode())
