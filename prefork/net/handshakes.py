"""Handshakes under way at a listener: clients that the kernel has answered and not yet connected.

A client whose ``connect()`` has returned may still be no more than a request socket (SYN_RECV) here, for half a round trip or until
a lost segment was sent again. A listener that is closed before resets it. So whoever closes one turns new SYNs away, and asks here
whether any handshake is left. What this must not do: block, or have its caller wait for longer than LONGEST.

Facts this rests on (measured on Linux 6.18; sock_diag(7), inet_diag.h, proc(5)):

* sock_diag tells the request sockets of one port alone: 1.2 ms, 2.6 ms beside 10,000 connections. It needs AF_NETLINK, which
  hardened units exclude. ``/proc/self/net/tcp`` and ``tcp6`` have them, too (``ProcSubset=pid`` leaves them there), at 5 to 24 ms.
* The request sockets of a dual-stack listener are IPv6 ones, whatever the client speaks.
* The kernel sends SYN-ACK again after 1, 3 and 7 s. A request with LATE retransmissions is nobody's: a scanner's stays for 64 s.
* A client is connected when SYN-ACK arrives, which may be the one that was sent again. Of those that a lossy line keeps waiting, at
  any moment few have been sent one in the last round trip: where there is no time for all, that is the moment to close.
* A handshake by SYN cookie leaves nothing to be seen before it has ended.
"""

import errno
import os
import re
import socket
import struct
import sys
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field

# With so many retransmissions of SYN-ACK behind it a request socket is not waited for.
LATE = 3
# LATE retransmissions have happened 7 s after the SYN, if the kernel could send them; half a second for its timers.
LONGEST = 7.5
# Where there is no time for all: a client that SYN-ACK was sent to so long ago has not got it, or is too far away; and one that it
# is sent to again so soon may be sent it before the listener is closed.
FRESH, SOON = 0.3, 0.05
# What can't be seen (by SYN cookie; without netlink and /proc) has so long from the last SYN on.
UNSEEN = 1.0
# A SYN may be on its way through the kernel while its listener is told to turn such away.
FIRST_LOOK = 0.005
# Looks are as far apart, and at least ten times as long as the CPU took. By /proc each walks all sockets of the machine.
LOOK_EVERY, PROC_LOOK_EVERY, PAUSE_RATIO = 0.01, 0.1, 10.0
# A look that takes longer than this goes on in a later turn, after ten times the CPU of this one.
MOST_AT_ONCE = 0.02
# SYN cookies count as current for so long, and are read so often at most, in turns of a loop that happen anyway.
COOKIES_LAST, COOKIES_EVERY = 60.0, 10.0

# With these a way is not to be had here: a sandbox, a kernel without it, no /proc, an answer that is none. Others pass:
# no descriptors, no memory.
NOT_HERE = (
    errno.EAFNOSUPPORT,
    errno.EPROTONOSUPPORT,
    errno.EOPNOTSUPP,
    errno.EPERM,
    errno.EACCES,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ENOSYS,
    errno.EINVAL,
    None,
)

# linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h, net/tcp_states.h
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_TCP_SYN_RECV = 3
_NLMSGHDR = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_SOCKID = struct.Struct("!HH16s16s12x")  # ports, addresses; interface and cookie
_REQ = struct.Struct("=BBBxI")  # inet_diag_req_v2: family, protocol, extensions, states; then a sockid
_MSG = struct.Struct("=BBBB")  # inet_diag_msg: family, state, timer, retransmissions; then a sockid, and when the timer expires
_EXPIRES = struct.Struct("=I")  # milliseconds
_INITIAL_TIMEOUT = 1.0  # net/tcp.h; doubled with each retransmission
_TICKS = 100.0  # of /proc a second: USER_HZ
EVERY_PORT = 0
_RECEIVE = 1 << 16  # the kernel sends 32 KiB at most in one datagram
_READ = 1 << 16
# sl, local, remote, state, queues, timer, retransmissions; addresses are words as the machine has them, ports are numbers.
_LINE = re.compile(
    rb"^ *\d+: ([0-9A-F]{8}|[0-9A-F]{32}):([0-9A-F]{4}) \S+ 03 \S+ [0-9A-F]+:([0-9A-F]{1,16}) ([0-9A-F]{1,16}) ", re.MULTILINE
)


@dataclass(frozen=True, slots=True)
class Request:
    """A request socket: the address that the client wants (4 or 16 bytes, network order), how often SYN-ACK was sent again, and the
    seconds until it will be.
    """

    host: bytes
    port: int
    retransmissions: int
    expires: float

    @property
    def sent(self) -> float:
        """So many seconds ago SYN-ACK was sent last."""
        return _INITIAL_TIMEOUT * (1 << min(self.retransmissions, 7)) - self.expires


# -- what the kernel is asked, and what it says


def question(family: int, port: int) -> bytes:
    """For sock_diag: the request sockets of this port, or of EVERY_PORT."""
    body = _REQ.pack(family, socket.IPPROTO_TCP, 0, 1 << _TCP_SYN_RECV) + _SOCKID.pack(port, 0, b"", b"")
    return _NLMSGHDR.pack(_NLMSGHDR.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST | _NLM_F_DUMP, 0, 0) + body


