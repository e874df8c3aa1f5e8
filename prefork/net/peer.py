"""Whether a connection's client has gone: what the kernel says of the socket, asked when a handler has raised.

The exception does not tell: a handler's own connections (a database that is down) end with the same errors. Measured on Linux 6.18
(net/ipv4/tcp.c, net/unix/af_unix.c):

* A TCP socket is in state CLOSE once the client has reset the connection, was not heard of in time, or has ended its direction
  after we had ended ours. A client that has closed, or half-closed, and that we have not written to since, is CLOSE_WAIT: it may
  be waiting for its answer. Our own shutdown() in both directions is FIN_WAIT.
* The error itself is told once: after a reset the first call is ECONNRESET, further recv() are the end of input, and a send() is
  EPIPE. getpeername() and shutdown() are ENOTCONN. What TLS makes of EPIPE is SSLEOFError.
* ETIMEDOUT (TCP_USER_TIMEOUT, keepalive) and ECONNABORTED (``ss -K``) leave the socket in state CLOSE as well.
* SO_PEERNAME gives the client's address in state CLOSE, too, where getpeername(2) does not.
* A Unix socket has POLLHUP when its peer has closed it, and after a shutdown in both directions, whoever it was by; POLLERR when
  the peer had not read everything.

User code may have closed the descriptor, or put another file there. So it counts only if it still is that connection, by the name
that accept() gave; otherwise nothing shows that the client has gone.
"""

import ctypes
import errno
import os
import select
import socket
import sys
from typing import Any

# What a call on a connection fails with when its peer has gone; of routers' errors (icmp(7)) those that name network or host.
GONE_ERRORS = frozenset(
    {
        errno.ENOTCONN,
        errno.EPIPE,
        errno.ESHUTDOWN,
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.ETIMEDOUT,
        errno.EHOSTUNREACH,
        errno.EHOSTDOWN,
        errno.ENETUNREACH,
        errno.ENETDOWN,
        errno.ENETRESET,
        errno.ENONET,
        errno.EPROTO,
    }
)
_TCP_CLOSE = 7
_SO_PEERNAME = 28
# struct sockaddr_in and sockaddr_in6: family, port, and at these bytes the address (ip(7), ipv6(7)).
_ADDRESSES = {socket.AF_INET: (16, slice(4, 8)), socket.AF_INET6: (28, slice(8, 24))}
# struct sockaddr_storage.
_NAME_BYTES = 128
_libc = ctypes.CDLL(None, use_errno=True)
# The C field: a subclass of user code's may call something else so.
_errno_of: Any = OSError.__dict__["errno"].__get__


def may_be_told_by_peer(error: BaseException) -> bool:
    """Whether this is an error by which a connection tells that its peer has gone. ECONNREFUSED is one that was never there."""
    kind = type(error)
    if not issubclass(kind, OSError) or issubclass(kind, ConnectionRefusedError):
        return False
    if issubclass(kind, ConnectionError) or issubclass(kind, getattr(sys.modules.get("_ssl"), "SSLEOFError", ())):
        return True
    number = _errno_of(error)
    return type(number) is int and number in GONE_ERRORS


def has_gone(fd: int, listener: int, family: int, client: Any) -> bool:
    """Whether ``fd`` is the connection that was accepted from ``listener`` with the address ``client``, and its client has gone.

    By number: the socket object may have been detached, and another one (an SSLSocket) made of it.
    """
    try:
        if family == socket.AF_UNIX:  # clients have no name: a connection has its listener's
            return _name(fd) == _name(listener) and _is_hung_up(fd)
        size, packed = _ADDRESSES[socket.AddressFamily(family)]
        name = _option(fd, socket.SOL_SOCKET, _SO_PEERNAME, size)
        host, port = client[0].partition("%")[0], client[1]
        if name[2:4] != port.to_bytes(2) or name[packed] != socket.inet_pton(family, host):
            return False
        return _option(fd, socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE
    except OSError:  # closed by user code, or another file
        return False


def _is_hung_up(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, 0)
    return bool(poll.poll(0))


# Through C: a socket object made of the number would get the default time-out, which sets O_NONBLOCK for whoever shares the file.


def _option(fd: int, level: int, option: int, size: int) -> bytes:
    value, length = ctypes.create_string_buffer(size), ctypes.c_uint(size)
    _check(_libc.getsockopt(fd, level, option, value, ctypes.byref(length)))
    return value.raw[: length.value]


def _name(fd: int) -> bytes:
    value, length = ctypes.create_string_buffer(_NAME_BYTES), ctypes.c_uint(_NAME_BYTES)
    _check(_libc.getsockname(fd, value, ctypes.byref(length)))
    return value.raw[: length.value]


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
