"""Connections of a listener that another process holds, seen in its descriptor table (pidfd_getfd(2), Linux 5.6).

It takes what ptrace(2) takes: the same user or CAP_SYS_PTRACE, and a kernel that allows it. Each socket is looked at through a copy
of its descriptor, which is closed at once; nothing of it is changed.
"""

import ctypes
import errno
import itertools
import os
import socket

from prefork.net.address import Address, peer_parts

_PIDFD_GETFD = 438  # on every architecture
# A worker has a dozen descriptors; of one with thousands so many are looked at, and a connection among the others is missed.
_MOST = 1024
_libc = ctypes.CDLL(None, use_errno=True)


def connections(pid: int, address: Address) -> list[tuple[str, int]] | None:
    """Host and port of the peers whose connections to this address the process holds; None where we may not look."""
    try:
        process = os.pidfd_open(pid)
    except OSError:  # it has gone, or the kernel has no such call
        return None
    try:
        peers: list[tuple[str, int]] = []
        with os.scandir(f"/proc/{pid}/fd") as folder:
            names = [entry.name for entry in itertools.islice(folder, _MOST)]
        for name in names:
            if not _is_socket(pid, name):
                continue
            fd = _libc.syscall(_PIDFD_GETFD, process, int(name), 0)
            if fd < 0 and ctypes.get_errno() == errno.EBADF:
                continue  # closed meanwhile
            if fd < 0:
                return None
            if (peer := _peer_of(fd, address)) is not None:
                peers.append(peer)
    except OSError:  # we may not look, or it has gone
        return None
    finally:
        os.close(process)
    return peers


def _is_socket(pid: int, name: str) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:")
    except FileNotFoundError:  # closed meanwhile
        return False


def _peer_of(fd: int, address: Address) -> tuple[str, int] | None:
    """Of a connection to that address. The descriptor is closed, whatever it is: its number may mean a pipe by now."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError:  # no socket, or one that tells no name (AF_ALG)
        os.close(fd)
        return None
    with sock:
        try:
            return _peer(sock) if _was_accepted_at(sock, address) else None
        except OSError:  # one of a kind that does not tell
            return None


def _was_accepted_at(sock: socket.socket, address: Address) -> bool:
    if sock.type != socket.SOCK_STREAM or sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return False
    here = sock.getsockname()
    if address.family == socket.AF_UNIX:
        return sock.family == socket.AF_UNIX and os.fsdecode(here).replace("\0", "@", 1) == address.host
    return sock.family in (socket.AF_INET, socket.AF_INET6) and here[1] == address.port


def _peer(sock: socket.socket) -> tuple[str, int]:
    try:
        return peer_parts(sock.family, sock.getpeername())
    except OSError:  # it has gone
        return "unknown", 0