def answered(data: bytes) -> tuple[list[Request], bool]:
    """The request sockets in one datagram of the answer, and whether it is the last. Raises OSError for an error or nonsense."""
    found: list[Request] = []
    offset = 0
    while offset < len(data):
        if len(data) - offset < _NLMSGHDR.size:
            raise OSError("half a header")
        length, kind, _, _, _ = _NLMSGHDR.unpack_from(data, offset)
        if not _NLMSGHDR.size <= length <= len(data) - offset:
            raise OSError(f"a message of {length} bytes")
        if kind == _NLMSG_DONE:
            return found, True
        body = data[offset + _NLMSGHDR.size : offset + length]
        if kind == _NLMSG_ERROR:
            code = -int.from_bytes(body[:4], sys.byteorder, signed=True)
            raise OSError(code, os.strerror(code) if 0 < code < 4096 else "no error")
        if kind == _SOCK_DIAG_BY_FAMILY:
            found += _request(body)
        offset += (length + 3) & ~3
    return found, False


def _request(body: bytes) -> list[Request]:
    if len(body) < _MSG.size + _SOCKID.size + _EXPIRES.size:
        raise OSError("half a socket")
    family, state, _, retransmissions = _MSG.unpack_from(body)
    port, _, host, _ = _SOCKID.unpack_from(body, _MSG.size)
    (expires,) = _EXPIRES.unpack_from(body, _MSG.size + _SOCKID.size)
    if state != _TCP_SYN_RECV:
        return []
    return [Request(host if family == socket.AF_INET6 else host[:4], port, retransmissions, expires / 1000)]


def listed(text: bytes) -> Iterator[Request]:
    """The request sockets in lines of /proc/net/tcp or tcp6."""
    for host, port, expires, retransmissions in _LINE.findall(text):
        words = bytes.fromhex(host.decode())
        if sys.byteorder == "little":
            words = b"".join(words[at : at + 4][::-1] for at in range(0, len(words), 4))
        yield Request(words, int(port, 16), int(retransmissions, 16), int(expires, 16) / _TICKS)


def cookies_in(text: bytes) -> int | None:
    """How many SYN cookies were sent, by /proc/net/netstat; None where it does not say."""
    lines = [line.split() for line in text.splitlines() if line.startswith(b"TcpExt:")]
    if len(lines) != 2 or len(lines[0]) != len(lines[1]):
        return None
    said = dict(zip(*lines, strict=True)).get(b"SyncookiesSent", b"")
    return int(said) if said.isdigit() else None


# -- asking it

Scan = Generator[list[Request], None, None]


def _by_sock_diag(family: int, port: int) -> Scan:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as sock:
        sock.setblocking(False)  # an answer is made while it is read, so it is there
        sock.sendto(question(family, port), (0, 0))
        last = False
        while not last:
            found, last = answered(sock.recv(_RECEIVE))
            yield found


def _by_proc(family: int, port: int) -> Scan:
    # Those of this very thread's network namespace.
    with open(f"/proc/self/net/{'tcp' if family == socket.AF_INET else 'tcp6'}", "rb", buffering=0) as file:
        rest = b""
        while more := file.read(_READ):
            text, newline, rest = (rest + more).rpartition(b"\n")
            yield [request for request in listed(text + newline) if port in (EVERY_PORT, request.port)]


@dataclass(frozen=True, slots=True)
class _Way:
    ask: Callable[[int, int], Scan]
    every: float


@dataclass(frozen=True, slots=True)
class Seen:
    """What a look has found: the request sockets by their port."""

    begun: float
    requests: dict[int, list[Request]]


class Looks:
    """The looks of a process: one serves all of its listeners that are being closed, of one family; there may be thousands.

    ``tell_blind``: called once, with the last error, when no way is left to look.
    """

    def __init__(self, tell_blind: Callable[[OSError], None] = lambda _: None) -> None:
        self._ways = [_Way(_by_sock_diag, LOOK_EVERY), _Way(_by_proc, PROC_LOOK_EVERY)]
        self._tell_blind = tell_blind
        self._families: dict[int, _Look] = {}

    def watch(self, handshakes: "Handshakes") -> None:
        """Have looks see its port, for as long as it is referred to."""
        self._families.setdefault(handshakes.family, _Look()).watching.add(handshakes)

    def due(self, family: int) -> float:
        """When the next look can be."""
        return self._families[family].due

    def seen(self, family: int, since: float, now: float) -> Seen | None:
        """What a look has found that has begun at ``since`` or later; looks if it is time. None when no such look has ended.

        Raises OSError when nothing can be seen.
        """
        look = self._families[family]
        if (look.seen is None or look.seen.begun < since) and now >= look.due:
            self._look(look, family, now)
        return look.seen if look.seen is not None and look.seen.begun >= since else None

    def rest(self) -> None:
        """Leave nothing open of a look that has not ended and that is of no use to any listener any more."""
        for look in self._families.values():
            if look.scan is not None and not look.watching:
                look.scan.close()
                look.scan = None

    def _look(self, look: "_Look", family: int, now: float) -> None:
        while self._ways:
            begun, used = time.monotonic(), time.thread_time()
            if look.scan is None:
                # What has failed may fail again, whatever the error says: the ways take turns until one look has ended.
                look.way = self._ways[look.failures % len(self._ways)]
                ports = {handshakes.port for handshakes in look.watching}
                look.scan = look.way.ask(family, ports.pop() if len(ports) == 1 else EVERY_PORT)
                look.found = Seen(now, {})
            try:
                ended = look.go_on(begun + MOST_AT_ONCE)
            except OSError as error:
                look.scan = None
                if error.errno in NOT_HERE:
                    self._ways = [way for way in self._ways if way is not look.way]
                    if not self._ways:
                        self._tell_blind(error)
                    continue
                look.failures += 1
                look.due = now + LOOK_EVERY
                return
            if ended:
                look.failures = 0
            used = time.thread_time() - used  # not what a busy machine has made it wait
            look.due = now + max(look.way.every if ended else LOOK_EVERY, PAUSE_RATIO * used)
            return
        raise OSError("request sockets can't be seen")


