"""What wakes the master without an order of its own, heard so often a second at most: the doorbell, and its children's SIGCHLD.

User code can ring without end, and stop, continue and leave behind processes without end (the master is a subreaper: what a dead
worker's children leave becomes its child). A turn of the master costs 0.1 to 0.3 ms, one that looks at everything more. So each
source has its share of turns (`prefork.pool.throttle`) and is not heard for some milliseconds when that is used up. Nothing is lost
by it: a pipe that is full is read after the pause, and then everything is looked at; SIGCHLD waits behind the mask, and once it is
let in all is reaped. What it must not do: end a pause early, or hold back what the master itself has asked for.
"""

import os
import selectors
import signal
import time
from collections.abc import Callable

from prefork import log
from prefork.daemon import Daemon
from prefork.errors import explained
from prefork.net.listener import Listener
from prefork.pool import wire
from prefork.pool.throttle import REGISTER_AGAIN, Throttle

# Turns at once, and a second on average. Loads of 80 to 3,000 connections a second, blocking and not, take 4 to 23.
TURNS, TURNS_A_SECOND = 100, 50
# What a turn costs, in seconds of CPU. A look at everything that costs more is worth as many turns: it grows with the addresses.
TURN = 0.0003
# A worker that is about to be recycled rings, and its replacement when it is ready.
RINGS_OF_A_FORK = 2
# So many rings in one read are more than workers have to say: the first are read, and then everything is looked at.
MANY = 16
# For so long nothing is read after that: what has been written meanwhile is one turn's.
REST = 0.003


class Doorbell:
    """The pipe that workers write to, in the daemon's selector."""

    def __init__(self, daemon: Daemon, look_at_listener: Callable[[Listener], object]) -> None:
        """``look_at_listener``: what is to be done when a worker finds its listener spoilt."""
        self.daemon = daemon
        self.look_at_listener = look_at_listener
        self.paused_until: float | None = None
        self._fd = daemon.wiring.doorbell_read
        self._throttle = Throttle(TURNS_A_SECOND, TURNS)
        self._forked = 0  # workers, until the last turn
        self._expected = 0  # turns that forks are worth
        self._looking_since: float | None = None  # on the CPU's clock: at everything, in this turn
        self._latest: list[wire.Doorbell] = []  # rings
        self._deaf = False  # because it could not be registered
        daemon.selector.register(self._fd, selectors.EVENT_READ, self._answer)

    def _answer(self, now: float) -> None:
        began = time.thread_time()
        try:
            data = os.read(self._fd, wire.PIPE_READ)
        except BlockingIOError:
            return
        many = len(data) > MANY * wire.DOORBELL_SIZE
        rings, stray = wire.read_doorbells(data[: MANY * wire.DOORBELL_SIZE])
        generations = {generation.number: generation for generation in self.daemon.generations()}
        for ring in rings:
            generation = generations.get(ring.generation)
            if generation is not None and generation.rang(ring, now) and ring.why is wire.Ring.LISTENER:
                self.look_at_listener(generation.listeners[generation.layout.listener(ring.slot)])
        if many or stray:
            # Rings may have been lost, or be noise of user code.
            for generation in generations.values():
                generation.look_at_everything(now)
                for listener in generation.listeners:
                    self.look_at_listener(listener)
            self.paused_until = now + REST
        self._latest = rings[:3]
        if self._is_unexpected():
            self._spend(now, 1)
            self._looking_since = began if many or stray else None
        if self.paused_until is not None:
            self.daemon.selector.unregister(self._fd)

    def _spend(self, now: float, turns: float) -> None:
        if self._throttle.spend(now, turns):
            names = sorted({f"worker {ring.slot} of generation {ring.generation}" for ring in self._latest})
            log.event("flood", what=f"rings ({', '.join(names) or 'garbage'}, by their own word)", rate=TURNS_A_SECOND)
        if self._throttle.is_paused(now):
            self.paused_until = max(self._throttle.until, self.paused_until or now)

    def _is_unexpected(self) -> bool:
        """Whether no fork is behind this turn. With max_connections = 1 there are two rings for each connection and its fork."""
        forked, self._forked = self._forked, self.daemon.tally.forked
        self._expected = min(self._expected + RINGS_OF_A_FORK * (self._forked - forked), TURNS)
        if self._expected:
            self._expected -= 1
            return False
        return True

    def tend(self, now: float) -> None:
        """Hear it again when the pause is over. Called when the turn's looks have been taken."""
        if self._looking_since is not None:
            cost, self._looking_since = time.thread_time() - self._looking_since, None
            self._spend(now, max(0.0, cost / TURN - 1))
        if self.paused_until is None or self.paused_until > now:
            return
        try:
            self.daemon.selector.register(self._fd, selectors.EVENT_READ, self._answer)
        except OSError as error:
            self.paused_until = now + REGISTER_AGAIN
            if not self._deaf:
                log.event("deaf", what="the workers' rings", reason=explained(error))
            self._deaf = True
            return
        self.paused_until, self._deaf = None, False


class ChildSignals:
    """SIGCHLD to the master."""

    def __init__(self) -> None:
        self.paused_until: float | None = None
        self._throttle = Throttle(TURNS_A_SECOND, TURNS)

    def came(self, now: float, *, ours: bool) -> None:
        """It has, and what there was to reap was reaped. ``ours``: a worker or a fork server among it, which end once each."""
        if not ours and self._throttle.spend(now):
            log.event("flood", what="ends and stops of processes that handlers have left behind", rate=TURNS_A_SECOND)
        if self._throttle.is_paused(now):
            self.paused_until = self._throttle.until
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])

    def tend(self, now: float) -> None:
        """Let it in again when the pause is over; one that has come meanwhile comes now."""
        if self.paused_until is not None and self.paused_until <= now:
            self.paused_until = None
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
