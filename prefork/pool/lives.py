"""When processes that end soon after they were ready are a failure to back off from: pure, no clock, no operating system.

A worker that ends by itself is replaced at once: a crash, an operator's kill, one every 100 ms even, must not take acceptors away.
But one that ends soon after it was ready, with whatever status, has a reason that the next one shares: a thread of a library
that crashes, a handler's module that ends its process. Replaced at once, these were up to 150 forks a second. So many of them in
a short time, while no worker of the generation serves a client, are one failure. (Postfix's master throttles a service whose
process ends before its first job.)
"""

from collections import deque
from dataclasses import dataclass, field

# A process that ends sooner after it was ready has had a short life.
SHORT = 1.0
# The seconds in which short lives are counted.
WINDOW = 1.0
# So many of them in a window are only replaced, unless ALONE of them left no acceptor behind: what kills a worker every 100 ms, and
# is late for once or twice, is not a fault of the workers. Each costs the master 0.5 to 0.9 ms.
TOLERATED = 12
# One may leave no acceptor behind because its neighbour was killed just before, on a machine that is slow to fork.
ALONE = 2


@dataclass(slots=True)
class WorkerLives:
    """The short lives of one generation's workers."""

    _ends: deque[tuple[float, bool]] = field(default_factory=deque)  # when, and whether it was the last acceptor
    _begun: int = 0

    def ended(self, now: float, begun: int, acceptors: int, workers: int) -> bool:
        """One more worker has ended soon after it was ready, and has served nothing. True when that is a failure.

        ``begun``: the connections that the generation has accepted, ever; ``acceptors``: how many workers still accept where
        this one did; ``workers``: how many are wanted.
        """
        if begun != self._begun:
            self._begun = begun
            self._ends.clear()
        self._ends.append((now, acceptors == 0))
        while self._ends[0][0] <= now - WINDOW:
            self._ends.popleft()
        alone = sum(last for _, last in self._ends)
        if len(self._ends) <= workers or (alone < ALONE and len(self._ends) <= TOLERATED):
            return False
        self._ends.clear()
        return True


@dataclass(slots=True)
class ForkServerLives:
    """How many of the latest fork servers in a row have had short lives: they died soon after their generation's commit."""

    row: int = 0

    def ended(self, lived: float, *, served: bool) -> int:
        """One more has ended. The number of failures in a row: the first short life is none."""
        self.row = self.row + 1 if lived < SHORT and not served else 0
        return max(0, self.row - 1)
