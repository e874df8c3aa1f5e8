"""What a running daemon is: its configuration, listeners and generations, what was counted, and what is under way.

State and the questions that several ask of it; no decisions. `prefork.changeover`, `prefork.upgrading` and `prefork.stopping` carry
out what takes its time, `prefork.master` is the loop around them. All clocks are monotonic; `Daemon.now` leaves out the time in
which this process was stopped, so that nobody's deadline passes in it.
"""

import os
import selectors
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from prefork import config, log
from prefork.carried import Upgrade
from prefork.config import Activated, Config, Sources
from prefork.errors import PreforkError, RefusedError, explained
from prefork.generation import Generation
from prefork.link import Wiring
from prefork.listeners import Listeners, Plan
from prefork.net.listener import Listener, address_at
from prefork.ops import control
from prefork.ops.control import Client, ControlServer, Outcome
from prefork.pool.episode import Episode
from prefork.pool.scoreboard import BUSY
from prefork.pool.tally import LastReload, Tally, Trouble
from prefork.pool.throttle import REGISTER_AGAIN
from prefork.system import limits
from prefork.system.pidfile import PidFile


@dataclass(slots=True)
class Canary:
    """A reload that is committed and can still be taken back: ``old`` keeps its fork server until then."""

    old: Generation
    until: float
    most: int  # so many crashes of new workers take it back
    owners: tuple[tuple[int, int], ...]  # of the old listeners' paths


@dataclass(slots=True)
class Reload:
    """A reload under way, or a fork server's replacement; ``clients`` are told how it ends."""

    what: str
    at: float
    generation: Generation
    plan: Plan
    clients: list[Client]
    is_restart: bool  # of a fork server that has died, with what is in force
    canary: Canary | None = None  # from the commit on, when the configuration asks for it


@dataclass(slots=True)
class Stop:
    """A stop under way."""

    why: str
    at: float
    deadline: float
    clients: list[Client]
    seconds: float = 0.0  # for connections, from when all listeners are closed but for their queues
    killed: bool = False
    quick: bool = False  # from its begin, or a graceful one that somebody had no more patience with
    killed_before: int = 0  # connections that had been killed when it began
    tries: int = 0  # at ending those whom SIGKILL has not ended


