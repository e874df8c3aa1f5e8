"""Listening sockets: how they are opened, watched, accepted from, and closed without losing anybody.

Facts this rests on (measured; socket(7), tcp(7), unix(7)):

* One shared listener per address: closing one of several SO_REUSEPORT sockets resets what waits in its queue.
* The length of a TCP listener's queue is ``tcpi_unacked`` in TCP_INFO, its limit ``tcpi_sacked``.
* A stop that waits for the queue to empty never ends under load, and ``listen(fd, 0)`` first still loses connections. A classic
  BPF filter that drops segments with SYN and without ACK empties the queue in milliseconds, with nobody lost; clients turned
  away retry and reach the successor, or are refused.
* Some kernels (seen: 6.18) want CAP_NET_ADMIN for a filter on a TCP socket. A listener that is bound to an interface that does not
  exist (SO_BINDTOIFINDEX; without privilege since 5.7) is not found for a SYN, whose sender is refused, while a handshake that is
  under way ends as it began.
* A handshake that is under way then ends only while there is a listener: `prefork.net.handshakes` tells when none is left.
* ``shutdown`` on a listener ends ``accept`` (EINVAL) in every process that shares it and frees the port, whoever holds a copy.
"""

import array
import errno
import fcntl
import os
import select
import socket
import struct
from dataclasses import dataclass
from enum import Enum
from typing import Any

from prefork.errors import AddressError, NotPermittedError, call_of, explained
from prefork.net.address import Address, socket_address
from prefork.net.handshakes import Handshakes, Looks
from prefork.net.mending import SO_BINDTOIFINDEX, is_open
from prefork.net.unix import UNCHANGED, dress, held_by, inode_of, open_unix, remove
from prefork.system import replacing

# struct tcp_info: eight bytes, then 32-bit fields: rto, ato, snd_mss, rcv_mss, unacked, sacked (linux/tcp.h).
_TCP_INFO_UNACKED, _TCP_INFO_SACKED = 24, 28
_SO_ATTACH_FILTER = 26
_FAMILIES = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
# The highest index that an interface can have, and no interface has.
_NOWHERE = (1 << 31) - 1
# BPF over the TCP header: load byte 13 (flags), keep SYN and ACK, drop when only SYN is set, else take the whole segment.
_DROP_SYN = [(0x30, 0, 0, 13), (0x54, 0, 0, 0x12), (0x15, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF)]
# How often the queue has to be found empty, one look after the other, before it counts as empty; two of them after no handshake was
# left: one that ends is for a moment neither a request socket nor in the queue.
EMPTY_LOOKS = 3
# With the master dead: how long handshakes may take to end and the queue to empty, before the listener is closed under whoever is
# still in it. The next start can't bind before, and systemd tries it after a second (RestartSec).
FAREWELL = 0.8


class Verdict(Enum):
    """What an accept error means for the worker."""

    RETRY = "retry"
    PAUSE = "pause"
    LEAVE = "leave"
    BLOCK_AGAIN = "block again"
    SHUT_DOWN = "shut down"
    OUT_OF_USE = "out of use"  # for who was asked to leave; loud for anybody else


