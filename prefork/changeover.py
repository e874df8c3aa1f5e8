"""From one generation to the next: reload, canary, and a new fork server for a dead one.

`reload` reads the configuration and starts the next generation beside the last; nothing is touched before its first acceptors are
ready. `_commit` lets them accept and retires the last one's; `_refuse` drops the new and leaves everything as it was. With a
canary the last generation's fork server stays for a while, and `_roll_back` makes it the current one again when workers of the
new one crash.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

from prefork import __version__, config, log, names
from prefork.config import Config
from prefork.daemon import Canary, Daemon, Reload
from prefork.errors import ConfigError, HandlerError, PreforkError
from prefork.generation import Generation
from prefork.listeners import Plan
from prefork.net.listener import Listener
from prefork.ops.control import Client, Outcome
from prefork.pool import policy
from prefork.pool.lives import ForkServerLives
from prefork.pool.tally import LastReload, Trouble
from prefork.pool.throttle import Throttle

# After a commit: how long an answer waits for old idle workers to leave (they take milliseconds, unless somebody stopped one).
SETTLED = 1.0
# So many crashes of a canary's workers take the reload back; all of its first acceptors do, too.
CRASHES = 3
# A fork server that dies is replaced at once, so many together and then so many a second: each costs the master 6 ms and an import.
RESTARTS, RESTARTS_A_SECOND = 8, 1.0


class Changeover:
    """The reloads of a daemon, one at a time, and one that waits."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.wanted: list[Client] | None = None  # a reload asked for while another is under way
        self.restart_at: float | None = None
        self._lives = ForkServerLives()
        self._restarts = Throttle(RESTARTS_A_SECOND, RESTARTS, policy.BACKOFF_LIMIT)

    # -- starting the next generation

    def start(self) -> None:
        """Start the first one. Raises PreforkError; the listeners are closed again then."""
        daemon = self.daemon
        plan = daemon.listeners.prepare(daemon.config, daemon.config)
        try:
            daemon.warn_of_limits(plan.listeners)
            self._boot("start", daemon.config, plan, [])
        except BaseException:
            plan.drop()
            raise

    def reload(self, what: str, clients: Sequence[Client] = ()) -> None:
        """Read configuration and code again; ``clients`` are told the outcome. One that is under way is followed by another."""
        daemon = self.daemon
        if daemon.stopping is not None or (daemon.current is None and daemon.reloading is not None):
            why = "the daemon is stopping" if daemon.stopping is not None else "the daemon is starting"
            log.event("ignored", what=what, why=why)
            daemon.tell(clients, {"ok": False, "reason": why})
            return
        if daemon.reloading is not None or daemon.trying:
            if self.wanted is None:
                log.event("reload_queued")
            self.wanted = [*(self.wanted or []), *clients]
            return
        plan = Plan(())
        self.restart_at = None
        try:
            names.restore(daemon)  # whatever becomes of the rest
            conf = daemon.load()
            changed = config.needs_restart(daemon.config, conf)
            changed = changed or config.abandoned(daemon.config, conf, daemon.passed_sockets())
            if changed is not None:
                raise ConfigError(changed)
            log.open_for(conf)
            plan = daemon.listeners.prepare(conf, daemon.config)
            self._boot(what, conf, plan, clients)
        except PreforkError as error:
            plan.drop()
            daemon.close_unused_logs()
            self._remember("refused", str(error))
            self._refused(what, str(error), clients)

    def _boot(self, what: str, conf: Config, plan: Plan, clients: Sequence[Client], targets: Sequence[int] | None = None) -> None:
        daemon = self.daemon
        generation = daemon.boot(conf, plan.listeners, targets)
        daemon.reloading = Reload(what, daemon.now, generation, plan, list(clients), targets is not None)
        self._retire_where_closed(generation)

    def _retire_where_closed(self, generation: Generation) -> None:
        """A stop has closed some listeners already, whose queues were empty."""
        for place, listener in enumerate(generation.listeners):
            if listener.fileno() == -1:
                generation.retire(place, self.daemon.now, None)

    # -- a fork server has died

    def fork_server_ended(self, generation: Generation, cause: str, stack: str) -> None:
        """Its workers are the master's children now. The current one is replaced, a new one is given up."""
        daemon = self.daemon
        if generation.left or generation in daemon.draining or self._nobody_waits():
            return
        if generation is daemon.current:
            log.event("fork_server_died", text=stack, generation=generation.number, cause=cause)
            self.restart_at = daemon.now + self._wait_after_death(generation, cause)
        elif generation.failure is None:
            where = f"\n{stack}" if stack else "; does the import end it?"
            generation.failure = f"{generation.config.module}: the fork server died while it booted: {cause}{where}"

    def _wait_after_death(self, generation: Generation, cause: str) -> float:
        """Seconds until the fork server that has died is replaced."""
        daemon = self.daemon
        failures = self._lives.ended(daemon.now - generation.committed_at, served=generation.begun() > 0)
        self._restarts.spend(daemon.now)
        seconds, reason = max(0.0, self._restarts.until - daemon.now), f"the fork server died: {cause}"
        if failures:
            # A commit has ended the row of failures; this fork server has died soon after it, as the one before.
            daemon.trouble = Trouble(failures - 1, daemon.now)
            reason = f"the fork server died soon after its generation began to serve: {cause}"
            seconds = max(seconds, daemon.trouble.add(daemon.now, reason))
        if seconds:
            log.event("restarting", seconds=seconds, reason=reason)
        return seconds

    def ensure_fork_server(self) -> None:
        """Replace a dead fork server for which nothing is planned: a reload that was to take its place is not to be."""
        daemon = self.daemon
        if daemon.current is not None and daemon.current.link.pid is None and daemon.reloading is None and self.restart_at is None:
            self.restart_at = daemon.now

    def _nobody_waits(self) -> bool:
        return self.daemon.stopping is not None and not self.daemon.listeners.farewells

    def _tend_restart(self) -> None:
        """The current fork server is dead: the same configuration in a new one; its workers serve until it is ready."""
        daemon = self.daemon
        if self.restart_at is None or self.restart_at > daemon.now:
            return
        self.restart_at = None
        if daemon.current is None or daemon.reloading is not None or self._nobody_waits():
            return
        try:
            # What was scaled by hand stays so until the next reload.
            self._boot(
                "restart of the fork server", daemon.current.config, Plan(daemon.current.listeners), [], daemon.current.targets
            )
        except PreforkError as error:
            self._refused("restart of the fork server", str(error), [], policy.fork_backoff)

    # -- a listener is of no use any more

    def may_reopen(self, listener: Listener) -> bool:
        """Whether `reopen` can begin."""
        daemon = self.daemon
        return (
            daemon.current is not None
            and listener in daemon.current.listeners
            and daemon.reloading is None
            and not daemon.trying
            and daemon.stopping is None
        )

    def reopen(self, listener: Listener) -> None:
        """Open its address anew, for a fork server with the same configuration that takes the place of the current one."""
        daemon = self.daemon
        if daemon.current is None:
            return
        what, plan = f"reopening of {listener.address}", Plan(())
        self.restart_at = None
        try:
            plan = daemon.listeners.reopened(listener, daemon.current.listeners, daemon.current.config)
            self._boot(what, daemon.current.config, plan, [], daemon.current.targets)
        except PreforkError as error:
            plan.drop()
            self._refused(what, str(error), [])

    # -- what becomes of it

    def tend(self) -> None:
        """Do what is due."""
        # The canary first: a dead fork server of its is not to be replaced while there is a way back.
        if self.daemon.reloading is not None and self.daemon.reloading.canary is not None:
            self._tend_canary(self.daemon.reloading, self.daemon.reloading.canary)
        self._tend_restart()
        reload = self.daemon.reloading
        if reload is not None and reload.canary is None:
            self._tend_boot(reload)
        elif self._follows:
            clients, self.wanted = self.wanted or [], None
            self.reload("queued reload", clients)

    @property
    def _follows(self) -> bool:
        """Whether the reload that waits can begin."""
        return self.wanted is not None and self.daemon.reloading is None and not self.daemon.trying

    def _tend_boot(self, reload: Reload) -> None:
        generation = reload.generation
        if generation.failure is None and generation.parked:
            self._commit(reload)  # also when we were stopped, and find it ready after its deadline
            return
        if generation.failure is None and generation.boot_deadline <= self.daemon.now:
            generation.failure = _what_hangs(generation)
        if generation.failure is not None:
            self._refuse(reload, generation.failure)

    def wake_at(self) -> float | None:
        """When to `tend`."""
        if self._follows:
            return self.daemon.now
        times, reload = [self.restart_at], self.daemon.reloading
        if reload is not None:
            times.append(reload.canary.until if reload.canary is not None else reload.generation.boot_deadline)
        return min((at for at in times if at is not None), default=None)

    def _commit(self, reload: Reload) -> None:
        daemon, old, new = self.daemon, self.daemon.current, reload.generation
        daemon.trouble = Trouble()
        if daemon.stopping is not None:
            new.announce_stop()
            self._retire_where_closed(new)
        canary = None
        if old is not None and new.config.canary and not reload.is_restart and daemon.stopping is None:
            owners = tuple(listener.owner() for listener in old.listeners)
            canary = Canary(old, daemon.now + new.config.canary, min(CRASHES, sum(new.targets)), owners)
            old.kept = True
        removed = self._put_in_place(old, new, reload.plan, farewell_at=canary.until if canary is not None else daemon.now)
        reload.canary = canary
        if canary is None:
            daemon.reloading = None
        if old is None:
            self._started(new)
        else:
            log.event("committed", generation=new.number, module=new.config.module, seconds=daemon.now - reload.at)
            if removed and canary is None:
                self._serve_who_waits(old)
        if canary is not None:
            log.event("canary", generation=new.number, seconds=new.config.canary, most=canary.most)
        else:
            self._done(reload, old)

    def _put_in_place(self, old: Generation | None, new: Generation, plan: Plan, farewell_at: float) -> list[Listener]:
        """``new`` accepts, ``old`` does so only where ``new`` does not listen: until the queue there is served, some time later.

        Returns the listeners that are removed.
        """
        daemon = self.daemon
        daemon.current, daemon.config = new, new.config
        if daemon.suspended:
            new.suspend(daemon.now)
        new.commit(daemon.now)
        removed = daemon.listeners.commit(plan, new.config)
        useless = [listener for listener in removed if not listener.accepts()]
        removed = [listener for listener in removed if listener not in useless]
        if old is not None:
            daemon.draining.append(old)
            for place, listener in enumerate(old.listeners):
                if listener not in removed:
                    old.retire(place, daemon.now, old.drain_deadline(daemon.now))
        for listener in useless:  # a handler has shut it down: its queue is gone
            listener.close()
        for listener in removed:
            daemon.listeners.say_farewell(listener, farewell_at, daemon.config.graceful_timeout)
        log.use(new.config)
        daemon.warn_of_limits(daemon.listeners.current)
        return removed

    def _done(self, reload: Reload, old: Generation | None) -> None:
        """It is for good."""
        daemon = self.daemon
        if old is not None and not reload.is_restart:
            self._remember("ok", None)
        outcome = self._when_settled(old, reload.generation)
        for client in reload.clients:
            daemon.tell_when(client, daemon.now + SETTLED, outcome)

    def _when_settled(self, old: Generation | None, new: Generation) -> Outcome:
        """Who asked for a reload hears of it when nobody accepts with the old code any more."""
        daemon = self.daemon
        late = daemon.now + SETTLED

        def outcome(now: float) -> dict[str, Any] | None:
            left = old is None or not old.accepts
            return {"ok": True, "generation": new.number, "suspended": daemon.suspended} if left or now >= late else None

        return outcome

    def _started(self, new: Generation) -> None:
        daemon = self.daemon
        log.event(
            "serving",
            version=__version__,
            module=new.config.module,
            addresses=", ".join(str(listener.address) for listener in daemon.listeners.current),
            acceptors=new.config.workers,
            name=daemon.name,
            pid=daemon.pid,
        )
        if daemon.wiring.runs_as_root:
            log.event("handlers_are_root")

    # -- the canary

    def _tend_canary(self, reload: Reload, canary: Canary) -> None:
        new, seconds = reload.generation, reload.generation.config.canary
        if canary.old.link.pid is None:
            # Nor would a new fork server for it be a way back: it would import the new code.
            log.event("canary_lost", generation=canary.old.number)
            self._end_canary(reload, canary)
        elif new.link.pid is None:
            self._roll_back(reload, canary, f"its fork server died within canary = {seconds:g} s")
        elif len(new.crashes) >= canary.most:
            what = f"{len(new.crashes)} of its workers crashed within canary = {seconds:g} s"
            self._roll_back(reload, canary, f"{what}\n" + "\n".join(new.crashes))
        elif canary.until <= self.daemon.now:
            log.event("canary_passed", generation=new.number, crashes=len(new.crashes))
            self._end_canary(reload, canary)

    def _serve_who_waits(self, old: Generation) -> None:
        """Although the daemon is suspended: ``old`` accepts again where addresses are removed; nobody else would."""
        if self.daemon.suspended:
            old.resume(self.daemon.now)

    def _end_canary(self, reload: Reload, canary: Canary) -> None:
        self.daemon.reloading = None
        canary.old.kept = False
        self.daemon.listeners.hurry(self.daemon.now, self.daemon.now + self.daemon.config.graceful_timeout)
        self._serve_who_waits(canary.old)
        self._done(reload, canary.old)

    def _roll_back(self, reload: Reload, canary: Canary, reason: str) -> None:
        """The last generation serves again, as it did before."""
        daemon, old, new = self.daemon, canary.old, reload.generation
        daemon.reloading, self.restart_at = None, None
        daemon.draining.remove(old)
        old.reinstate(daemon.now)
        plan = Plan(old.listeners, owners=canary.owners)
        daemon.listeners.recall(old.listeners)
        if self._put_in_place(new, old, plan, farewell_at=daemon.now):
            self._serve_who_waits(new)
        first, _, rest = reason.partition("\n")
        for listener in old.listeners:
            if listener.is_swept:  # it was so before the reload
                log.event("listener_swept", address=listener.address)
        log.event("rolled_back", what=reload.what, generation=old.number, crashed=new.number, reason=first, text=rest)
        self._remember("rolled back", reason)
        daemon.tell(reload.clients, {"ok": False, "reason": f"rolled back to generation {old.number}: {reason}"})

    # -- it is not to be

    def drop(self, reason: str) -> None:
        """The daemon stops: no reload is needed any more. One that is committed stays so."""
        daemon = self.daemon
        if daemon.reloading is not None:
            reload, daemon.reloading = daemon.reloading, None
            if reload.canary is not None:
                reload.canary.old.kept = False
                if daemon.stopping is not None and not daemon.stopping.killed:
                    self._serve_who_waits(reload.canary.old)
            else:
                reload.generation.abandon(daemon.now)
                daemon.draining.append(reload.generation)
                reload.plan.drop()
            daemon.tell(reload.clients, {"ok": False, "reason": reason})
        if self.wanted is not None:
            daemon.tell(self.wanted, {"ok": False, "reason": reason})
            self.wanted = None

    def _refuse(self, reload: Reload, reason: str) -> None:
        daemon = self.daemon
        daemon.reloading = None
        daemon.draining.append(reload.generation)
        reload.generation.abandon(daemon.now)
        reload.plan.drop()
        if daemon.current is None:
            daemon.failure = HandlerError(reason)
            return
        if not reload.is_restart:
            self._remember("refused", reason)
        self._refused(reload.what, reason, reload.clients)

    def _refused(self, what: str, reason: str, clients: Sequence[Client], wait: Callable[[int], float] = policy.backoff) -> None:
        daemon = self.daemon
        current = daemon.current
        first, _, rest = reason.partition("\n")
        log.event("refused", what=what, generation=current.number if current else 0, reason=first, text=rest)
        daemon.tell(clients, {"ok": False, "reason": reason})
        if current is not None and current.link.pid is None and daemon.stopping is None:
            seconds = daemon.trouble.add(daemon.now, reason, wait=wait)
            self.restart_at = daemon.now + seconds
            log.event("restarting", seconds=seconds, reason=first)

    def _remember(self, result: str, reason: str | None) -> None:
        self.daemon.last_reload = LastReload(time.time(), result, reason)


def _what_hangs(generation: Generation) -> str:
    conf = generation.config
    if generation.fork_trouble.failures:
        return f"{generation.fork_trouble.reason}: its workers are not there after boot_timeout = {conf.boot_timeout:g} s"
    if generation.ready:
        if not conf.on_worker_start:
            return f"{conf.module}: its workers are not ready after boot_timeout = {conf.boot_timeout:g} s"
        what, check = f"on_worker_start = {conf.on_worker_start}", "prefork check --hooks"
    elif conf.on_boot:
        what, check = "the import or on_boot", "prefork check --hooks"
    else:
        what, check = "the import", "prefork check"
    return f"{conf.module}: {what} has not ended after boot_timeout = {conf.boot_timeout:g} s; {check} tells where it hangs"
