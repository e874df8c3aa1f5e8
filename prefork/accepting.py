"""What a worker does when accept() fails: try again, wait, or leave, as `prefork.net.listener.ACCEPT_ERRORS` has it.

What it must not do: spin, wait for ever in silence, say that it accepts, or need a descriptor.

* Errors of the next connection are retried at once, RETRIES times in a row. An error that is still there then is no connection's:
  the worker pauses, tells, and leaves when PATIENCE is over. Its place is filled again, under back-off when its successors serve no
  client either.
* What the machine has no more of (ENFILE, ENOBUFS, ENOMEM) is waited for, as long as it takes.
* What only this process has no more of (EMFILE) ends it at once: it holds no client, and its successor has what it lacks.
* A listening socket is shared. When user code has made it non-blocking, or given it a time-out, the worker that finds it puts it
  right. One that was shut down only the master may open again, which alone knows whether it was its own doing: the worker rings,
  and waits.
"""

import resource
import socket
import time
from collections.abc import Callable

from prefork import log
from prefork.errors import explained
from prefork.net.listener import ACCEPT_ERRORS, Verdict
from prefork.net.mending import unblock
from prefork.pool.scoreboard import IDLE, LEAVING, PAUSED, Scoreboard

EXIT_RETIRED = 0
EXIT_BROKEN = 70
# Could not accept any more; why are its last words. EX_OSERR of sysexits.h.
EXIT_CANT_ACCEPT = 71
# A row of connections that have failed in the queue is shorter: each that has not ends the row. So many cost 0.2 ms.
RETRIES = 100
# What the machine lacks is not there again in a moment, and a worker that pauses still leaves within 100 ms.
PAUSE = 0.1
# A listener that was shut down is open again a millisecond after the ring, unless the master is busy.
FIRST_PAUSE = 0.002
# Seconds of pauses until a worker leaves whose accept() fails for good: it has no replacement before.
PATIENCE = 0.3
# The same while it waits for the master, which may be becoming another program.
MASTER_PATIENCE = 2.0


class Accepting:
    """The failures of one worker's accept(). Made before the fork.

    ``ring_vacant``: its place is empty. ``ring_spoilt``: the listener is to be looked at.
    """

    def __init__(
        self,
        board: Scoreboard,
        listener: socket.socket,
        is_leaving: Callable[[], bool],
        *,
        ring_vacant: Callable[[], object],
        ring_spoilt: Callable[[], object],
    ) -> None:
        self._board = board
        self._listener = listener
        self._is_leaving = is_leaving
        self._ring_vacant = ring_vacant
        self._ring_spoilt = ring_spoilt
        self._failures = 0  # in a row
        self._paused = 0.0  # seconds
        self._unblocked = 0  # times, in this worker's life

    def succeeded(self) -> None:
        """A connection was accepted, for the first time since accept() has failed."""
        if self._paused >= PAUSE:
            log.event("accept_again", count=self._failures)
        self._failures, self._paused = 0, 0.0

    def failed(self, error: OSError, slot: int, *, has_served: bool) -> int | None:
        """None to accept again, an exit status to leave."""
        verdict = ACCEPT_ERRORS.get(error.errno)
        if verdict in (Verdict.SHUT_DOWN, Verdict.OUT_OF_USE) and self._is_leaving():
            return EXIT_RETIRED
        self._failures += 1
        match verdict:
            case Verdict.RETRY | Verdict.BLOCK_AGAIN if self._failures <= RETRIES:
                if verdict is Verdict.BLOCK_AGAIN:
                    self.unblock()
            case Verdict.RETRY | Verdict.BLOCK_AGAIN if self._paused < PATIENCE:
                self._pause(slot, error, PAUSE)
            case Verdict.PAUSE:
                self._pause(slot, error, PAUSE)
            case Verdict.SHUT_DOWN if self._paused < MASTER_PATIENCE:
                self._ring_spoilt()
                self._pause(slot, error, min(PAUSE, FIRST_PAUSE * self._failures))
            case Verdict.RETRY | Verdict.BLOCK_AGAIN | Verdict.SHUT_DOWN:
                return self._leave(slot, f"{error.strerror}, {self._failures} times in a row", has_served=has_served)
            case Verdict.LEAVE:
                limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
                return self._leave(slot, f"{error.strerror} (RLIMIT_NOFILE is {limit})", has_served=has_served)
            case _:
                log.event("accept_broken", reason=f"{type(error).__name__}: {error}")
                return EXIT_BROKEN
        return None

    def unblock(self) -> None:
        """Undo what user code has done to the shared socket that has accept() return without a connection."""
        try:
            undone = unblock(self._listener)
        except OSError:  # a sandbox: accept() goes on failing, and those errors are counted
            return
        if undone:
            self._unblocked += 1
            if self._unblocked & (self._unblocked - 1) == 0:  # 1, 2, 4, ...: a handler may do it for each client
                log.event("accept_unblocked", what=" and ".join(undone), count=self._unblocked)

    def _pause(self, slot: int, error: OSError, seconds: float) -> None:
        """Be no acceptor for a moment, then accept again."""
        if self._paused < PAUSE <= self._paused + seconds:
            log.event("accept_paused", reason=explained(error), seconds=PAUSE)
        self._paused += seconds
        states = self._board.states
        states[slot] = PAUSED
        time.sleep(seconds)
        states[slot] = IDLE

    def _leave(self, slot: int, why: str, *, has_served: bool) -> int:
        if self._board.tired[slot] == 1:
            return EXIT_RETIRED  # its replacement is on its way
        self._board.leave_last_words(f"accept failed: {why}")
        self._board.states[slot] = LEAVING
        if has_served:
            self._ring_vacant()  # its exit hook may take its time, and clients wait
        return EXIT_CANT_ACCEPT
