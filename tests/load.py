"""Clients to count with: short connections in a closed loop or at a steady pace, each byte checked, each failure classed."""

import os
import socket
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from prefork.testing import connect

SIZE = 64


@dataclass(slots=True)
class Tally:
    """What one client saw. ``failures``: (monotonic time, class) of each; latencies in seconds, connect to last byte."""

    connections: int = 0
    failures: list[tuple[float, str]] = field(default_factory=list)
    refused: int = 0
    worst: float = 0.0


class Load:
    """``clients`` threads that connect, send 64 bytes, check the echo and close, until the block ends.

    ``rate`` (connections a second, all clients together) paces them; without it each connects again at once. ``reset`` closes
    with RST. ``may_be_refused``: a refused connection is counted apart and the client goes on (a stop, a dead master).
    """

    def __init__(
        self, address: Any, clients: int = 4, rate: float | None = None, *, reset: bool = False, timeout: float = 10.0
    ) -> None:
        self.address = address
        self.reset = reset
        self.timeout = timeout
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
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    @property
    def connections(self) -> int:
        """Connections that were answered in full."""
        return sum(tally.connections for tally in self._tallies)

    @property
    def failures(self) -> list[tuple[float, str]]:
        """Everything else, but for the refused, in order of time."""
        return sorted(failure for tally in self._tallies for failure in tally.failures)

    @property
    def classes(self) -> dict[str, int]:
        """The failures by class."""
        return dict(Counter(kind for _, kind in self.failures))

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
            begun = time.monotonic()
            self._one(tally)
            tally.worst = max(tally.worst, time.monotonic() - begun)
            if self.interval:
                due = max(due + self.interval, time.monotonic() - self.interval)
                self._stopped.wait(max(0.0, due - time.monotonic()))

    def _one(self, tally: Tally) -> None:
        sent = os.urandom(SIZE)
        try:
            sock = connect(self.address, self.timeout)
        except (ConnectionRefusedError, FileNotFoundError):
            tally.refused += 1
            self._stopped.wait(0.01)
            return
        except OSError as error:
            tally.failures.append((time.monotonic(), f"connect: {type(error).__name__}"))
            return
        with sock:
            try:
                sock.sendall(sent)
                got = b""
                while len(got) < SIZE and (data := sock.recv(SIZE)):
                    got += data
                if self.reset:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            except OSError as error:
                tally.failures.append((time.monotonic(), type(error).__name__))
                return
        if got == sent:
            tally.connections += 1
        else:
            tally.failures.append((time.monotonic(), "cut" if sent.startswith(got) else "wrong bytes"))
