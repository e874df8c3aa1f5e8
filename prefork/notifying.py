"""What the service manager hears of a daemon (sd_notify(3)): its phases, its status line, that its main loop turns.

Everything is told from the state, at the end of a turn of the master's loop, by one place: what has been told already is not told
again, and what the manager had no room for is told in a later turn. Without a service manager nothing here costs anything.

When the status line is sent: at once when a phase begins or ends, a reload is refused, or workers don't start. Its numbers
(acceptors, connections, rate) follow at most every PERIOD, in turns that the loop takes anyway: workers wake the master once a
second while clients come. Only while the last line told of connections the loop wakes for it, so that it does not go on
telling of clients who have left. A daemon at rest has told so, and sends nothing.

Long phases ask for more time in small pieces: a master that hangs while it drains is found out all the same. The manager postpones
its watchdog by as much, until that is fed the next time (service_extend_timeout in systemd's service.c).
"""

import os
import time
from collections.abc import Callable

from prefork.daemon import Daemon
from prefork.pool.scoreboard import IDLE, PARKED
from prefork.printable import counted
from prefork.system import systemd
from prefork.system.systemd import Notifier

# The numbers of the status line, in seconds. As long as spare_timeout is, after which the master looks at surplus workers anyway.
PERIOD = 10.0
# A rate over less than this is chance.
LEAST = 1.0
# Start, reload and stop may each take longer than the unit says, as the configuration says; asked for every half of it.
EXTENSION = 20.0
# What the manager had no room for.
AGAIN = 0.5

STARTING, READY, RELOADING, STOPPING = "", "READY", "RELOADING", "STOPPING"


