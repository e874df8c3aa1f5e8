"""The master: owns the listeners, starts and retires generations, hears signals and the control socket, tells systemd.

One thread, one selector, no user code, and it never waits for anybody: `Master.run` is the whole loop. What happens is folded
into state; `tend` then looks at the state and does what is due; the selector sleeps until the next event or deadline. All
clocks are monotonic. What it must not do: import a handler, block, or die of what a worker, a client or a file does.

The verbs: `reload` starts the next generation, `commit` puts it in the place of the last, `refuse` drops it and leaves
everything as it was; `stop` turns new clients away, serves the queue, lets connections finish, and ends.
"""

import os
import selectors
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from prefork import __version__, config, log
from prefork.config import Config, Sources
from prefork.errors import AddressError, ConfigError, HandlerError, PreforkError
from prefork.generation import Generation
from prefork.link import Wiring
from prefork.listeners import DRAIN_LOOK, Listeners, Plan
from prefork.net.listener import Listener
from prefork.ops import control, instances
from prefork.ops.control import Client, ControlServer, Outcome
from prefork.pool import wire
from prefork.pool.scoreboard import BUSY
from prefork.pool.tally import Tally, Trouble
from prefork.system import credentials, limits, pidfile, process, signals
from prefork.system.pidfile import PidFile
from prefork.system.systemd import Notifier, activated

HANDLED = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGCHLD,
)
LONGEST_SLEEP = 86400.0
# A flood of doorbells (no worker of ours rings that often) is not listened to for this long.
FLOOD, FLOOD_REST = 16, 0.003
# Slept for this much longer than planned, this process was stopped or starved: nobody is punished for that time.
OVERSLEPT = 0.05
# After a commit: how long an answer waits for old idle workers to leave (they take milliseconds, unless somebody stopped one).
RELOAD_SETTLED = 1.0
# A wrapper that forwards Ctrl-C makes two SIGINT of one: they are a millisecond apart.
SAME_INTERRUPT = 0.1
# A stop's last word: who is still there after SIGKILL and this long is not waited for.
QUICK_LIMIT = 1.0


@dataclass(slots=True)
class Reload:
    """A reload under way, or a fork server's replacement; ``clients`` are told how it ends."""

    what: str
    at: float
    generation: Generation
    plan: Plan
    clients: list[Client]


@dataclass(slots=True)
class Stop:
    """A stop under way."""

    why: str
    at: float
    deadline: float
    clients: list[Client]
    killed: bool = False


