"""The master: owns the listeners, starts and retires generations, hears signals and the control socket, tells systemd.

One thread, one selector, no user code, and it never waits for anybody: `Master.run` is the whole loop. What happens is folded
into state; `tend` then looks at the state and does what is due; the selector sleeps until the next event or deadline. All
clocks are monotonic. What it must not do: import a handler, block, or die of what a worker, a client or a file does.

The verbs: `reload` starts the next generation, `commit` puts it in the place of the last, `refuse` drops it and leaves
everything as it was; `stop` turns new clients away, serves the queue, lets connections finish, and ends.
"""

import errno
import os
import selectors
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from prefork import __version__, config, log
from prefork.config import Config, Sources
from prefork.errors import ConfigError, HandlerError, InUseError, PreforkError, RefusedError
from prefork.generation import Generation
from prefork.link import Wiring
from prefork.listeners import DRAIN_LOOK, Listeners, Plan
from prefork.net.listener import Listener
from prefork.ops import control, instances
from prefork.ops.control import Client, ControlServer, Outcome
from prefork.pool import policy, wire
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
# A stop's last word: who is still there after SIGKILL, so often and each time for so long, is not waited for.
QUICK_LIMIT, QUICK_TRIES = 1.0, 2


Obey = Callable[["Master", Client, dict[str, Any]], None]


@dataclass(slots=True)
class Reload:
    """A reload under way, or a fork server's replacement; ``clients`` are told how it ends."""

    what: str
    at: float
    generation: Generation
    plan: Plan
    clients: list[Client]
    is_restart: bool  # of a fork server that has died, with what is in force


@dataclass(slots=True)
class Stop:
    """A stop under way."""

    why: str
    at: float
    deadline: float
    clients: list[Client]
    killed: bool = False
    killed_before: int = 0  # connections that had been killed when it began
    tries: int = 0  # at ending those whom SIGKILL has not ended


