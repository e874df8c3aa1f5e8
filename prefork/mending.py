"""The listening sockets that user code has spoilt, as the master puts them right: a worker that can't accept has rung.

Every worker has the socket, and what one does to it is done to all. What can be undone is undone at once
(`prefork.net.mending`); a socket that can't be, a Unix one that was shut down, is opened anew under the same address, and a fork
server that has it takes the place of the current one. Somebody else's is never replaced. Rings are only taken as a reason to look:
what is as it should be costs a look, and there are few looks a second.
"""

from prefork import log
from prefork.changeover import Changeover
from prefork.daemon import Daemon
from prefork.net.listener import Listener
from prefork.pool.tally import Trouble

# A look takes 10 us, and a handler may spoil a listener at each connection. Who has rung rings again as long as accept() fails.
LOOK_AGAIN = 0.02
# A listener that lasts for so long was opened anew for good: the next time is the first.
FORGIVEN = 60.0


class Mending:
    """The listeners of a daemon."""

    def __init__(self, daemon: Daemon, changeover: Changeover) -> None:
        self.daemon = daemon
        self.changeover = changeover
        self.trouble = Trouble()  # of listeners that were opened anew
        self._looked_at: dict[Listener, float] = {}
        self._told: set[Listener] = set()  # those that can't be mended
        self._current: list[Listener] = []  # of the commit that both were last held against

    def look(self, listener: Listener) -> None:
        """Have a listener listen that a worker has found not to. One that is being closed is left alone."""
        daemon = self.daemon
        now = daemon.now
        if daemon.stopping is not None or not daemon.listeners.accepts_at(listener):
            return
        if now < self._looked_at.get(listener, 0.0) + LOOK_AGAIN:
            return
        if self._current is not daemon.listeners.current:
            self._forget_the_closed()
        self._looked_at[listener] = now
        try:
            daemon.listeners.mend(listener, daemon.config)
        except OSError as error:
            self._replace(listener, error)

    def _forget_the_closed(self) -> None:
        """A commit has made another list of the listeners."""
        listeners = self.daemon.listeners
        self._current = listeners.current
        kept = {*listeners.current, *(farewell.listener for farewell in listeners.farewells)}
        self._looked_at = {listener: at for listener, at in self._looked_at.items() if listener in kept}
        self._told &= kept

    def _replace(self, listener: Listener, error: OSError) -> None:
        now = self.daemon.now
        if not listener.ours:
            if listener not in self._told:
                self._told.add(listener)
                log.event("listener_lost", address=listener.address, reason=error.strerror)
        elif now >= self.trouble.until and self.changeover.may_reopen(listener):
            if now >= self.trouble.until + FORGIVEN:
                self.trouble = Trouble()
            seconds = self.trouble.add(now, f"a handler has spoilt the listening socket of {listener.address}: {error.strerror}")
            log.event("listener_reopened", address=listener.address, reason=error.strerror, seconds=seconds)
            self.changeover.reopen(listener)