# accept(2): pending network errors of the new connection are retried at once. What the machine lacks is waited out; EMFILE is this
# process' own want, and comes back at once, with an empty queue too (a loop that retries spins 181,000 times a second). ENOTSOCK is
# /dev/null in the listener's place, EBADF nothing there, EINVAL a listener that was shut down. EAGAIN: user code has made the
# shared socket non-blocking, or given it a time-out. EPERM is a firewall's word of one connection, or a sandbox's of all.
# Whatever is not here, an OSError without errno (TimeoutError from a left-over alarm) included, ends the worker loudly.
ACCEPT_ERRORS: dict[int | None, Verdict] = {
    **dict.fromkeys(
        [
            errno.ECONNABORTED,
            errno.EPROTO,
            errno.ENETDOWN,
            errno.ENETUNREACH,
            errno.EHOSTDOWN,
            errno.EHOSTUNREACH,
            errno.ENONET,
            errno.ENOPROTOOPT,
            errno.EOPNOTSUPP,
            errno.ETIMEDOUT,
            errno.EPERM,
        ],
        Verdict.RETRY,
    ),
    **dict.fromkeys([errno.ENFILE, errno.ENOBUFS, errno.ENOMEM], Verdict.PAUSE),
    errno.EMFILE: Verdict.LEAVE,
    errno.EAGAIN: Verdict.BLOCK_AGAIN,
    errno.EINVAL: Verdict.SHUT_DOWN,
    **dict.fromkeys([errno.ENOTSOCK, errno.EBADF], Verdict.OUT_OF_USE),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a configuration says of every listener. The options of TCP are inherited by the connections (tcp(7))."""

    backlog: int
    nodelay: bool = True
    keepalive: bool = False


@dataclass(slots=True, eq=False)
class Listener:
    """One bound, listening, blocking socket, and what is needed to close it properly.

    ``configured`` is the address as asked for, ``address`` the real one. ``inode`` is set for a Unix socket's path. One that is
    not ``ours`` was opened by somebody who keeps it: it is never filtered, shut down or unlinked, and its queue is theirs.
    """

    configured: Address
    address: Address
    sock: socket.socket
    inode: tuple[int, int] | None = None
    ours: bool = True
    empty_looks: int = 0
    handshakes: Handshakes | None = None  # those that were under way when new clients began to be turned away

    def fileno(self) -> int:
        return self.sock.fileno()

    def queue(self) -> tuple[int, int] | None:
        """Length and limit of the accept queue; None where the kernel doesn't say (Unix sockets), and once it is closed."""
        if self.address.family == socket.AF_UNIX or self.sock.fileno() == -1:
            return None
        info = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        (unacked,) = struct.unpack_from("=I", info, _TCP_INFO_UNACKED)
        (sacked,) = struct.unpack_from("=I", info, _TCP_INFO_SACKED)
        return unacked, sacked

    def accepts(self) -> bool:
        """Whether accept() can return a connection, now or later; false of one that was shut down, or closed."""
        return self.sock.fileno() != -1 and is_open(self.sock)

    def turn_away(self, now: float, looks: Looks, *, cookies: bool, hurried: bool = False) -> None:
        """Let no new client in; those whom the kernel has connected, or is about to, can still be accepted.

        ``cookies``: clients may have been answered with SYN cookies just now. ``hurried``: there is no time for lost segments.
        Raises nothing for what a handler has made of the socket.
        """
        self.empty_looks = 0
        if not self.ours or self.sock.fileno() == -1:
            return
        if self.address.family == socket.AF_UNIX:
            self._unlink()
            return
        if not self.accepts():  # a handler has shut it down, and may have connected it elsewhere since
            return
        self.watch_handshakes(now, looks, cookies=cookies, hurried=hurried)
        program = array.array("B", b"".join(struct.pack("=HBBI", *step) for step in _DROP_SYN))
        address, _ = program.buffer_info()
        try:
            self.sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", len(_DROP_SYN), address))
        except OSError:  # no right to it, no room for it (optmem_max), or a sandbox without it
            self._hear_nobody()

    def _hear_nobody(self) -> None:
        """Without the right to a filter: hear an interface that does not exist."""
        try:
            self.sock.setsockopt(socket.SOL_SOCKET, SO_BINDTOIFINDEX, _NOWHERE)
        except OSError:
            try:
                # To leave an interface, even for the same one, takes CAP_NET_RAW: another process may have done this before.
                done = self.sock.getsockopt(socket.SOL_SOCKET, SO_BINDTOIFINDEX) == _NOWHERE
            except OSError:
                done = False
            if not done:  # a handler has bound it to another one; Linux before 5.7
                self._let_one_in_at_a_time()

    def _let_one_in_at_a_time(self) -> None:
        """The deadline of whoever turns them away is the end."""
        try:
            self.sock.listen(0)
        except OSError as error:
            if error.errno != errno.EINVAL:  # shut down and connected elsewhere this very moment: no client is left to turn away
                raise

    def watch_handshakes(self, since: float, looks: Looks, *, cookies: bool, hurried: bool = False) -> None:
        """New clients are turned away ``since`` then: see to those that had begun."""
        if self.ours and self.address.family != socket.AF_UNIX and self.sock.fileno() != -1:
            self.handshakes = Handshakes(self.sock, looks, since, unseen=cookies, hurried=hurried)

    def settled(self, now: float) -> bool:
        """Whether no handshake is under way any more, once new clients are turned away."""
        if self.handshakes is None:
            return True
        if self.sock.fileno() != -1 and not self.handshakes.over(now):
            return False
        self.handshakes = None
        self.empty_looks = min(self.empty_looks, 1)
        return True

    def drained(self) -> bool:
        """Look once more whether the queue is empty; true when it was so EMPTY_LOOKS times running."""
        if not self.ours or not self.accepts():
            return True
        queue = self.queue()
        if queue is None:
            poll = select.poll()
            poll.register(self.sock, select.POLLIN)
            length = len(poll.poll(0))
        else:
            length = queue[0]
        self.empty_looks = self.empty_looks + 1 if length == 0 else 0
        return self.empty_looks >= EMPTY_LOOKS

    def close(self) -> None:
        """Free the address, whoever else holds a copy of the socket, and reset whoever still waits in its queue.

        A second time does nothing.
        """
        if self.sock.fileno() == -1:
            return
        self.handshakes = None
        if self.ours:
            self.shut_down()
            self._unlink()
        self.sock.close()

    def shut_down(self) -> None:
        """End accept() and free a TCP address, whoever holds a copy of the socket; user code may have done so at any moment."""
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            if error.errno != errno.ENOTCONN:  # it was shut down before
                raise

    def apply(self, wanted: Address, settings: Settings, owner: tuple[int, int] = UNCHANGED) -> None:
        """Take over what a reload may change of an address that stays: TCP options, the queue's limit, a path's mode and owner.

        Raises OSError when the machine does not let us; the socket serves on as it was.
        """
        _set_options(self.sock, settings)
        if self.ours:
            self.sock.listen(settings.backlog)
        if self.inode is not None and wanted != self.configured and inode_of(wanted.host) == self.inode:
            dress(wanted.host, self.inode, wanted.mode, owner)
        self.configured = wanted

    @property
    def is_swept(self) -> bool:
        """Whether the path that we have given a Unix socket was removed, or is something else's by now: no client finds it."""
        return self.inode is not None and replacing.is_swept(self.address.host, self.inode)

    def owner(self) -> tuple[int, int]:
        """Uid and gid of a Unix socket's path, for `apply`; UNCHANGED when it has none that is ours."""
        try:
            found = os.lstat(self.address.host)
        except OSError:  # removed, or never there: no path at all
            return UNCHANGED
        return (found.st_uid, found.st_gid) if (found.st_dev, found.st_ino) == self.inode else UNCHANGED

    def _unlink(self) -> None:
        if self.inode is not None and inode_of(self.address.host) == self.inode:
            remove(self.address.host)
        self.inode = None


def _set_options(sock: socket.socket, settings: Settings) -> None:
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, settings.nodelay)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, settings.keepalive)