class Master:
    """The master process. ``run`` serves until stopped and returns the exit code.

    ``obey(master, client, request)`` carries out what comes over the control socket (`prefork.commands`).
    """

    def __init__(self, sources: Sources, obey: Obey) -> None:
        self.sources = sources
        self.obey = obey
        self.lost = 0.0  # seconds in which this process was stopped or starved
        self.now = time.monotonic()
        self.started, self.started_monotonic = time.time(), time.monotonic()
        self.listeners = Listeners()
        self.current: Generation | None = None
        self.reloading: Reload | None = None
        self.draining: list[Generation] = []
        self.stopping: Stop | None = None
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
            # The fork servers know what to do when their master has gone: nobody who is connected is lost.
            self._remove_traces()
            return PreforkError.exit_code
        self._close()
        if self.failure is not None:
            raise self.failure
        return 0

    def _start(self) -> None:
        strangers = process.inherited_children()
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
        self.wiring = Wiring(self.name, process.working_directory(), doorbell_read, doorbell_write, devnull, strangers, who)
        # Before anything can be seen of us: a stop or a log rotation that comes early must not end us with files left behind.
        self.inbox = signals.Inbox(HANDLED)
        self._open_control()
        plan = Plan(())
        try:
            if conf.pid_file:
                self.pid_file = pidfile.write(conf.pid_file)
            plan = self.listeners.prepare(conf)
            self._warn_of_limits(plan.listeners)
            self.selector.register(self.inbox, selectors.EVENT_READ, lambda _: None)
            self.selector.register(doorbell_read, selectors.EVENT_READ, self._answer_the_door)
            self._boot("start", conf, plan, [])
        except BaseException:
            plan.drop()
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
        for generation in self.generations():
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

    def generations(self) -> list[Generation]:
        """Every generation that has processes: the current one, the one that a reload starts, those that drain."""
        pending = [self.reloading.generation] if self.reloading is not None else []
        return [*([self.current] if self.current is not None else []), *pending, *self.draining]

    def troubles(self) -> list[Trouble]:
        """What is backed off from, or was."""
        return [self.trouble, *([self.current.trouble, self.current.fork_trouble] if self.current is not None else [])]

    def _answer_the_door(self, now: float) -> None:
        try:
            data = os.read(self.wiring.doorbell_read, wire.PIPE_READ)
        except BlockingIOError:
            return
        rings, stray = wire.read_doorbells(data)
        generations = {generation.number: generation for generation in self.generations()}
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
        generations = self.generations()
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
        if generation.left or generation in self.draining or (self.stopping is not None and not self.listeners.farewells):
            return
        cause = process.describe(change.status)
        if generation.failure is None and generation is not self.current:
            generation.failure = (
                f"{generation.config.module}: the fork server died while it booted: {cause}; does the import end it?"
            )
        if generation is self.current:
            log.event("fork_server_died", generation=generation.number, cause=cause)
            self.restart_at = self.now

    def _obey_signals(self, arrived: set[int]) -> None:
        if signal.SIGQUIT in arrived:
            self.stop_quickly("SIGQUIT")
        if signal.SIGTERM in arrived:
            self.stop("SIGTERM")
        if signal.SIGINT in arrived:
            if self.stopping is None:
                self.stop("SIGINT")
            elif self.now >= self.stopping.at + SAME_INTERRUPT:
                self.stop_quickly("a second SIGINT")
        if signal.SIGHUP in arrived:
            self.reload("reload (SIGHUP)")
        if signal.SIGUSR1 in arrived:
            self._reopen_logs()
        for signo, step in ((signal.SIGTTIN, 1), (signal.SIGTTOU, -1)):
            if signo in arrived and self.current is not None:
                self.scale(max(1, self.current.targets[0] + step), signals.name(signo))

    def _tend(self) -> None:
        """Do what is due; each step looks at the state and finds out by itself whether there is anything to do."""
        self._tend_restart()
        self._tend_reload()
        generations = self.generations()
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
        self.listeners.tend(self.now, self._part_from, self._accepts)
        self._tend_stop()
        for generation in self.draining:
            generation.let_go(self.now)
        if self.deaf_until is not None and self.deaf_until <= self.now:
            self.deaf_until = None
            self.selector.register(self.wiring.doorbell_read, selectors.EVENT_READ, self._answer_the_door)
        if self.control is not None:
            self.control.tend(self.now)

    def _wake_at(self) -> float | None:
        times = [generation.wake_at() for generation in self.generations()]
        times += [self.restart_at, self.deaf_until]
        if self.control is not None:
            times.append(self.control.wake_at())
        if self.reloading is not None:
            times.append(self.reloading.generation.boot_deadline)
        if self.listeners.farewells:
            times.append(self.now + DRAIN_LOOK)
        if self.stopping is not None:
            times.append(self.stopping.deadline)
        return min((at for at in times if at is not None), default=None)

    # -- generations

    def _boot(
        self,
        what: str,
        conf: Config,
        plan: Plan,
        clients: Sequence[Client],
        *,
        targets: Sequence[int] | None = None,
    ) -> None:
        generation = Generation(self.next_number, conf, plan.listeners, self.wiring, self.tally, self.now, targets)
        self.next_number += 1
        try:
            generation.link.start(conf, plan.listeners)
        except OSError as error:
            generation.close()
            raise RefusedError(f"can't start a fork server: {error.strerror}: {_what_is_short(error)}") from None
        self.selector.register(generation.link.channel, selectors.EVENT_READ, self._postman(generation))
        self.reloading = Reload(what, self.now, generation, plan, list(clients), targets is not None)
        self._retire_where_closed(generation)

    def _retire_where_closed(self, generation: Generation) -> None:
        """A stop has closed some listeners already, whose queues were empty."""
        for place, listener in enumerate(generation.listeners):
            if listener.fileno() == -1:
                generation.retire(place, self.now, None)

    def reload(self, what: str, clients: Sequence[Client] = ()) -> None:
        """Read configuration and code again; ``clients`` are told the outcome. One that is under way is followed by another."""
        if self.stopping is not None or (self.current is None and self.reloading is not None):
            why = "the daemon is stopping" if self.stopping is not None else "the daemon is starting"
            log.event("ignored", what=what, why=why)
            self.tell(clients, {"ok": False, "reason": why})
            return
        if self.reloading is not None:
            if self.reload_wanted is None:
                log.event("reload_queued")
            self.reload_wanted = [*(self.reload_wanted or []), *clients]
            return
        plan = Plan(())
        self.restart_at = None
        try:
            conf = self._load()
            self._warn_of_unused(conf)
            changed = config.needs_restart(self.config, conf)
            if changed is not None:
                raise ConfigError(changed)
            log.open_for(conf)
            plan = self.listeners.prepare(conf)
            self._boot(what, conf, plan, clients)
        except PreforkError as error:
            plan.drop()
            self._close_unused_logs()
            self._refused(what, str(error), clients)

    def _tend_restart(self) -> None:
        """The current fork server is dead: the same configuration in a new one; its workers serve until it is ready."""
        if self.restart_at is None or self.restart_at > self.now:
            return
        self.restart_at = None
        if self.current is None or self.reloading is not None or (self.stopping is not None and not self.listeners.farewells):
            return
        try:
            # What was scaled by hand stays so until the next reload.
            plan = Plan(self.current.listeners)
            self._boot("restart of the fork server", self.current.config, plan, [], targets=self.current.targets)
        except PreforkError as error:
            self._refused("restart of the fork server", str(error), [], policy.fork_backoff)

    def _tend_reload(self) -> None:
        reload = self.reloading
        if reload is None:
            if self.reload_wanted is not None:
                clients, self.reload_wanted = self.reload_wanted, None
                self.reload("queued reload", clients)
            return
        generation = reload.generation
        if generation.failure is None and generation.boot_deadline <= self.now:
            generation.failure = _what_hangs(generation)
        if generation.failure is not None:
            self._refuse(reload, generation.failure)
        elif generation.parked:
            self._commit(reload)

    def _commit(self, reload: Reload) -> None:
        old, new = self.current, reload.generation
        self.reloading = None
        self.current, self.config = new, new.config
        self.trouble = Trouble()
        if self.suspended:
            new.suspend(self.now)
        if self.stopping is not None:
            new.announce_stop()
            self._retire_where_closed(new)
        new.commit(self.now)
        removed = self.listeners.commit(reload.plan, new.config)
        if old is not None:
            self.saturated_before += old.saturated_for(self.now)
            self.draining.append(old)
            for place, listener in enumerate(old.listeners):
                if listener not in removed:
                    old.retire(place, self.now, old.drain_deadline(self.now))
            if removed and self.suspended:
                old.resume(self.now)  # for those who wait where nobody will accept any more: they are served before it closes
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
            self.tell_when(client, self.now + RELOAD_SETTLED, outcome)

    def _when_settled(self, old: Generation | None, new: Generation) -> Outcome:
        """Who asked for a reload hears of it when nobody accepts with the old code any more."""
        late = self.now + RELOAD_SETTLED

        def outcome(now: float) -> dict[str, Any] | None:
            left = old is None or not old.accepts
            return {"ok": True, "generation": new.number, "suspended": self.suspended} if left or now >= late else None

        return outcome

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
        self.reloading = None
        self.draining.append(reload.generation)
        reload.generation.abandon(self.now)
        reload.plan.drop()
        if self.current is None:
            self.failure = HandlerError(reason)
            self.stop_quickly("the start failed")
            return
        self._refused(reload.what, reason, reload.clients)

    def _refused(self, what: str, reason: str, clients: Sequence[Client], wait: Callable[[int], float] = policy.backoff) -> None:
        current = self.current
        first, _, rest = reason.partition("\n")
        log.event("refused", what=what, generation=current.number if current else 0, reason=first, text=rest)
        self._remember("refused", reason)
        self.tell(clients, {"ok": False, "reason": reason})
        if current is not None and current.link.pid is None and self.stopping is None:
            seconds = self.trouble.add(self.now, reason, wait=wait)
            self.restart_at = self.now + seconds
            log.event("restarting", seconds=seconds, reason=first)

    def _remember(self, result: str, reason: str | None) -> None:
        self.last_reload = {"at": time.time(), "result": result, "reason": reason}

    def scale(self, workers: int, why: str) -> str | None:
        """Want this many acceptors for each listener. Returns why not."""
        current = self.current
        if current is None or self.stopping is not None:
            return "the daemon is starting or stopping"
        most = self.config.max_workers // len(current.listeners)
        if not 1 <= workers <= most:
            ceiling = f"max_workers = {self.config.max_workers} for {len(current.listeners)} listeners"
            reason = f"workers = {workers}: must be 1 to {most} ({ceiling})"
            log.event("ignored", what=why, why=reason)
            return reason
        if workers != current.targets[0]:
            current.retarget(workers, self.now)
            if self.reloading is not None and self.reloading.is_restart:
                self.reloading.generation.retarget(workers, self.now)
            log.event("scaled", workers=workers, why=why)
        return None

    # -- log files

    def _reopen_logs(self) -> None:
        """A rotation has renamed them: make new ones, then let everybody follow."""
        if not log.has_files():
            log.event("ignored", what="SIGUSR1", why="the log goes to standard error, there is no file to be opened again")
        elif log.reopen():
            for generation in self.generations():
                generation.reopen_log()

    def _close_unused_logs(self) -> None:
        log.keep_only([self.config, *(generation.config for generation in self.generations())])

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
            running=sum(generation.live() for generation in self.generations()),
            queue_limit=next((queue[1] for listener in listeners if (queue := listener.queue()) is not None), None),
        )
        if demand == self.demand:
            return
        self.demand = demand
        for shortage in limits.shortages(limits.read(os.environ), demand):
            log.event("limit", **asdict(shortage))

    def _part_from(self, listener: Listener) -> None:
        """Nobody accepts there any more."""
        for generation in self.generations():
            if listener in generation.listeners:
                deadline = None if self.stopping is not None else generation.drain_deadline(self.now)
                generation.retire(generation.listeners.index(listener), self.now, deadline)

    def _accepts(self, listener: Listener) -> bool:
        return any(generation.accepts_at(listener) for generation in self.generations())

    def busy(self) -> int:
        """Connections that are being served."""
        return sum(generation.count(BUSY) for generation in self.generations())

    def _killed(self) -> int:
        return self.tally.counts.killed + sum(generation.accepted().killed for generation in self.generations())

    # -- suspending

    def suspend(self) -> None:
        """Nobody accepts any more; the sockets stay bound, and the kernel's queue holds clients."""
        if not self.suspended and self.current is not None:
            self.suspended = True
            self.current.suspend(self.now)
            log.event("suspended", busy=self.busy())

    def resume(self) -> None:
        """Accept again."""
        if self.suspended and self.current is not None:
            self.suspended = False
            self.current.resume(self.now)
            log.event("resumed")

    # -- stopping

    def stop(self, why: str, client: Client | None = None, timeout: float | None = None) -> None:
        """Stop gracefully; connections may finish for ``timeout`` seconds (graceful_timeout unless said). Again: hurry."""
        clients = [client] if client is not None else []
        if self.stopping is not None:
            self.stopping.clients += clients
            if timeout is not None and not self.stopping.killed:
                self._hurry(self.now + timeout)
            return
        seconds = self.config.graceful_timeout if timeout is None else timeout
        self.stopping = Stop(why, self.now, self.now + seconds, clients, killed_before=self._killed())
        self.notifier.send(STOPPING=1)
        if self.reloading is None or not self.reloading.is_restart:
            self._drop_reload("the daemon is stopping")
        if self.current is not None and self.current.link.pid is None and self.reloading is None and self.restart_at is None:
            self.restart_at = self.now  # the reload was to take its place: somebody has to serve the queue
        log.event("stopping", why=why, busy=self.busy(), seconds=seconds)
        # Who waits in the queue has been connected by the kernel: a stop serves them.
        self.resume()
        for generation in self.generations():
            generation.announce_stop()
        for listener in self.listeners.current:
            self.listeners.say_farewell(listener, self.stopping.deadline)
        self._hurry(self.stopping.deadline)

    def _hurry(self, deadline: float) -> None:
        """Nothing that ends may take longer than this stop."""
        if self.stopping is not None:
            self.stopping.deadline = min(self.stopping.deadline, deadline)
            self.listeners.hurry(self.stopping.deadline)

    def stop_quickly(self, why: str, client: Client | None = None) -> None:
        """Stop at once: connections are cut."""
        clients = [client] if client is not None else []
        if self.stopping is not None:
            clients += self.stopping.clients
            before = self.stopping.killed_before
        else:
            self.notifier.send(STOPPING=1)
            before = self._killed()
        if self.failure is None:
            log.event("stopping_quickly", why=why)
        self.stopping = Stop(why, self.now, self.now + QUICK_LIMIT, clients, killed=True, killed_before=before)
        self._drop_reload("the daemon is stopping")
        for generation in self.generations():
            generation.announce_stop()
        self.listeners.close()
        for generation in self.generations():
            generation.quit()

    def _drop_reload(self, reason: str) -> None:
        if self.reloading is not None:
            reload, self.reloading = self.reloading, None
            reload.generation.abandon(self.now)
            self.draining.append(reload.generation)
            self.tell(reload.clients, {"ok": False, "reason": reason})
            reload.plan.drop()
        if self.reload_wanted is not None:
            self.tell(self.reload_wanted, {"ok": False, "reason": reason})
            self.reload_wanted = None

    def _tend_stop(self) -> None:
        stop = self.stopping
        if stop is None or self.listeners.farewells:
            return
        self._drop_reload("the daemon is stopping")
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
                generation.retiring.kill_all(f"still there at the end of graceful_timeout ({stop.why})")
        elif stop.deadline <= self.now and stop.tries < QUICK_TRIES:
            stop.tries += 1
            stop.deadline = self.now + QUICK_LIMIT
            for generation in self.draining:
                generation.quit()
                if stop.tries == QUICK_TRIES:
                    generation.link.kill()  # its workers are ours then, and are killed by us
        elif stop.deadline <= self.now:
            log.event("left_behind", pids=", ".join(str(pid) for generation in self.draining for pid in generation.pids()))
            self.finished = True

    def _close(self) -> None:
        """Leave nothing behind, and tell those who wait for it."""
        if os.getpid() != self.pid:
            os._exit(PreforkError.exit_code)
        # Nothing is left to do for a signal, and the interpreter gives them their default action while it ends.
        signals.block()
        counts = self.tally.counts
        self.listeners.close()
        if self.stopping is not None:
            cut = counts.killed - self.stopping.killed_before
            if self.failure is None:
                log.event("stopped", accepted=counts.begun, killed=cut)
            self.tell(self.stopping.clients, {"ok": True, "accepted": counts.begun, "killed": cut})
        self._remove_traces()

    def _remove_traces(self) -> None:
        """What says that we are here."""
        if os.getpid() != self.pid:
            os._exit(PreforkError.exit_code)  # a child that has unwound into these frames must not act for the master
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
            self.control = control.serve(path, self.selector, partial(self.obey, self))
        except InUseError as error:
            raise InUseError(f"{error}: an instance named {self.name} is running, give this one another --name") from None
        except OSError as error:
            log.event("control_failed", reason=f"{error.filename}: {error.strerror}" if error.filename else error.strerror or error)

    @property
    def state(self) -> str:
        """In a word, as `prefork status` has it."""
        if self.stopping is not None:
            return "stopping"
        if self.current is None:
            return "starting"
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


def _what_is_short(error: OSError) -> str:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "see RLIMIT_NOFILE (ulimit -n) and fs.file-max"
    return "see RLIMIT_NPROC (ulimit -u), pids.max and memory"


def _what_hangs(generation: Generation) -> str:
    conf = generation.config
    if generation.fork_trouble.failures:
        return f"{generation.fork_trouble.reason}: its workers are not there after boot_timeout = {conf.boot_timeout:g} s"
    if generation.ready:
        started = f"on_worker_start = {conf.on_worker_start} has not ended" if conf.on_worker_start else "its workers are not ready"
        return f"{conf.module}: {started} after boot_timeout = {conf.boot_timeout:g} s"
    imported = "the import or on_boot" if conf.on_boot else "the import"
    return (
        f"{conf.module}: {imported} has not ended after boot_timeout = {conf.boot_timeout:g} s; prefork check tells where it hangs"
    )
