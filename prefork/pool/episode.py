"""What is so now and then and is told once: since when it is, how long it was in all. Pure, no clock."""

from dataclasses import dataclass, field

# That it is over is told when it has been for this many seconds: what user code stops and continues, or a load that is at the edge,
# must not fill the log.
OVER_FOR = 1.0


@dataclass(slots=True)
class Episode:
    """One condition. ``since`` is None while it is not so; ``total`` are the seconds of what has ended."""

    since: float | None = None
    total: float = 0.0
    told: float | None = None  # the log says that it is so: seconds of that, up to `ended_at`
    ended_at: float = 0.0

    def begin(self, now: float) -> bool:
        """It is so. True when that is to be told."""
        if self.since is None:
            self.since = now
        if self.told is not None:
            return False
        self.told = 0.0
        return True

    def end(self, now: float) -> float | None:
        """It is not so. The seconds to be told, once that has been for long enough."""
        if self.since is not None:
            seconds, self.since, self.ended_at = now - self.since, None, now
            self.total += seconds
            self.told = (self.told or 0.0) + seconds
        if self.told is None or now < self.over_at:
            return None
        seconds, self.told = self.told, None
        return seconds

    @property
    def over_at(self) -> float:
        """When its end is to be told."""
        return self.ended_at + OVER_FOR

    def seconds(self, now: float) -> float:
        """How long it was in all, up to now."""
        return self.total + (now - self.since if self.since is not None else 0.0)


@dataclass(slots=True)
class Episodes:
    """Those of one listener."""

    at_ceiling: Episode = field(default_factory=Episode)  # fewer acceptors than wanted, and none may be forked
    saturated: Episode = field(default_factory=Episode)  # and none is left: clients wait
    stalled: Episode = field(default_factory=Episode)  # none is left although there may be more: none can be forked

    def stop(self, now: float) -> None:
        """Nobody is to accept there any more: all end, and that is not told."""
        for episode in (self.at_ceiling, self.saturated, self.stalled):
            episode.end(now)
            episode.told = None