class _Look:
    """One that is under way, or will be, and the latest one."""

    def __init__(self) -> None:
        self.watching: weakref.WeakSet[Handshakes] = weakref.WeakSet()
        self.scan: Scan | None = None
        self.way = _Way(_by_sock_diag, LOOK_EVERY)  # of the scan
        self.found = Seen(0.0, {})
        self.seen: Seen | None = None
        self.failures = 0  # since the latest one
        self.due = float("-inf")

    def go_on(self, until: float) -> bool:
        """Whether it has come to its end before ``until``."""
        for found in self.scan or ():
            for request in found:
                self.found.requests.setdefault(request.port, []).append(request)
            if time.monotonic() >= until:
                return False
        self.scan, self.seen = None, self.found
        return True


class Handshakes:
    """The handshakes under way at a listening TCP socket that lets no new ones begin since ``since``.

    ``unseen``: there may be some that can't be seen. ``hurried``: there is no time for all of them; it is over whenever no client
    can have been connected just now, and may not be a moment later.
    """

    def __init__(self, sock: socket.socket, looks: Looks, since: float, *, unseen: bool, hurried: bool = False) -> None:
        self.family = int(sock.family)
        host, self.port = sock.getsockname()[:2]
        packed = socket.inet_pton(sock.family, host.partition("%")[0])
        self._host = packed if any(packed) else None  # every one
        self._looks = looks
        self._since = since
        self._until = since + (UNSEEN if unseen else 0.0)  # not over before
        self._hurried = hurried
        self._none_seen = False
        self._looked = since + FIRST_LOOK  # only looks from then on count
        self.look_at = self._looked
        looks.watch(self)

    def over(self, now: float) -> bool:
        """Whether none is left. Looks when a look is due, at `look_at`."""
        if now < self.look_at:
            return False
        if not self._none_seen:
            self._none_seen = now >= self._since + LONGEST or not self._seen(now)
        if not self._none_seen:
            return False
        if self._hurried:
            self._none_seen = False
            return now >= self._until
        self.look_at = self._until  # none can have begun meanwhile
        return now >= self._until

    def _seen(self, now: float) -> bool:
        """Whether one is seen, or there was no look yet."""
        try:
            seen = self._looks.seen(self.family, self._looked, now)
        except OSError:
            self._until = max(self._until, self._since + UNSEEN)
            return False
        self.look_at = min(max(self._looks.due(self.family), now + FIRST_LOOK), max(self._since + LONGEST, now + FIRST_LOOK))
        if seen is None:
            return True
        self._looked = seen.begun + FIRST_LOOK
        found = seen.requests.get(self.port, ())
        return any(self._host in (None, request.host) and self._counts(request) for request in found)

    def _counts(self, request: Request) -> bool:
        return request.sent < FRESH or request.expires < SOON if self._hurried else request.retransmissions < LATE


@dataclass(slots=True)
class Cookies:
    """Whether this network namespace has sent SYN cookies lately: two readings of the kernel's counter, compared."""

    readings: list[tuple[float, int | None]] = field(default_factory=list)  # when, and how many since the machine's boot

    def note(self, now: float) -> None:
        """Take a reading, if it is time for one."""
        if not self.readings or now >= self.readings[-1][0] + COOKIES_EVERY:
            self.readings.append((now, _cookies_sent()))
        # Of the readings that are older than what counts the latest is what is compared with.
        while len(self.readings) > 1 and self.readings[1][0] <= now - COOKIES_LAST:
            del self.readings[0]

    def lately(self, now: float) -> bool:
        """Whether some were sent within COOKIES_LAST, or since the last reading before that; true where the kernel doesn't say."""
        self.note(now)
        before, sent = self.readings[0][1], _cookies_sent()
        return before is None or sent is None or sent != before


def _cookies_sent() -> int | None:
    try:
        with open("/proc/self/net/netstat", "rb") as file:
            return cookies_in(file.read())
    except OSError:
        return None
