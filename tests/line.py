"""A line with a delay, and loss: the same machine, seen over it as if it were another host. For tests of what is lost on the way.

    with line(0.1, loss=0.01):
        ...  # who listens on HERE is reached as FAR, 100 ms there and back

A tun device takes the kernel's packets and gives them back later, from one address to another: HERE sends to FAR, which arrives at
HERE as if sent by PEER, and the other way round. The addresses are such that exchanging them leaves checksums as they are.

The device is made in a network namespace of one's own: `OWN` is what a command has to be started by. ``python -m tests.line`` is
the process that moves the packets; it ends with its standard input.
"""

import array
import contextlib
import fcntl
import functools
import os
import random
import select
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

HERE, FAR, PEER = "10.9.0.1", "10.9.10.8", "10.8.10.9"
FLOODED = 7001
_NETWORK = (10 << 24) | (8 << 16)  # all three are in 10.8.0.0/15
_MASK = "255.254.0.0"
# A new network namespace, and for a user without the right to one a user namespace of their own.
OWN = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--net"]

# linux/if_tun.h, linux/sockios.h, linux/if.h
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x1, 0x1000
_SIOCSIFADDR, _SIOCSIFNETMASK, _SIOCSIFFLAGS, _IFF_UP = 0x8916, 0x891C, 0x8914, 0x1
_DEVICE = b"line0"
_PACKET = 4096
# Packets taken between two looks at what is due.
_AT_ONCE = 64
_CONNECTED = "ready\n"


@functools.cache
def missing() -> str:
    """Why there can be no line here; empty when there can."""
    try:
        done = subprocess.run(
            [*OWN, sys.executable, "-m", "tests.line"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return "unshare is not installed"
    if done.returncode == 0 and done.stdout == _CONNECTED:
        return ""
    said = done.stderr.strip().splitlines() or ["nothing was said"]
    return f"no line with a delay: a network namespace with a tun device can't be had: {said[-1]}"


def needed() -> None:
    """Skip a test where there can be no line; in CI that is a failure."""
    if reason := missing():
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


@contextmanager
def line(delay: float, *, loss: float = 0.0, seed: int = 0, flood: float = 0.0) -> Iterator[None]:
    """Between HERE and FAR, with ``delay`` seconds there and back, each packet lost with probability ``loss``.

    ``flood``: so many SYNs a second from addresses that never answer, to port FLOODED of HERE. Called in a network namespace of
    one's own.
    """
    command = [sys.executable, "-m", "tests.line", str(delay), str(loss), str(seed), str(flood)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == _CONNECTED, "the line's process has said why"
            yield
            assert process.poll() is None, "the line has ended before its time"
        finally:
            process.kill()


class Line:
    """The process between."""

    def __init__(self, delay: float, loss: float, seed: int, flood: float) -> None:
        self.delay, self.loss, self.flood = delay / 2, loss, flood
        self.chance = random.Random(seed)
        self.fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.ioctl(self.fd, _TUNSETIFF, struct.pack("16sH22x", _DEVICE, _IFF_TUN | _IFF_NO_PI))
        _up(_DEVICE, HERE)
        _up(b"lo", "127.0.0.1")
        here, far, peer = (socket.inet_aton(address) for address in (HERE, FAR, PEER))
        self.ways = {here + far: peer + here, here + peer: far + here}
        self.on_the_way: deque[tuple[float, bytes]] = deque()

    def run(self) -> None:
        """Until standard input ends."""
        begun, sent = time.monotonic(), 0
        poll = select.poll()
        for fd in (self.fd, 0):
            poll.register(fd, select.POLLIN)
        while True:
            now = time.monotonic()
            wait = self.on_the_way[0][0] - now if self.on_the_way else 1.0
            if self.flood:
                due = int((now - begun) * self.flood)
                for _ in range(due - sent):
                    self._give(self._stranger())
                sent = due
                wait = min(wait, 0.001)
            ready = {fd for fd, _ in poll.poll(1000 * max(0.0, wait))}
            if 0 in ready and not os.read(0, 1):
                return
            if self.fd in ready:
                self._take(time.monotonic() + self.delay)
            now = time.monotonic()
            while self.on_the_way and self.on_the_way[0][0] <= now:
                self._give(self.on_the_way.popleft()[1])

    def _take(self, due: float) -> None:
        for _ in range(_AT_ONCE):
            try:
                packet = os.read(self.fd, _PACKET)
            except BlockingIOError:
                return
            # IPv4 has its addresses there; what is for others (strangers, IPv6's own talk) is nobody's.
            other = self.ways.get(packet[12:20]) if packet[0] >> 4 == 4 else None
            if other is not None and not (self.loss and self.chance.random() < self.loss):
                self.on_the_way.append((due, packet[:12] + other + packet[20:]))

    def _give(self, packet: bytes) -> None:
        with contextlib.suppress(OSError):  # no room: lost, as on any line
            os.write(self.fd, packet)

    def _stranger(self) -> bytes:
        """A SYN from an address of this network that nobody has."""
        source = struct.pack("!I", _NETWORK | self.chance.randrange(1 << 16))
        addresses = source + socket.inet_aton(HERE)
        syn = struct.pack(
            "!HHIIBBHHH", self.chance.randrange(1024, 65536), FLOODED, self.chance.getrandbits(32), 0, 5 << 4, 2, 64240, 0, 0
        )
        check = _checksum(addresses + struct.pack("!HH", socket.IPPROTO_TCP, len(syn)) + syn)
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(syn), 0, 0, 64, socket.IPPROTO_TCP, 0)
        head = head[:10] + struct.pack("!H", _checksum(head + addresses)) + addresses
        return head + syn[:16] + struct.pack("!H", check) + syn[18:]


def _checksum(data: bytes) -> int:
    words = array.array("H", data)
    words.byteswap()
    total = sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _up(device: bytes, address: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for what, value in ((_SIOCSIFADDR, address), (_SIOCSIFNETMASK, _MASK if address == HERE else "255.0.0.0")):
            named = struct.pack("16sH2x4s8x8x", device, socket.AF_INET, socket.inet_aton(value))
            fcntl.ioctl(sock, what, named)
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sH22x", device, _IFF_UP))


if __name__ == "__main__":
    given = [float(value) for value in sys.argv[1:]] or [0.0, 0.0, 0.0, 0.0]
    between = Line(given[0], given[1], int(given[2]), given[3])
    print(_CONNECTED, end="", flush=True)
    between.run()