class Master:
    """The master process. ``run`` serves until stopped and returns the exit code."""

    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        self.lost = 0.0  # seconds in which this process was stopped or starved
        self.now = time.monotonic()
        self.started = time.time()
        self.listeners = Listeners()
        self.current: Generation | None = None
        self.reload: Reload | None = None
        self.draining: list[Generation] = []
        self.stop: Stop | None = None
        self.tally = Tally()
        self.trouble = Trouble()  # of fork servers
        self.restart_at: float | None = None
        self.reload_wanted: list[Client] | None = None  # a reload asked for while another is under way
        self.last_reload: dict[str, Any] | None = None
        self.next_number = 1
        self.control: ControlServer | None = None
        self.pid_file: PidFile | None = None
        self.suspended = False
        self.saturated_before = 0.0
        self.failure: PreforkError | None = None
        self.finished = False
        self.deaf_until: float | None = None
        self.seen_exited = 0
        self.demand: limits.Demand | None = None  # what the machine's limits were last held against
        self.pid = os.getpid()

    # -- the loop

    def run(self) -> int:
        """Serve until stopped. Raises PreforkError when the start fails."""
        self._start()
        try:
            while not self.finished:
                self._sleep()
                # The inbox is emptied before anybody is reaped: a SIGCHLD that comes after the reaping wakes the next sleep.
                arrived = self.inbox.take()
                self._reap()
                self._obey_signals(arrived)
                self._tend()
        except Exception:
            log.event("bug", where="master", text=traceback.format_exc())
            self._kill_everything()
            self._close()
            return PreforkError.exit_code
        self._close()
        if self.failure is not None:
            raise self.failure
        return 0

    def _start(self) -> None:
        self.listeners.inherited = frozenset(process.descriptors()) - {0, 1, 2}
        self.activated = activated(os.environ)
        conf = self.config = self._load()
        who = credentials.wanted(conf.user, conf.group)
        if who is not None and who.uid != 0:
            log.give_to(who.uid)
        log.use(conf)
        self._warn_of_unused(conf)
        self.name = conf.instance
        process.set_title(f"prefork: master {self.name}")
        process.become_subreaper()
        for name, remedy in config.unknown_variables(self.sources.environment):
            log.event("unknown_variable", name=name, remedy=remedy)
        self.notifier = Notifier.from_environment()
        self.selector = selectors.DefaultSelector()
        doorbell_read, doorbell_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        devnull = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self.wiring = Wiring(self.name, process.working_directory(), doorbell_read, doorbell_write, devnull, who)
        # Before anything can be seen of us: a stop or a log rotation that comes early must not end us with files left behind.
        self.inbox = signals.Inbox(HANDLED)
        self._open_control()
        try:
            if conf.pid_file:
                self.pid_file = pidfile.write(conf.pid_file)
            plan = self.listeners.prepare(conf)
            self._warn_of_limits(plan.listeners)
            self.selector.register(self.inbox, selectors.EVENT_READ, lambda _: None)
            self.selector.register(doorbell_read, selectors.EVENT_READ, self._answer_the_door)
            self._boot("start", conf, plan, [])
        except BaseException:
            self._close()
            raise

    def _load(self) -> Config:
        conf, origins = self.sources.trace()
        return config.with_activated(conf, origins, self.activated)

    def _warn_of_unused(self, conf: Config) -> None:
        unused = sorted({name for name, fd in self.activated if all(address.port != fd for address in conf.bind)})
        if unused:
            log.event("activated_unused", names=", ".join(unused))

    def _sleep(self) -> None:
        """Wait for the next event or deadline, and pass events on."""
        planned = self._wake_at()
        for generation in self._generations():
            self._listen_to(generation)
        self.lost += max(0.0, self._clock() - self.now - OVERSLEPT)
        before = self._clock()
        # epoll takes at most 2**31 milliseconds.
        timeout = None if planned is None else min(LONGEST_SLEEP, max(0.0, planned - before))
        events = self.selector.select(timeout)
        if timeout is not None:
            self.lost += max(0.0, self._clock() - max(self.now, before + timeout) - OVERSLEPT)
        self.now = self._clock()
        for key, _ in events:
            key.data(self.now)

    def _clock(self) -> float:
        return time.monotonic() - self.lost

    def _listen_to(self, generation: Generation) -> None:
        if generation.link.pid is None:
            return
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if generation.link.has_mail else 0)
        if self.selector.get_key(generation.link.channel).events != wanted:
            self.selector.modify(generation.link.channel, wanted, self._postman(generation))

    def _postman(self, generation: Generation) -> Callable[[float], None]:
        def deliver(now: float) -> None:
            generation.link.flush()
            if not generation.receive(now):
                # It has closed its end: it is dead, or as good as dead, and can't be told anything.
                generation.link.kill()

        return deliver

    def _generations(self) -> list[Generation]:
        pending = [self.reload.generation] if self.reload is not None else []
        return [*([self.current] if self.current is not None else []), *pending, *self.draining]

    def _answer_the_door(self, now: float) -> None:
        try:
            data = os.read(self.wiring.doorbell_read, wire.PIPE_READ)
        except BlockingIOError:
            return
        rings, stray = wire.read_doorbells(data)
        generations = {generation.number: generation for generation in self._generations()}
        for ring in rings:
            if (generation := generations.get(ring.generation)) is not None:
                generation.rang(ring, now)
        if stray or len(rings) > FLOOD:
            # Rings may have been lost, or be somebody's noise: look at everything, and then not at the door for a while.
            for generation in generations.values():
                generation.look_soon_all(now)
            self.selector.unregister(self.wiring.doorbell_read)
            self.deaf_until = now + FLOOD_REST

    def _reap(self) -> None:
        changes = process.reap(stops=True)
        if not changes:
            return
        generations = self._generations()
        for change in changes:
            if isinstance(change, process.Changed):
                for generation in generations:
                    generation.note_stop(change.pid, self.now, stopped=change.stopped)
        ended = [change for change in changes if isinstance(change, process.Ended)]
        # What a dead fork server said last comes before its end; a channel holds 278 messages, a turn takes 256.
        dead = {change.pid for change in ended}
        for generation in generations:
            if generation.link.pid in dead and generation.receive(self.now):
                generation.receive(self.now)
        # Workers before fork servers: one end of each may have been reaped just now, and a worker must not count as vanished.
        for change in ended:
            for generation in generations:
                worker = generation.pool.by_pid(change.pid)
                if worker is not None:
                    cpu = change.utime + change.stime
                    generation.exited(worker.slot, change.pid, change.status, cpu, change.max_rss_kib, self.now)
        for change in ended:
            for generation in generations:
                if generation.link.pid == change.pid:
                    self._fork_server_ended(generation, change)

    def _fork_server_ended(self, generation: Generation, change: process.Ended) -> None:
        self.selector.unregister(generation.link.channel)
        generation.fork_server_ended(self.now)
        if generation.left or self.stop is not None or generation in self.draining:
            return
        cause = process.describe(change.status)
        if generation.failure is None and generation is not self.current:
            generation.failure = f"the fork server died while it booted: {cause}"
        if generation is self.current:
            log.event("fork_server_died", generation=generation.number, cause=cause)
            self.restart_at = self.now

    def _obey_signals(self, arrived: set[int]) -> None:
        if signal.SIGQUIT in arrived:
            self._stop_quickly("SIGQUIT")
        if signal.SIGTERM in arrived:
            self._stop("SIGTERM")
        if signal.SIGINT in arrived:
            if self.stop is None:
                self._stop("SIGINT")
            elif self.now >= self.stop.at + SAME_INTERRUPT:
                self._stop_quickly("a second SIGINT")
        if signal.SIGHUP in arrived:
            self._reload("reload (SIGHUP)")
        if signal.SIGUSR1 in arrived:
            self._reopen_logs()
        for signo, step in ((signal.SIGTTIN, 1), (signal.SIGTTOU, -1)):
            if signo in arrived and self.current is not None:
                self._scale(max(1, self.current.targets[0] + step), signals.name(signo))

    def _tend(self) -> None:
        """Do what is due; each step looks at the state and finds out by itself whether there is anything to do."""
        self._tend_restart()
        self._tend_reload()
        generations = self._generations()
        live = sum(generation.live() for generation in generations)
        if self.tally.exited != self.seen_exited:
            self.seen_exited = self.tally.exited
            for generation in generations:
                generation.room_was_made(self.now)
        for generation in generations:
            generation.tend(self.now, live - generation.live())
        for generation in [g for g in self.draining if g.gone]:
            self.draining.remove(generation)
            generation.close()
            self._close_unused_logs()
        self.listeners.tend(self.now, self._part_from)
        self._tend_stop()
        for generation in self.draining:
            generation.let_go(self.now)
        if self.deaf_until is not None and self.deaf_until <= self.now:
            self.deaf_until = None
            self.selector.register(self.wiring.doorbell_read, selectors.EVENT_READ, self._answer_the_door)
        if self.control is not None:
            self.control.tend(self.now)

    def _wake_at(self) -> float | None:
        times = [generation.wake_at() for generation in self._generations()]
        times += [self.restart_at, self.deaf_until]
        if self.control is not None:
            times.append(self.control.wake_at())
        if self.reload is not None:
            times.append(self.reload.generation.boot_deadline)
        if self.listeners.farewells:
            times.append(self.now + DRAIN_LOOK)
        if self.stop is not None:
            times.append(self.stop.deadline)
        return min((at for at in times if at is not None), default=None)

    # -- generations

    def _boot(
        self,
        what: str,
        conf: Config,
        plan: Plan,
        clients: list[Client],
        *,
        targets: Sequence[int] | None = None,
    ) -> None:
        generation = Generation(self.next_number, conf, plan.listeners, self.wiring, self.tally, self.now, targets)
        self.next_number += 1
        try:
            generation.link.start(conf, plan.listeners)
        except OSError:
            generation.close()
            raise
        self.selector.register(generation.link.channel, selectors.EVENT_READ, self._postman(generation))
        self.reload = Reload(what, self.now, generation, plan, clients)

    def _reload(self, what: str, client: Client | None = None) -> None:
        clients = [client] if client is not None else []
        if self.stop is not None or (self.current is None and self.reload is not None):
            why = "the daemon is stopping" if self.stop is not None else "the daemon is starting"
            log.event("ignored", what=what, why=why)
            self._tell(clients, {"ok": False, "reason": why})
            return
        if self.reload is not None:
            if self.reload_wanted is None:
                log.event("reload_queued")
            self.reload_wanted = (self.reload_wanted or []) + clients
            return
        plan = Plan(())
        self.restart_at = None
        try:
            conf = self._load()
            self._warn_of_unused(conf)
            changed = config.needs_restart(self.config, conf)
            if changed is not None:
                raise ConfigError(f"{changed} has changed, which needs a restart")
            log.open_for(conf)
            plan = self.listeners.prepare(conf)
            self._boot(what, conf, plan, clients)
        except (PreforkError, OSError) as error:
            plan.drop()
            self._close_unused_logs()
            self._refused(what, str(error), clients)

    def _tend_restart(self) -> None:
        """The current fork server is dead: the same configuration in a new one; its workers serve until it is ready."""
        if self.restart_at is None or self.restart_at > self.now:
            return
        self.restart_at = None
        if self.current is None or self.reload is not None or self.stop is not None:
            return
        try:
            # What was scaled by hand stays so until the next reload.
            plan = Plan(self.current.listeners)
            self._boot("restart of the fork server", self.current.config, plan, [], targets=self.current.targets)
        except OSError as error:
            self._refused("restart of the fork server", f"fork failed: {error.strerror}", [])

    def _tend_reload(self) -> None:
        reload = self.reload
        if reload is None:
            if self.reload_wanted is not None:
                clients, self.reload_wanted = self.reload_wanted, None
                self._reload("queued reload", None)
                if self.reload is not None:
                    self.reload.clients += clients
                else:
                    self._tell(clients, {"ok": False, "reason": (self.last_reload or {}).get("reason")})
            return
        generation = reload.generation
        if generation.failure is None and generation.boot_deadline <= self.now:
            import_ = "the import or on_boot" if generation.config.on_boot else "the import"
            doing = "its workers are not ready" if generation.ready else f"{import_} has not ended"
            generation.failure = f"{doing} after boot_timeout = {generation.config.boot_timeout:g} s"
        if generation.failure is not None:
            self._refuse(reload, generation.failure)
        elif generation.parked:
            self._commit(reload)

    def _commit(self, reload: Reload) -> None:
        old, new = self.current, reload.generation
        self.reload = None
        self.current, self.config = new, new.config
        self.trouble = Trouble()
        if self.suspended:
            new.suspend(self.now)
        new.commit(self.now)
        removed = self.listeners.commit(reload.plan, new.config)
        if old is not None:
            self.saturated_before += old.saturated_for(self.now)
            self.draining.append(old)
            for place, listener in enumerate(old.listeners):
                if listener not in removed:
                    old.retire(place, self.now, self._drain_deadline(old))
            log.event("committed", generation=new.number, module=new.config.module, seconds=self.now - reload.at)
            self._remember("ok", None)
        else:
            self._started(new)
        for listener in removed:
            self.listeners.say_farewell(listener, self.now + self.config.graceful_timeout)
        log.use(new.config)
        self._warn_of_limits(self.listeners.current)
        outcome = self._when_settled(old, new)
        for client in reload.clients:
            self._tell_when(client, self.now + RELOAD_SETTLED, outcome)

    def _when_settled(self, old: Generation | None, new: Generation) -> Outcome:
        """Who asked for a reload hears of it when nobody accepts with the old code any more."""
        late = self.now + RELOAD_SETTLED

        def outcome(now: float) -> dict[str, Any] | None:
            left = old is None or not old.accepts
            return {"ok": True, "generation": new.number} if left or now >= late else None

        return outcome

    def _drain_deadline(self, generation: Generation) -> float | None:
        seconds = generation.config.drain_timeout
        return self.now + seconds if seconds else None

    def _started(self, new: Generation) -> None:
        log.event(
            "serving",
            version=__version__,
            module=new.config.module,
            addresses=", ".join(str(listener.address) for listener in self.listeners.current),
            acceptors=new.config.workers,
            name=self.name,
            pid=os.getpid(),
        )
        who = self.wiring.credentials
        if os.geteuid() == 0 and (who is None or who.uid == 0):
            log.event("handlers_are_root")
        self.notifier.send(READY=1)

    def _refuse(self, reload: Reload, reason: str) -> None:
        self.reload = None
        self.draining.append(reload.generation)
        reload.generation.abandon(self.now)
        reload.plan.drop()
        if self.current is None:
            self.failure = HandlerError(reason)
            self._stop_quickly("the start failed")
            return
        self._refused(reload.what, reason, reload.clients)

    def _refused(self, what: str, reason: str, clients: list[Client]) -> None:
        current = self.current
        first, _, rest = reason.partition("\n")
        log.event("refused", what=what, generation=current.number if current else 0, reason=first, text=rest)
        self._remember("refused", reason)
        self._tell(clients, {"ok": False, "reason": reason})
        if current is not None and current.link.pid is None and self.stop is None:
            seconds = self.trouble.add(self.now, reason)
            self.restart_at = self.now + seconds
            log.event("restarting", seconds=seconds, reason=first)

    def _remember(self, result: str, reason: str | None) -> None:
        self.last_reload = {"at": time.time(), "result": result, "reason": reason}

    def _scale(self, workers: int, why: str) -> str | None:
        """Want this many acceptors for each listener. Returns why not."""
        current = self.current
        if current is None or self.stop is not None:
            return "the daemon is starting or stopping"
        most = self.config.max_workers // len(current.listeners)
        if not 1 <= workers <= most:
            ceiling = f"max_workers = {self.config.max_workers} for {len(current.listeners)} listeners"
            reason = f"workers = {workers}: must be 1 to {most} ({ceiling})"
            log.event("ignored", what=why, why=reason)
            return reason
        if workers != current.targets[0]:
            current.retarget(workers, self.now)
            log.event("scaled", workers=workers, why=why)
        return None

    # -- log files

    def _reopen_logs(self) -> None:
        """A rotation has renamed them: make new ones, then let everybody follow."""
        if not log.has_files():
            log.event("ignored", what="SIGUSR1", why="the log goes to standard error, there is no file to be opened again")
        elif log.reopen():
            for generation in self._generations():
                generation.reopen_log()

    def _close_unused_logs(self) -> None:
        log.keep_only([self.config, *(generation.config for generation in self._generations())])

    # -- listeners

    def _warn_of_limits(self, listeners: Sequence[Listener]) -> None:
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
            running=sum(generation.live() for generation in self._generations()),
            queue_limit=next((queue[1] for listener in listeners if (queue := listener.queue()) is not None), None),
        )
        if demand == self.demand:
            return
        self.demand = demand
        for shortage in limits.shortages(limits.read(os.environ), demand):
            log.event("limit", **_fields(shortage))

    def _part_from(self, listener: Listener) -> None:
        """Nobody accepts there any more."""
        for generation in self._generations():
            if listener in generation.listeners:
                deadline = None if self.stop is not None else self._drain_deadline(generation)
                generation.retire(generation.listeners.index(listener), self.now, deadline)

    # -- suspending

    def _suspend(self) -> None:
        """Nobody accepts any more; the sockets stay bound, and the kernel's queue holds clients."""
        if not self.suspended and self.current is not None:
            self.suspended = True
            self.current.suspend(self.now)
            log.event("suspended", busy=sum(generation.count(BUSY) for generation in self._generations()))

    def _resume(self) -> None:
        if self.suspended and self.current is not None:
            self.suspended = False
            self.current.resume(self.now)
            log.event("resumed")

    # -- stopping

    def _stop(self, why: str, client: Client | None = None, timeout: float | None = None) -> None:
        clients = [client] if client is not None else []
        if self.stop is not None:
            self.stop.clients += clients
            if timeout is not None and not self.stop.killed:
                self._hurry(self.now + timeout)
            return
        seconds = self.config.graceful_timeout if timeout is None else timeout
        self.stop = Stop(why, self.now, self.now + seconds, clients)
        self.notifier.send(STOPPING=1)
        self._drop_reload("the daemon is stopping")
        busy = sum(generation.count(BUSY) for generation in self._generations())
        log.event("stopping", why=why, busy=busy, seconds=seconds)
        # Who waits in the queue has been connected by the kernel: a stop serves them.
        self._resume()
        for generation in self._generations():
            generation.announce_stop()
        for listener in self.listeners.current:
            self.listeners.say_farewell(listener, self.stop.deadline)
        self._hurry(self.stop.deadline)

    def _hurry(self, deadline: float) -> None:
        """Nothing that ends may take longer than this stop."""
        if self.stop is not None:
            self.stop.deadline = min(self.stop.deadline, deadline)
            self.listeners.hurry(self.stop.deadline)

    def _stop_quickly(self, why: str, client: Client | None = None) -> None:
        clients = [client] if client is not None else []
        if self.stop is not None:
            clients += self.stop.clients
        else:
            self.notifier.send(STOPPING=1)
        if self.failure is None:
            log.event("stopping_quickly", why=why)
        self.stop = Stop(why, self.now, self.now + QUICK_LIMIT, clients, killed=True)
        self._drop_reload("the daemon is stopping")
        self.listeners.close()
        for generation in self._generations():
            generation.announce_stop()
            generation.quit()

    def _drop_reload(self, reason: str) -> None:
        if self.reload is not None:
            reload, self.reload = self.reload, None
            reload.generation.abandon(self.now)
            self.draining.append(reload.generation)
            self._tell(reload.clients, {"ok": False, "reason": reason})
            reload.plan.drop()
        if self.reload_wanted is not None:
            self._tell(self.reload_wanted, {"ok": False, "reason": reason})
            self.reload_wanted = None

    def _tend_stop(self) -> None:
        stop = self.stop
        if stop is None or self.listeners.farewells:
            return
        if self.current is not None:
            self.draining.append(self.current)
            self.current = None
        for generation in self.draining:
            generation.retire_all(self.now, None)  # the stop's own deadline is below
        if not self.draining:
            self.finished = True
        elif stop.deadline <= self.now and not stop.killed:
            # The listeners are out of use: nobody can be lost any more by killing one who does not leave.
            stop.killed, stop.deadline = True, self.now + QUICK_LIMIT
            for generation in self.draining:
                generation.kill_all(f"still there at the end of graceful_timeout ({stop.why})")
        elif stop.deadline <= self.now:
            for generation in self.draining:
                generation.link.kill()
                generation.quit()
            stop.deadline = self.now + QUICK_LIMIT

    def _kill_everything(self) -> None:
        if os.getpid() != self.pid:
            return  # a child that has unwound into these frames must not act for the master
        for generation in self._generations():
            generation.quit()
            generation.link.kill()

    def _close(self) -> None:
        """Leave nothing behind, and tell those who wait for it."""
        if os.getpid() != self.pid:
            os._exit(PreforkError.exit_code)
        # Nothing is left to do for a signal, and the interpreter gives them their default action while it ends.
        signals.block()
        counts = self.tally.counts
        self.listeners.close()
        if self.stop is not None:
            if self.failure is None:
                log.event("stopped", accepted=counts.begun, killed=counts.killed)
            self._tell(self.stop.clients, {"ok": True, "accepted": counts.begun, "killed": counts.killed})
        if self.control is not None:
            self.control.close()
        if self.pid_file is not None:
            self.pid_file.remove()

    # -- the control socket

    def _open_control(self) -> None:
        if self.config.control == "off":
            return
        try:
            path = self.config.control or instances.default_path(self.name)
            self.control = control.serve(path, self.selector, self._obey)
        except AddressError as error:
            raise AddressError(f"{error}: an instance named {self.name} is running, give this one another --name") from None
        except OSError as error:
            log.event("control_failed", reason=f"{error.filename}: {error.strerror}" if error.filename else error.strerror or error)

    def _obey(self, client: Client, request: dict[str, Any]) -> None:
        match request["command"]:
            case "status":
                self._report_status(client)
            case "reload":
                self._reload("reload", client)
            case "scale":
                self._obey_scale(client, request.get("workers"))
            case "suspend" | "resume" as wanted:
                self._obey_suspend(client, wanted)
            case "stop":
                self._obey_stop(client, request)
            case unknown:
                self._tell([client], {"ok": False, "reason": f"unknown command {str(unknown)[:80]!r}"})

    def _obey_scale(self, client: Client, wanted: object) -> None:
        current = self.current
        try:
            if current is None:
                raise ValueError("the daemon is starting or stopping")
            workers = control.scaled(str(wanted), current.targets[0])
        except ValueError as error:
            self._tell([client], {"ok": False, "reason": str(error)})
            return
        reason = self._scale(workers, "prefork scale")
        if reason is not None:
            self._tell([client], {"ok": False, "reason": reason})
            return

        def outcome(_: float) -> dict[str, Any] | None:
            if self.current is not current:
                return {"ok": False, "reason": "a reload came between"}
            if not current.settled():
                return None
            return {"ok": True, "workers": workers, "saturated": current.saturated}

        self._tell_when(client, self.now + self.config.boot_timeout, outcome)

    def _obey_suspend(self, client: Client, wanted: str) -> None:
        if self.current is None or self.stop is not None:
            self._tell([client], {"ok": False, "reason": "the daemon is starting or stopping"})
            return
        if wanted == "suspend":
            self._suspend()
        else:
            self._resume()

        def outcome(_: float) -> dict[str, Any] | None:
            current = self.current
            if current is None or self.suspended != (wanted == "suspend"):
                return {"ok": False, "reason": "another command came between"}
            done = not any(generation.accepts for generation in self._generations()) if self.suspended else current.settled()
            busy = sum(generation.count(BUSY) for generation in self._generations())
            return {"ok": True, "workers": current.targets[0], "busy": busy} if done else None

        self._tell_when(client, self.now + self.config.boot_timeout, outcome)

    def _obey_stop(self, client: Client, request: dict[str, Any]) -> None:
        timeout = request.get("timeout")
        if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 <= timeout < 1e9):
            self._tell([client], {"ok": False, "reason": f"timeout = {str(timeout)[:80]!r}: must be seconds, 0 or more"})
        elif request.get("quick") is True:
            self._stop_quickly("prefork stop --quick", client)
        else:
            self._stop("prefork stop", client, timeout)

    def _tell(self, clients: list[Client], answer: dict[str, Any]) -> None:
        if self.control is not None:
            for client in clients:
                self.control.answer(client, answer, self.now)

    def _tell_when(self, client: Client, deadline: float, outcome: Outcome) -> None:
        if self.control is not None:
            self.control.answer_when(client, deadline, outcome)

    def _state(self) -> str:
        if self.stop is not None:
            return "stopping"
        if self.current is None:
            return "starting"
        if self.reload is not None:
            return "reloading"
        return "suspended" if self.suspended else "running"

    def _report_status(self, client: Client) -> None:
        """What only the master knows, and the boards; `prefork.ops.status` makes the rest of it."""
        generations = self._generations()
        most = instances.DESCRIPTORS_LIMIT // 2
        ended = self.tally.counts
        for generation in generations[most:]:  # more than an answer can carry: their totals only
            ended += generation.accepted()
        generations = generations[:most]
        troubled = [t for t in (self.trouble, self.current.trouble if self.current else None) if t and t.until > self.now]
        # While it starts, what it is about to listen on.
        listeners = self.listeners.current or (self.reload.plan.listeners if self.reload is not None else ())
        facts: dict[str, Any] = {
            "ok": True,
            "name": self.name,
            "module": self.config.module,
            "version": __version__,
            "pid": os.getpid(),
            "state": self._state(),
            "started_at": self.started,
            "generation": self.current.number if self.current is not None else 0,
            "reload": self.last_reload,
            "backoff": {"until": time.time() + troubled[0].until - self.now, "reason": troubled[0].reason} if troubled else None,
            "max_workers": self.config.max_workers,
            "saturated_seconds": self.saturated_before + (self.current.saturated_for(self.now) if self.current else 0.0),
            "listeners": [_listener_facts(listener) for listener in listeners],
            "targets": self.current.targets if self.current is not None else [],
            "ended": _fields(ended),
            "histogram": self.tally.histogram,
            "forked": self.tally.forked,
            "exited": self.tally.exited,
            "deaths": [_fields(death) for death in self.tally.deaths],
            "boards": [
                {
                    "generation": generation.number,
                    "layout": [generation.layout.listeners, generation.layout.capacity],
                    "high": generation.pool.high,
                    "listeners": [str(listener.address) for listener in generation.listeners],
                }
                for generation in generations
            ],
        }
        descriptors = [fd for generation in generations for fd in (generation.link.board_fd, generation.link.orders_fd)]
        if self.control is not None:
            self.control.answer(client, facts, self.now, descriptors)


def _fields(value: Any) -> dict[str, Any]:
    """The fields of a flat, slotted dataclass."""
    return {name: getattr(value, name) for name in value.__slots__}


def _listener_facts(listener: Listener) -> dict[str, Any]:
    queue, limit = listener.queue() or (None, None)
    return {"address": str(listener.address), "queue": queue, "queue_limit": limit}