class Notifying:
    """The service manager's picture of a daemon."""

    def __init__(self, daemon: Daemon, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock``: the kernel's monotonic one; the manager does not leave out what we were stopped for, as the daemon's does."""
        self.daemon = daemon
        self._clock = clock
        self._notifier = Notifier(None)
        self._watchdog: float | None = None
        # Told so far.
        self._phase = STARTING
        self._news = ""
        self._numbers = ""
        self._reload = daemon.last_reload
        self._fed_at = self._extended_at = self._looked_at = self._counted_at = float("-inf")
        self._accepted, self._rate = 0, 0.0
        self._at_rest = True
        self._again = False  # something could not be told

    def begin(self) -> None:
        """Tell from now on; a daemon that goes on after an upgrade is in one already, as far as the manager knows."""
        self._notifier = Notifier.from_environment()
        self._watchdog = systemd.watchdog(os.environ)
        if self.daemon.current is not None:
            self._phase, self._reload = RELOADING, self.daemon.last_reload
            self._accepted, self._counted_at = self._accepted_so_far(), self._clock()

    def tend(self) -> None:
        """Tell what is due."""
        if not self._notifier:
            return
        now = self._clock()
        self._again = False
        phase = self._due_phase()
        if phase == self._phase == READY and self.daemon.last_reload is not self._reload:
            # A reload that was refused in the turn in which it began: who has asked by a signal waits for both (notify-reload).
            self._tell_phase(RELOADING, now)
        self._tell_what_is(phase, now)
        if phase != READY and now >= self._extended_at + EXTENSION / 2 and self._tell(EXTEND_TIMEOUT_USEC=int(EXTENSION * 1e6)):
            self._extended_at = now
        if self._watchdog is not None and now >= self._fed_at + self._watchdog / 2:
            self._feed(now)

    def become(self) -> None:
        """The next turn is that of another program's loop, which takes a while to start."""
        if self._notifier:
            self._feed(self._clock())
            self._tell(EXTEND_TIMEOUT_USEC=int(EXTENSION * 1e6))

    def _feed(self, now: float) -> None:
        if self._watchdog is not None and self._tell(WATCHDOG=1):
            self._fed_at = now

    def wake_at(self) -> float | None:
        """When to `tend`, by the daemon's clock."""
        if not self._notifier:
            return None
        if self._again:  # whatever is due: the manager has no room for it
            return self._clock() + AGAIN - self.daemon.lost
        times = [self._fed_at + self._watchdog / 2] if self._watchdog is not None else []
        times += [self._extended_at + EXTENSION / 2] if self._phase != READY else []
        times += [self._looked_at + PERIOD] if not self._at_rest else []
        return min(times) - self.daemon.lost if times else None

    def _tell(self, **state: object) -> bool:
        told = self._notifier.send(**state)
        self._again |= not told
        return told

    def _due_phase(self) -> str:
        daemon = self.daemon
        if daemon.stopping is not None:
            return STOPPING
        if daemon.current is None:
            return STARTING
        if daemon.upgrade is not None and not daemon.upgrade.result:
            return RELOADING
        # A new fork server for a dead one changes nothing of what is served.
        return RELOADING if daemon.reloading is not None and not daemon.reloading.is_restart else READY

    def _tell_phase(self, phase: str, now: float, **more: object) -> bool:
        """Tell that a phase has begun, if it has, and what else is new."""
        state: dict[str, object] = {}
        if phase != self._phase:
            state[phase] = 1
            if phase == RELOADING:
                state["MONOTONIC_USEC"] = int(now * 1e6)
        state |= more
        if not state or not self._tell(**state):
            return False
        if phase != self._phase:
            self._phase, self._reload, self._extended_at = phase, self.daemon.last_reload, float("-inf")
        return True

    # -- the status line

    def _tell_what_is(self, phase: str, now: float) -> None:
        """Phase and status line, where they have changed: in one message, so that nobody sees one without the other."""
        status: dict[str, object] = {}
        news, numbers = self._news, self._numbers
        if (due := self._due_news()) != news or now >= self._looked_at + PERIOD:
            news, numbers = due, self._due_numbers(now)
            if (news, numbers) != (self._news, self._numbers):
                status["STATUS"] = systemd.line("; ".join(filter(None, (numbers, news))))
        if self._tell_phase(phase, now, **status):
            self._news, self._numbers = news, numbers

    def _due_news(self) -> str:
        """What does not wait: in a few words what is under way, and what has gone wrong last."""
        daemon = self.daemon
        if daemon.failure is not None:
            return systemd.line(f"the start failed: {daemon.failure}")
        said = [daemon.state] if daemon.state != "running" else []
        last, upgrade = daemon.last_reload, daemon.upgrade
        if last is not None and last.result != "ok":
            said.append(f"last reload {last.result}: {last.reason}")
        elif upgrade is not None and upgrade.result not in ("", "ok") and (last is None or last.at < upgrade.at):
            said.append(f"last upgrade {upgrade.result}: {upgrade.reason}")
        said += [trouble.reason for trouble in daemon.troubles() if trouble.failures]
        return "; ".join(map(systemd.line, said))

    def _due_numbers(self, now: float) -> str:
        daemon = self.daemon
        if daemon.current is None and daemon.stopping is None:
            return ""
        self._looked_at = now
        if now >= self._counted_at + LEAST:
            accepted = self._accepted_so_far()
            # A hostile worker can take its counters back.
            self._rate = max(0, accepted - self._accepted) / (now - self._counted_at)
            self._accepted, self._counted_at = accepted, now
        busy = daemon.busy()
        self._at_rest = busy == 0 and self._rate < 0.05
        said = f"{busy} busy, {self._rate:.{1 if self._rate < 9.95 else 0}f} connections/s"
        if daemon.current is None:
            return said
        acceptors = daemon.current.count(IDLE) + daemon.current.count(PARKED)
        full = f"; max_workers = {daemon.config.max_workers} is reached" if daemon.current.at_ceiling else ""
        return f"{counted(acceptors, 'acceptor', 'acceptors')}, {said}{full}"

    def _accepted_so_far(self) -> int:
        return self.daemon.tally.counts.begun + sum(generation.begun() for generation in self.daemon.generations())