class Daemon:
    """The state. What is only annotated here is set by the start."""

    config: Config
    name: str
    activated: tuple[tuple[str, int], ...]
    selector: selectors.BaseSelector
    wiring: Wiring

    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        self.resources = ExitStack()  # what is open as long as the daemon lives
        self.pid = os.getpid()
        self.started, self.began = time.time(), time.monotonic()
        self.lost = 0.0  # seconds in which this process was stopped or starved
        self.now = time.monotonic()
        self.listeners = Listeners()
        self.current: Generation | None = None
        self.draining: list[Generation] = []
        self.reloading: Reload | None = None
        self.stopping: Stop | None = None
        self.suspended = False
        self.tally = Tally()
        self.trouble = Trouble()  # of fork servers
        self.last_reload: LastReload | None = None
        self.upgrade: Upgrade | None = None  # the latest one
        self.trying = False  # another program, to become it: reloads wait
        self.next_number = 1
        self.demand: limits.Demand | None = None  # what the machine's limits were last held against
        self.failure: PreforkError | None = None  # why the start failed
        self.control: ControlServer | None = None
        self.lock: PidFile | None = None  # while it is held no other daemon has our control socket's path
        self.pid_file: PidFile | None = None

    def clock(self) -> float:
        """Seconds, without those in which this process was stopped."""
        return time.monotonic() - self.lost

    # -- configuration

    def load(self) -> Config:
        """Read the configuration again. Raises ConfigError."""
        conf, origins = self.sources.trace()
        sockets = self.passed_sockets()
        conf = config.with_activated(conf, origins, sockets)
        used = {address.port for address in conf.bind}
        unused = sorted({f"{socket.name} ({socket.address})" for socket in sockets if socket.fd not in used})
        if unused:
            log.event("activated_unused", names=", ".join(unused))
        return conf

    def passed_sockets(self) -> list[Activated]:
        """Those of the service manager."""
        if not self.activated:
            return []
        by = limits.socket_unit(os.environ)
        return [Activated(name, fd, address_at(fd), by) for name, fd in self.activated]

    def warn_of_limits(self, listeners: Sequence[Listener]) -> None:
        """Name the limits of the machine that the configuration can exceed; at a reload, when it needs another measure."""
        conf = self.config
        demand = limits.Demand(
            backlog=conf.backlog,
            listeners=len(listeners),
            workers=conf.workers,
            max_workers=conf.max_workers,
            control_clients=control.CLIENTS if self.control is not None else 0,
            user=conf.user or str(os.getuid()),
            rlimit=conf.rlimit,
            running=sum(generation.live() for generation in self.generations()),
            queue_limit=next((queue[1] for listener in listeners if (queue := listener.queue()) is not None), None),
        )
        if demand == self.demand:
            return
        self.demand = demand
        for shortage in limits.shortages(limits.read(os.environ), demand):
            log.event("limit", **asdict(shortage))

    def close_unused_logs(self) -> None:
        """Close the log files that no configuration in use names."""
        log.keep_only([self.config, *(generation.config for generation in self.generations())])

    def let_go(self) -> None:
        """Close all that is open, for a program that goes on: what still serves finds itself without a master."""
        for generation in self.generations():
            if generation.link.pid is None:
                generation.retire_all(self.now, None)  # no fork server tells them
            generation.link.close()
        opened = self.reloading.plan.opened if self.reloading is not None else ()
        for listener in (*self.listeners.current, *opened, *(farewell.listener for farewell in self.listeners.farewells)):
            listener.sock.close()
        self.resources.close()

    # -- generations

    def generations(self) -> list[Generation]:
        """Every generation that has processes: the current one, the one that a reload starts, those that drain."""
        pending = [self.reloading.generation] if self.reloading is not None and self.reloading.canary is None else []
        return [*([self.current] if self.current is not None else []), *pending, *self.draining]

    def troubles(self) -> list[Trouble]:
        """What is backed off from, or was."""
        return [self.trouble, *(self.current.troubles() if self.current is not None else [])]

    def boot(self, conf: Config, listeners: Sequence[Listener], targets: Sequence[int] | None = None) -> Generation:
        """Start the next generation's fork server. Raises RefusedError when the machine does not let us."""
        generation = Generation(self.next_number, conf, listeners, self.wiring, self.tally, self.now, targets)
        self.next_number += 1
        try:
            generation.link.start(conf, listeners)
            self.listen_to(generation)
        except OSError as error:
            generation.link.kill()
            generation.close()
            raise RefusedError(f"can't start a fork server: {explained(error)}") from None
        return generation

    def listen_to(self, generation: Generation) -> None:
        """Hear what a fork server says, unless that is too much, and of room for what waits to be sent to it."""
        link = generation.link
        if link.pid is None:
            return
        reading = selectors.EVENT_READ if generation.is_heard else 0
        wanted = reading | (selectors.EVENT_WRITE if link.has_mail else 0)
        known = self.selector.get_map().get(link.channel)
        if not wanted:
            self.hear_no_more(generation)
        elif known is None:
            self.selector.register(link.channel, wanted, self._postman(generation))
        elif known.events != wanted:
            self.selector.modify(link.channel, wanted, self._postman(generation))

    def listen_to_all(self) -> None:
        """Hear what fork servers say; one that can't be heard just now, later."""
        for generation in self.generations():
            try:
                self.listen_to(generation)
            except OSError as error:
                generation.hear_later(self.now + REGISTER_AGAIN, error)

    def hear_no_more(self, generation: Generation) -> None:
        """Hear nothing of a fork server, not even that it has closed its end."""
        if self.selector.get_map().get(generation.link.channel) is not None:
            self.selector.unregister(generation.link.channel)

    def _postman(self, generation: Generation) -> Callable[[float], None]:
        def deliver(now: float) -> None:
            generation.link.flush()
            if generation.is_heard and not generation.receive(now):
                # It has closed its end: it is dead, or as good as dead, and can't be told anything.
                generation.hang_up(now)

        return deliver

    def part_from(self, listener: Listener) -> None:
        """Nobody accepts there any more."""
        for generation in self.generations():
            if listener in generation.listeners:
                deadline = None if self.stopping is not None else generation.drain_deadline(self.now)
                generation.retire(generation.listeners.index(listener), self.now, deadline)

    def accepts(self, listener: Listener) -> bool:
        """Whether somebody who was asked to leave may still be in accept() there."""
        return any(generation.accepts_at(listener) for generation in self.generations())

    def busy(self) -> int:
        """Connections that are being served."""
        return sum(generation.count(BUSY) for generation in self.generations())

    def waits(self) -> dict[str, float | None]:
        """How long no acceptor was left, added up over the listeners, and since when that is so now, in seconds since the epoch."""
        episodes = [its for generation in self.generations() for its in generation.episodes()]
        return {
            "saturated_seconds": self.tally.saturated + sum(its.saturated.seconds(self.now) for its in episodes),
            "saturated_since": self._since(its.saturated for its in episodes),
            "stalled_seconds": self.tally.stalled + sum(its.stalled.seconds(self.now) for its in episodes),
            "stalled_since": self._since(its.stalled for its in episodes),
            "ceiling_since": self._since(its.at_ceiling for its in episodes),
        }

    def _since(self, episodes: Iterable[Episode]) -> float | None:
        """Since when the first of those is so that are so now."""
        since = min((episode.since for episode in episodes if episode.since is not None), default=None)
        return None if since is None else time.time() - (self.now - since)

    def killed(self) -> int:
        """Connections that ended with their worker."""
        return self.tally.counts.killed + sum(generation.accepted().killed for generation in self.generations())

    # -- suspending

    def suspend(self) -> None:
        """Nobody accepts any more; the sockets stay bound, and the kernel's queue holds clients."""
        if not self.suspended and self.current is not None:
            self.suspended = True
            for generation in self._accepting(self.current):
                generation.suspend(self.now)
            log.event("suspended", busy=self.busy())

    def resume(self) -> None:
        """Accept again."""
        if self.suspended and self.current is not None:
            self.suspended = False
            for generation in self._accepting(self.current):
                generation.resume(self.now)
            log.event("resumed")

    def _accepting(self, current: Generation) -> list[Generation]:
        """During a trial those before accept where the new ones do not listen."""
        trial = self.reloading.canary if self.reloading is not None else None
        return [current] if trial is None else [current, trial.old]

    # -- who asks

    @property
    def state(self) -> str:
        """In a word, as `prefork status` has it."""
        if self.stopping is not None:
            return "stopping"
        if self.current is None:
            return "starting"
        if self.upgrade is not None and not self.upgrade.result:
            return "upgrading"
        if self.reloading is not None:
            return "reloading"
        return "suspended" if self.suspended else "running"

    def tell(self, clients: Sequence[Client], answer: dict[str, Any]) -> None:
        """Answer clients of the control socket."""
        if self.control is not None:
            for client in clients:
                self.control.answer(client, answer, self.now)

    def tell_when(self, client: Client, deadline: float, outcome: Outcome) -> None:
        """Answer one as soon as the outcome is known, or at the deadline."""
        if self.control is not None:
            self.control.answer_when(client, deadline, outcome)
