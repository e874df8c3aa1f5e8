"""What is kept of workers that have gone: totals, durations, the last deaths, and failures in a row. Values only."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from prefork.pool import policy, scoreboard
from prefork.pool.scoreboard import NOTHING, Counts

# Failures are in a row when the next one comes within this time after its try; twice the longest wait.
EPISODE = 2 * policy.BACKOFF_LIMIT


@dataclass(frozen=True, slots=True)
class Death:
    """A worker that ended with an error, by a signal, or serving a connection. Times in seconds, ``at`` since the epoch."""

    at: float
    slot: int
    pid: int
    generation: int
    cause: str
    peer: str | None
    cpu: float
    max_rss: int
    stack: str | None = None


@dataclass(frozen=True, slots=True)
class Overdue:
    """A worker that should have gone, for longer than a second: what it was, so many ``seconds`` ago."""

    pid: int
    slot: int
    generation: int
    seconds: float
    what: str  # killed, asked to leave


@dataclass(frozen=True, slots=True)
class LastReload:
    """How the last reload ended, and when (seconds since the epoch)."""

    at: float
    result: str  # ok, refused, rolled back
    reason: str | None


@dataclass(slots=True)
class Tally:
    """What has ended, for the whole daemon: what gone generations counted, and what only the master can count."""

    counts: Counts = NOTHING
    histogram: list[int] = field(default_factory=lambda: [0] * scoreboard.BUCKETS)
    forked: int = 0
    exited: int = 0
    saturated: float = 0.0  # seconds
    stalled: float = 0.0
    deaths: deque[Death] = field(default_factory=lambda: deque(maxlen=64))


@dataclass(slots=True)
class Trouble:
    """Failures in a row, and until when nothing is tried."""

    failures: int = 0
    until: float = 0.0
    reason: str = ""
    until_served: bool = False  # a worker that is ready proves nothing; one that has accepted does

    def add(self, now: float, reason: str, *, until_served: bool = False, wait: Callable[[int], float] = policy.backoff) -> float:
        """One more failure; those that come while nothing is tried belong to the same try. Returns the seconds to wait.

        After a failure ``until_served`` it takes a worker that has served to end the row, whatever else fails meanwhile.
        """
        if self.is_over(now):
            self.failures, self.until_served = 0, False
        self.until_served, self.reason = self.until_served or until_served, reason
        if now >= self.until:
            self.failures += 1
            self.until = now + wait(self.failures)
        return self.until - now

    def is_over(self, now: float) -> bool:
        """Whether the last failure was so long ago that another one is not in its row."""
        return now >= self.until + EPISODE