def open_listener(wanted: Address, settings: Settings, owner: tuple[int, int] = UNCHANGED, *, find_holder: bool = True) -> Listener:
    """Bind and listen. ``owner``: uid and gid of a Unix socket's path, -1 to leave it.

    ``find_holder``: look through all processes for the one that has a port which is taken. With 10,000 of them that takes seconds.
    Raises AddressError or NotPermittedError, naming the address and what would help.
    """
    try:
        if wanted.family == socket.AF_UNIX:
            sock, inode = open_unix(wanted.host, wanted.mode, settings.backlog, owner)
            return Listener(wanted, wanted, sock, inode)
        sock = socket.socket(wanted.family, socket.SOCK_STREAM)
        try:
            sock.setblocking(True)  # whatever default time-out the program has that runs prefork.Server
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if wanted.family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if wanted.host == "" else 1)
            _set_options(sock, settings)
            sock.bind(socket_address(wanted))
            sock.listen(settings.backlog)
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        raise _explain(wanted, error, find_holder=find_holder) from None
    real = Address(wanted.family, wanted.host, sock.getsockname()[1])
    return Listener(wanted, real, sock)


def adopt_inherited(wanted: Address, settings: Settings) -> Listener:
    """The listening socket that stands at descriptor ``wanted.port``: somebody else has bound it, and keeps it.

    The descriptor itself is left open, so that its number never becomes another's. Raises AddressError when it is no listening
    stream socket.
    """
    try:
        sock = socket.socket(fileno=fcntl.fcntl(wanted.port, fcntl.F_DUPFD_CLOEXEC, 3))
    except OSError as error:
        raise AddressError(f"{wanted}: descriptor {wanted.port} is no socket: {error.strerror}") from None
    try:
        listens = sock.type == socket.SOCK_STREAM and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if not listens or sock.family not in _FAMILIES:
            raise AddressError(f"{wanted}: descriptor {wanted.port} is not a listening stream socket (TCP or Unix)")
        # The description is shared with whoever passed it; acceptors block.
        sock.setblocking(True)
        try:
            _set_options(sock, settings)
        except OSError:  # SCTP has streams, too
            raise AddressError(f"{wanted}: descriptor {wanted.port} is not a listening stream socket (TCP or Unix)") from None
        return Listener(wanted, _name_of(sock), sock, ours=False)
    except BaseException:
        sock.close()
        raise


