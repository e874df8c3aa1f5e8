"""Killing a worker for the connection that it serves, and for no other one.

Between the look that finds a connection too old and the SIGKILL the worker may have begun another client's. So it is stopped
first; once wait4 has told that it stands still (WUNTRACED), what it serves is compared with what was seen, and it is killed or
goes on as if nothing had been. Whoever is the worker's parent does this: its fork server, or the master when that has gone.
"""

import signal

from prefork.pool.scoreboard import BUSY, Scoreboard
from prefork.system import process


class Ending:
    """The children of this process that are to be killed if they still serve a certain connection."""

    def __init__(self, board: Scoreboard) -> None:
        self._board = board
        self._asked: dict[int, tuple[int, int]] = {}

    def ask(self, pid: int, slot: int, begun: int) -> None:
        """Kill the worker if the connection that it serves is the slot's ``begun``-th."""
        if process.state(pid) == b"T":
            # By somebody's signal: wait4 would not tell again, and whoever has stopped it lets it go on.
            if self._serves(slot, begun):
                process.signal_child(pid, signal.SIGKILL)
        elif process.signal_child(pid, signal.SIGSTOP):
            self._asked[pid] = slot, begun

    def stopped(self, pid: int) -> None:
        """A child stands still; perhaps because we have asked for it."""
        if (asked := self._asked.pop(pid, None)) is not None:
            process.signal_child(pid, signal.SIGKILL if self._serves(*asked) else signal.SIGCONT)

    @property
    def under_way(self) -> bool:
        """Whether somebody was stopped and not yet let go, or killed."""
        return bool(self._asked)

    def forget(self, pid: int) -> None:
        """It was reaped: the pid may become another's."""
        self._asked.pop(pid, None)

    def _serves(self, slot: int, begun: int) -> bool:
        counts = self._board.counts(slot)
        return self._board.states[slot] == BUSY and (counts.begun, counts.serving) == (begun, 1)
