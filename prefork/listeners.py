"""The addresses that a daemon listens on: what a configuration wants, what is open already, and what is being closed.

A reload opens what is added before anything else is touched and closes what is removed after the commit; what stays is the same
socket throughout. A listener that is closed turns new clients away first and is served until no handshake is under way and its
queue is empty. Handshakes have a time of their own, after which the queue has its. Sockets that were inherited (``fd:N``, a service
manager's) belong to somebody else: they are accepted from, and otherwise left alone.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from socket import AF_UNIX

from prefork import log
from prefork.carried import CarriedFarewell
from prefork.config import Config
from prefork.errors import AddressError, ConfigError
from prefork.net.address import INHERITED, Address
from prefork.net.handshakes import UNSEEN, Cookies, Looks
from prefork.net.listener import Listener, Settings, adopt_inherited, open_listener
from prefork.net.mending import mend
from prefork.net.unix import UNCHANGED
from prefork.ops import instances
from prefork.system import credentials

# While a queue is being emptied it is looked at this often.
DRAIN_LOOK = 0.005


@dataclass(slots=True)
class Farewell:
    """A listener that is being closed, from ``begins`` on: it is served until its queue is empty, or until the deadline.

    That is ``seconds`` after the last handshake, and not known before: see `Listeners.tend`.
    """

    listener: Listener
    seconds: float
    deadline: float
    begins: float
    begun: bool = False  # nobody new is let in
    parted: bool = False  # all who accept there were asked to leave

    def wake_at(self, now: float) -> float:
        """When to look at it."""
        handshakes = self.listener.handshakes if self.begun else None
        return max(handshakes.look_at if handshakes is not None else self.begins, now + DRAIN_LOOK)


@dataclass(frozen=True, slots=True)
class Plan:
    """The listeners of a configuration, in its order; ``opened`` are those of them that were not open before."""

    listeners: tuple[Listener, ...]
    opened: tuple[Listener, ...] = ()
    owners: tuple[tuple[int, int], ...] = ()  # of each, where they are to change

    def drop(self) -> None:
        """It is not to be: close what was opened for it."""
        for listener in self.opened:
            listener.close()


@dataclass(slots=True)
class Listeners:
    """The listeners of a daemon. ``inherited``: descriptors that were open when it started, the only ones that fd:N may name."""

    inherited: frozenset[int] = frozenset()
    current: list[Listener] = field(default_factory=list)
    farewells: list[Farewell] = field(default_factory=list)
    cookies: Cookies = field(default_factory=Cookies)
    looks: Looks = field(default_factory=lambda: Looks(_tell_blind))
    mended: int = 0  # times

    def prepare(self, conf: Config, in_force: Config) -> Plan:
        """Open what the configuration adds. Raises PreforkError, and has then changed no listener that is as it should be.

        What user code has spoilt is put right at once, whatever becomes of the plan, and as ``in_force`` says: until the commit.
        """
        settings = _settings(conf)
        opened: list[Listener] = []
        places: list[Listener] = []
        owners: list[tuple[int, int]] = []
        try:
            for address, found in self._match(conf.bind):
                # One that has lost its path is served like a removed address.
                kept = None if found is not None and found.is_swept else found
                # A look-up may ask the network: only for what has changed.
                owners.append(_owner(address, kept.configured if kept is not None else None))
                if kept is not None and self._listens(kept, in_force):
                    places.append(kept)
                else:
                    opened.append(self._open(address, settings, owners[-1]) if kept is None else _anew(kept, conf))
                    places.append(opened[-1])
                if conf.drain == "eof" and places[-1].address.family == AF_UNIX:
                    raise ConfigError(f"drain = eof does not work for {address}, a Unix socket: take drain = finish")
        except BaseException:
            Plan((), tuple(opened)).drop()
            raise
        return Plan(tuple(places), tuple(opened), tuple(owners))

    def _open(self, address: Address, settings: Settings, owner: tuple[int, int]) -> Listener:
        if any(farewell.listener.configured.place == address.place for farewell in self.farewells):
            raise AddressError(
                f"{address} is still being closed: it serves those who wait in its queue or are about to; reload again in a moment"
            )
        if address.family == INHERITED:
            if address.port not in self.inherited:
                raise AddressError(f"{address}: no descriptor {address.port} was open when prefork started")
            return adopt_inherited(address, settings)
        if address.family == AF_UNIX:
            instances.refuse_mistakable(address.host)
        # Once there is anything to serve, the master looks through no other processes.
        return open_listener(address, settings, owner, find_holder=not self.current)

    def mend(self, listener: Listener, conf: Config) -> None:
        """Undo what user code has done to a listener's socket. Raises OSError when it can't be undone: only a new one will do."""
        undone = mend(listener.sock, listener.address, conf.backlog if listener.ours else None)
        if undone:
            self.mended += 1
            if self.mended & (self.mended - 1) == 0:  # 1, 2, 4, ...: a handler may do it for each client
                log.event("listener_mended", address=listener.address, what=" and ".join(undone), count=self.mended)

    def reopened(self, spoilt: Listener, listeners: Iterable[Listener], conf: Config) -> Plan:
        """These, but for ``spoilt`` another one at its very address. Raises PreforkError."""
        fresh = _anew(spoilt, conf)
        return Plan(tuple(fresh if listener is spoilt else listener for listener in listeners), (fresh,))

    def _listens(self, listener: Listener, conf: Config) -> bool:
        """Whether one that is to stay does listen, or does again."""
        try:
            self.mend(listener, conf)
        except OSError:
            return not listener.ours
        return True

    def accepts_at(self, listener: Listener) -> bool:
        """Whether it is listened on, and not being closed."""
        begun = [farewell.listener for farewell in self.farewells if farewell.begun]
        return listener not in begun and (listener in self.current or any(f.listener is listener for f in self.farewells))

    def _match(self, wanted: Iterable[Address]) -> list[tuple[Address, Listener | None]]:
        """With each address the listener that is open for it already, each listener once: two free ports are two."""
        left = defaultdict[tuple[int, str, int], list[Listener]](list)
        for listener in reversed(self.current):
            left[listener.configured.place].append(listener)
        return [(address, left[address.place].pop() if left[address.place] else None) for address in wanted]

    def commit(self, plan: Plan, conf: Config) -> list[Listener]:
        """The plan's listeners are the daemon's from now on. Returns those that are not any more, still open."""
        kept = set(plan.listeners)
        removed = [listener for listener in self.current if listener not in kept]
        first = not self.current
        self.current = list(plan.listeners)
        for place, (listener, address) in enumerate(zip(plan.listeners, conf.bind, strict=True)):
            if listener.fileno() == -1:
                continue  # a stop has closed it meanwhile
            try:
                # Without owners it is a restart, which does not try again what could not be changed.
                wanted, owner = (address, plan.owners[place]) if plan.owners else (listener.configured, UNCHANGED)
                listener.apply(wanted, _settings(conf), owner)
            except OSError as error:
                log.event("address_kept", address=listener.address, reason=error)
        for listener in plan.opened if not first else ():
            log.event("listening", address=listener.address)
        return removed

    def say_farewell(self, listener: Listener, begins: float, seconds: float) -> None:
        """From ``begins`` on let nobody new in, and close it when its queue is empty, or ``seconds`` after the last handshake."""
        self.farewells.append(Farewell(listener, seconds, begins + seconds, begins))

    def recall(self, listeners: Iterable[Listener]) -> None:
        """Those of them whose farewell has not begun stay."""
        self.farewells = [farewell for farewell in self.farewells if farewell.begun or farewell.listener not in listeners]

    def hurry(self, now: float, deadline: float) -> None:
        """All farewells begin now, and none may take longer."""
        for farewell in self.farewells:
            farewell.begins = min(farewell.begins, now)
            farewell.seconds = min(farewell.seconds, max(0.0, deadline - now))
            farewell.deadline = min(farewell.deadline, deadline)

    @property
    def settling(self) -> bool:
        """Whether handshakes are under way where nobody new is let in."""
        return any(farewell.begun and farewell.listener.handshakes is not None for farewell in self.farewells)

    def tend(self, now: float, part: Callable[[Listener], None], accepts: Callable[[Listener], bool]) -> None:
        """Close what has been served or has had its time; ``part`` is called before, for those who still accept there."""
        self.cookies.note(now)
        for farewell in [due for due in self.farewells if due.begins <= now]:
            try:
                over = self._is_over(farewell, now, part, accepts)
            except OSError as error:  # user code has the socket too, and no other farewell is to wait for what it has done to it
                log.event("farewell_failed", address=farewell.listener.address, reason=error)
                part(farewell.listener)
                over = True
            if over:
                self.farewells.remove(farewell)
                farewell.listener.close()
                address = farewell.listener.address
                # A socket that had lost its path has a successor of the same address.
                if not any(one.address == address and one is not farewell.listener for one in self.current):
                    log.event("no_longer_listening", address=address)
        self.looks.rest()

    def _is_over(
        self, farewell: Farewell, now: float, part: Callable[[Listener], None], accepts: Callable[[Listener], bool]
    ) -> bool:
        """Take a farewell on, by what is due; whether its listener can be closed."""
        if not farewell.begun:
            farewell.begun, farewell.begins = True, now
            farewell.listener.turn_away(now, self.looks, cookies=self.cookies.lately(now))
        if not farewell.parted:
            # In this order: a handshake that a look does not find any more is in the queue.
            settled, served = farewell.listener.settled(now), farewell.listener.drained()
            if not settled:
                farewell.deadline = max(farewell.deadline, now + farewell.seconds)
                return False
            if not served and farewell.deadline > now:
                return False
            farewell.parted = True
            part(farewell.listener)
        # Closing our own ends every accept() there. Somebody else's is not ours as long as anybody may still take a client.
        return farewell.listener.ours or farewell.deadline <= now or not accepts(farewell.listener)

    def wake_at(self, now: float) -> float | None:
        """When to `tend`."""
        return min((farewell.wake_at(now) for farewell in self.farewells), default=None)

    def carry(self, places: Mapping[Listener, int]) -> tuple[CarriedFarewell, ...]:
        """The farewells, for another program."""
        return tuple(
            CarriedFarewell(places[f.listener], f.seconds, f.deadline, f.begins, begun=f.begun, parted=f.parted)
            for f in self.farewells
        )

    def adopt(self, farewells: Iterable[CarriedFarewell], listeners: Sequence[Listener]) -> None:
        """Go on with another program's farewells."""
        for f in farewells:
            listener = listeners[f.listener]
            self.farewells.append(Farewell(listener, f.seconds, f.deadline, f.begins, begun=f.begun, parted=f.parted))
            if f.begun and not f.parted:
                listener.watch_handshakes(f.begins, self.looks, cookies=self.cookies.lately(f.begins))

    def close(self) -> None:
        """Close everything now."""
        for listener in (*self.current, *(farewell.listener for farewell in self.farewells)):
            listener.close()
        self.farewells.clear()