def address_at(fd: int) -> Address | None:
    """Where the listening stream socket at a descriptor listens, as a user would write it; None when there is none."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError:
        return None
    try:
        if sock.family not in _FAMILIES or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return None
        return _name_of(sock)
    finally:
        sock.detach()


def _name_of(sock: socket.socket) -> Address:
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        # An abstract name begins with NUL, and is written with @ (unix(7)).
        shown = os.fsdecode(name)
        return Address(socket.AF_UNIX, "@" + shown[1:] if shown.startswith("\0") else shown)
    is_both = name[0] == "::" and not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
    return Address(int(sock.family), "" if is_both else name[0], name[1])


def _explain(wanted: Address, error: OSError, *, find_holder: bool) -> Exception:
    match error.errno:
        case errno.EADDRINUSE if wanted.family != socket.AF_UNIX and not find_holder:
            return AddressError(f"{wanted} is in use: `ss -ltnp sport = :{wanted.port}` tells by which process")
        case errno.EADDRINUSE:
            return AddressError(f"{wanted} is in use{_holder(wanted)}")
        case errno.EADDRNOTAVAIL if "%" in wanted.host:
            interface = wanted.host.partition("%")[2]
            return AddressError(
                f"{wanted}: interface {interface} has no such address: `ip addr show dev {interface}` lists those it has"
            )
        case errno.EADDRNOTAVAIL:
            return AddressError(f"{wanted}: this machine has no such address; 0.0.0.0 or :{wanted.port} listens on all it has")
        case errno.ENODEV:
            return AddressError(
                f"{wanted}: this machine has no interface {wanted.host.partition('%')[2]}: `ip link` lists those it has"
            )
        case errno.EAFNOSUPPORT if wanted.family == socket.AF_INET6:
            host = "127.0.0.1" if wanted.host == "::1" else "0.0.0.0"  # noqa: S104 - what :PORT means without IPv6
            return AddressError(
                f"{wanted}: there is no IPv6 here: take {host}:{wanted.port}, or allow it (ipv6.disable of the kernel, "
                "RestrictAddressFamilies= in a unit)"
            )
        case errno.EACCES | errno.EPERM if wanted.family != socket.AF_UNIX and 0 < wanted.port < _first_free_port():
            return NotPermittedError(
                f"{wanted}: only root may bind a port below {_first_free_port()} (net.ipv4.ip_unprivileged_port_start): take a "
                "higher one, or grant CAP_NET_BIND_SERVICE"
            )
        case errno.EACCES | errno.EPERM if wanted.family != socket.AF_UNIX:
            return NotPermittedError(
                f"{wanted}: {error.strerror}: a sandbox forbids {call_of(error)}: see SocketBindDeny= and SystemCallFilter= in a "
                "unit, SELinux (semanage port) and AppArmor"
            )
        case errno.ENOENT:
            return AddressError(f"{wanted}: the directory {os.path.dirname(wanted.host)} does not exist")
        case errno.ENOTDIR:
            return AddressError(f"{wanted}: {os.path.dirname(wanted.host)} is no directory")
        case errno.EACCES | errno.EPERM if wanted.user or wanted.group:
            return NotPermittedError(f"{wanted}: no permission to create a socket there and give it away: {wanted.text}")
        case errno.EACCES | errno.EPERM:
            return NotPermittedError(f"{wanted}: no permission to create a socket there")
        case _:
            return AddressError(f"{wanted}: {explained(error)}")


def _first_free_port() -> int:
    """The lowest port that takes no privilege (ip(7))."""
    try:
        with open("/proc/sys/net/ipv4/ip_unprivileged_port_start", "rb") as file:
            return int(file.read())
    except OSError:  # ProcSubset=pid
        return 1024


def _holder(wanted: Address) -> str:
    """Who holds the port, as far as /proc lets us see; an empty text when it does not."""
    try:
        import psutil  # noqa: PLC0415 - slow to import, and only needed when an address is taken
    except (ImportError, OSError):  # removed while we run, as a whole environment may be; or no descriptors to read it
        return ""

    def holding(connections: list[Any]) -> list[Any]:
        """Listeners first: a connection from that port to somewhere holds it, too."""
        found = [c for c in connections if c.laddr and c.laddr[1] == wanted.port]
        return sorted(found, key=lambda c: c.status != psutil.CONN_LISTEN)

    def inherited_from(parent: Any) -> bool:
        try:
            return bool(holding(parent.net_connections("tcp")))
        except psutil.AccessDenied:  # another user's; or a prefork's own processes, whose descriptors are root's to see
            return bool(parent.name().startswith("prefork:"))

    try:
        found = holding(psutil.net_connections("tcp"))
        pid = next((c.pid for c in found if c.pid), None)
        if pid is None:
            return " by another user's process, which root can see" if found and os.geteuid() != 0 else ""
    except (OSError, psutil.Error):
        return ""
    # Children inherit it: name the oldest of the family that can be looked at, whom somebody can stop.
    try:
        holder = psutil.Process(pid)
        while (parent := holder.parent()) is not None and inherited_from(parent):
            holder, pid = parent, parent.pid
    except (OSError, psutil.Error):  # it has gone, or /proc hides what is another user's (hidepid)
        pass
    return held_by(pid)
