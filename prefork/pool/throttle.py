"""How often the master hears of what user code can cause without end: pure, no clock, no operating system.

A token bucket for each source: so many events at once, so many a second on average. A source that has used up its share is not
heard until it has one again. What it has to say is not lost by that where it is a level (a row of states, a child that can be
reaped); the caller sees to it that what is level is looked at when the pause is over.
"""

from dataclasses import dataclass

# Where the kernel has no watch (fs.epoll.max_user_watches) or no memory to hear a source again by, it is tried again after so long.
REGISTER_AGAIN = 1.0


@dataclass(slots=True)
class Throttle:
    """One source of events. ``rate`` a second on average, ``burst`` at once; ``longest``: seconds that a pause lasts at most."""

    rate: float
    burst: float
    longest: float = 1.0
    until: float = 0.0  # the source is not heard before
    _spent: float = 0.0
    _at: float = 0.0
    _calm: bool = True

    def spend(self, now: float, events: float = 1) -> bool:
        """Count events that were heard. True when a flood begins with them: it is worth a line of the log."""
        self._spent = max(0.0, self._spent - max(0.0, now - self._at) * self.rate)
        self._at = now
        if self._spent == 0:
            self._calm = True
        self._spent = min(self._spent + events, self.burst + self.longest * self.rate)
        if self._spent <= self.burst:
            return False
        self.until = now + (self._spent - self.burst) / self.rate
        begins, self._calm = self._calm, False
        return begins

    def is_paused(self, now: float) -> bool:
        """Whether the source is not heard now."""
        return now < self.until
