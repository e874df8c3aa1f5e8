"""A handler that does to its worker, or to the listening socket that all share, what the client says, and then answers."""

import ctypes
import os
import platform
import resource
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

# accept4(2) by its number.
ACCEPT4 = {"x86_64": 288, "aarch64": 242}
# A time-out of the listening socket, which connections inherit.
SHORTLY = struct.pack("@ll", 0, 20_000)


def loop(sock: socket.socket) -> None:
    order = sock.recv(64)
    if order in ORDERS:
        ORDERS[order]()
    sock.sendall(order)


def open_nothing_more() -> None:
    """As vsftpd and sshd do in their sandboxes."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))


def leave_one_number() -> None:
    """A connection still gets a descriptor, 0; at no other number anything can be put."""
    os.close(0)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, 1))


def forbid_accept() -> None:
    """Have accept4(2) fail with EPERM from now on (seccomp(2), a filter of four instructions)."""
    steps = (
        (0x20, 0, 0, 0),
        (0x15, 0, 1, ACCEPT4[platform.machine()]),
        (0x06, 0, 0, 0x00050001),
        (0x06, 0, 0, 0x7FFF0000),
    )
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, ctypes.c_ulong(1), 0, 0, 0) == 0
    assert libc.prctl(22, ctypes.c_ulong(2), struct.pack("HP", len(steps), ctypes.addressof(program)), 0, 0) == 0


def make_non_blocking() -> None:
    with _listener() as listener:
        listener.setblocking(False)


def give_a_timeout() -> None:
    with _listener() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, SHORTLY)


def shut_down() -> None:
    with _listener() as listener:
        listener.shutdown(socket.SHUT_RD)


def connect_elsewhere() -> None:
    with _listener() as listener, socket.create_server(("127.0.0.1", 0)) as other:
        listener.shutdown(socket.SHUT_RDWR)
        listener.connect(other.getsockname())


def bind_and_connect_elsewhere() -> None:
    """To an interface first (SO_BINDTOIFINDEX), which no process without CAP_NET_RAW has it leave."""
    with _listener() as listener:
        listener.setsockopt(socket.SOL_SOCKET, 62, socket.if_nametoindex("lo"))
    connect_elsewhere()


def hear_nobody() -> None:
    """Bind it to an interface that does not exist (SO_BINDTOIFINDEX)."""
    with _listener() as listener:
        listener.setsockopt(socket.SOL_SOCKET, 62, (1 << 31) - 1)


@contextmanager
def _listener() -> Iterator[socket.socket]:
    for fd in range(3, 64):
        try:
            copy = os.dup(fd)
        except OSError:
            continue
        try:
            found = socket.socket(fileno=copy)
        except OSError:
            os.close(copy)  # no socket
            continue
        with found:
            if found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                yield found
                return
    raise LookupError("no listening socket")


ORDERS = {
    b"open nothing more": open_nothing_more,
    b"leave one number": leave_one_number,
    b"forbid accept": forbid_accept,
    b"make non-blocking": make_non_blocking,
    b"give a timeout": give_a_timeout,
    b"shut down": shut_down,
    b"hear nobody": hear_nobody,
    b"connect elsewhere": connect_elsewhere,
    b"bind and connect elsewhere": bind_and_connect_elsewhere,
}
