"""Clients to count with: short connections in a closed loop or at a steady pace, or held ones, each byte checked, each failure
classed.
"""

import os
import socket
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple, Self

from prefork.testing import connect

SIZE = 64
# Between two round trips on a connection that is held.
PAUSE = 0.05


class Failure(NamedTuple):
    """A connection that was not answered in full: when (monotonic), its class, and its own address as the daemon knows it."""

    at: float
    kind: str
    peer: str = ""


@dataclass(slots=True)
class Tally:
    """What one client saw. ``worst``: the longest round trip in seconds; a connection's first one begins with the connect."""

    connections: int = 0
    failures: list[Failure] = field(default_factory=list)
    refused: int = 0
    worst: float = 0.0

    def waited_since(self, begun: float) -> None:
        """A wait that began then is over."""
        self.worst = max(self.worst, time.monotonic() - begun)

    def failed(self, begun: float, kind: str, peer: str) -> None:
        """A connection ended in a failure, and so did a wait that began then."""
        self.waited_since(begun)
        self.failures.append(Failure(time.monotonic(), kind, peer))


class Load:
    """``clients`` threads that connect, send 64 bytes, check the echo and close, until the block ends.

    ``rate`` (connections a second, all clients together) paces them, and who was held up catches up; without it each connects
    again at once. ``reset`` closes with RST. ``held``: each keeps its connection until the end, with a round trip now and then. A
    refused connection is counted apart and the client goes on (a stop, a dead master). ``timeout``: how long each waits for an
    answer, and, unless ``connect_timeout`` says otherwise, for its handshake.
    """

    def __init__(
        self,
        address: Any,
        clients: int = 4,
        rate: float | None = None,
        *,
        reset: bool = False,
        held: bool = False,
        timeout: float = 10.0,
        connect_timeout: float | None = None,
    ) -> None:
        self.address = address
        self.reset = reset
        self.held = held
        self.clients = clients
        self.timeout = timeout
        self.connect_timeout = timeout if connect_timeout is None else connect_timeout
        self.interval = clients / rate if rate else 0.0
        self._stopped = threading.Event()
        self._tallies = [Tally() for _ in range(clients)]
        self._threads = [threading.Thread(target=self._run, args=(tally,)) for tally in self._tallies]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """End all clients, each after its connection."""
        self.end_soon()
        for thread in self._threads:
            thread.join()

    def end_soon(self) -> None:
        """Tell all clients to end, and do not wait for it."""
        self._stopped.set()

    @property
    def connections(self) -> int:
        """Connections that were answered in full."""
        return sum(tally.connections for tally in self._tallies)

    @property
    def failures(self) -> list[Failure]:
        """Everything else, but for the refused, in order of time."""
        return sorted(failure for tally in self._tallies for failure in tally.failures)

    @property
    def classes(self) -> dict[str, int]:
        """The failures by class."""
        return dict(Counter(failure.kind for failure in self.failures))

    @property
    def refused(self) -> int:
        """Connections that the kernel refused: nobody was there to lose them."""
        return sum(tally.refused for tally in self._tallies)

    @property
    def worst(self) -> float:
        """The longest that a client waited for its answer, in seconds."""
        return max(tally.worst for tally in self._tallies)

    def _run(self, tally: Tally) -> None:
        due = time.monotonic()
        while not self._stopped.is_set():
            self._one(tally)
            if self.interval:
                due += self.interval
                self._stopped.wait(max(0.0, due - time.monotonic()))

    def _one(self, tally: Tally) -> None:
        begun = time.monotonic()
        try:
            sock = connect(self.address, self.connect_timeout)
            sock.settimeout(self.timeout)
        except (ConnectionRefusedError, FileNotFoundError):
            tally.refused += 1
            self._stopped.wait(0.01)
            return
        except OSError as error:
            tally.failures.append(Failure(time.monotonic(), f"connect: {type(error).__name__}"))
            return
        with sock:
            peer = name_of(sock)
            try:
                failure = _round_trip(sock)
                tally.waited_since(begun)
                while failure is None and self.held and not self._stopped.wait(PAUSE):
                    begun = time.monotonic()
                    failure = _round_trip(sock)
                    tally.waited_since(begun)
                if self.reset:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            except OSError as error:
                failure = type(error).__name__
        if failure is None:
            tally.connections += 1
        else:
            tally.failed(begun, failure, peer)


def _round_trip(sock: socket.socket) -> str | None:
    """Send, receive, compare. Returns the class of a failure."""
    sent = os.urandom(SIZE)
    sock.sendall(sent)
    got = b""
    while len(got) < SIZE and (data := sock.recv(SIZE)):
        got += data
    if got == sent:
        return None
    return "cut" if sent.startswith(got) else "wrong bytes"


def name_of(sock: socket.socket) -> str:
    """This end's address, as the daemon logs its peers."""
    name = sock.getsockname()
    return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else str(name)