def _anew(spoilt: Listener, conf: Config) -> Listener:
    """Another listener at the very address of one that is of no use any more. Raises PreforkError."""
    real = spoilt.configured if spoilt.address.family == AF_UNIX else spoilt.address
    if spoilt.address.family != AF_UNIX and spoilt.accepts():
        # On an interface that it may not leave without CAP_NET_RAW, or behind a filter that is locked. As long as it listens the
        # kernel gives its address to no other socket. If that is refused, workers ring, and it listens there again (`Mending`).
        spoilt.shut_down()
    owner = _owner(real, None) if spoilt.is_swept else spoilt.owner()
    fresh = open_listener(real, _settings(conf), owner)
    fresh.configured = spoilt.configured
    return fresh


def _tell_blind(error: OSError) -> None:
    log.event("handshakes_unseen", reason=error.strerror or error, seconds=UNSEEN)


def _owner(address: Address, before: Address | None) -> tuple[int, int]:
    """Whose the path is to be; whose it was until now when nothing is said of it any more: ours."""
    if before == address:
        return UNCHANGED
    uid = credentials.uid_of(address.user) if address.user else os.geteuid() if before and before.user else -1
    gid = credentials.gid_of(address.group) if address.group else os.getegid() if before and before.group else -1
    return uid, gid


def _settings(conf: Config) -> Settings:
    return Settings(backlog=conf.backlog, nodelay=conf.nodelay, keepalive=conf.keepalive)
