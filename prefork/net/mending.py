"""Putting a listening socket right that user code has spoilt: every worker has it, and what one does to it is done to all.

What is looked for can be read in microseconds, and put back without privilege. Most of what setsockopt(2) knows is not looked for:
what has an error is, and what one look finds beside it. Facts (Linux 6.1 to 6.18; net/ipv4/af_inet.c, tcp.c, net/unix/af_unix.c):

* accept(2) reads O_NONBLOCK and SO_RCVTIMEO when it is entered, so workers that wait there already are not disturbed. Connections
  inherit the time-out of the listener when their handshake ends.
* ``shutdown`` of a TCP listener is a disconnect: it resets the queue and leaves a closed socket that can listen again. Its port
  stays bound when bind(2) was told which; one that the kernel chose (port 0) is lost, and is bound again by its number.
* ``shutdown`` of a Unix listener is for good.
"""

import errno
import os
import select
import socket
import struct

from prefork.net.address import Address, interface_of, socket_address

TIMEVAL = struct.Struct("@ll")  # struct timeval: what SO_RCVTIMEO and SO_SNDTIMEO take
_SO_DETACH_FILTER = 27
SO_BINDTOIFINDEX = 62


def unblock(sock: socket.socket) -> list[str]:
    """Have accept() wait for a connection again. Returns what was in the way. Raises OSError where that can't be had."""
    undone = []
    if not os.get_blocking(sock.fileno()):
        os.set_blocking(sock.fileno(), True)
        undone.append("O_NONBLOCK")
    if any(TIMEVAL.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, TIMEVAL.size))):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, bytes(TIMEVAL.size))
        undone.append("SO_RCVTIMEO")
    return undone


def is_open(sock: socket.socket) -> bool:
    """Whether a listening socket was not shut down."""
    if sock.family != socket.AF_UNIX:
        return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return not poll.poll(0)


def mend(sock: socket.socket, address: Address, backlog: int | None) -> list[str]:
    """Have a listening socket listen as it did. Returns what was wrong. Raises OSError when it can't: only a new one will do.

    ``backlog``: None for somebody else's socket, whose queue, filter and interface are theirs.
    """
    undone = unblock(sock)
    if not is_open(sock):
        if sock.family == socket.AF_UNIX:
            raise OSError(errno.ESHUTDOWN, "it was shut down")
        try:
            sock.bind(socket_address(address))
        except OSError as error:
            if error.errno != errno.EINVAL:  # it is bound still
                raise
        sock.listen(socket.SOMAXCONN if backlog is None else backlog)
        undone.append("shutdown")
    if backlog is not None:
        undone += _open_to_all(sock, address)
        sock.listen(backlog)
    return undone


def _open_to_all(sock: socket.socket, address: Address) -> list[str]:
    undone = []
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)
        undone.append("SO_ATTACH_FILTER")
    except OSError as error:
        if error.errno != errno.ENOENT:  # there is none
            raise
    if sock.family != socket.AF_UNIX:
        try:
            # A link-local address is bound to its interface by bind(2); getsockname(2) would say which one it is bound to now.
            interface = interface_of(address)
        except OSError:  # it has another name by now, or is gone: the socket is as good as any other
            return undone
        if sock.getsockopt(socket.SOL_SOCKET, SO_BINDTOIFINDEX) != interface:
            sock.setsockopt(socket.SOL_SOCKET, SO_BINDTOIFINDEX, interface)
            undone.append("SO_BINDTOIFINDEX")
    return undone
