"""The master: owns the listeners, starts and retires generations, hears signals and the control socket, tells systemd.

One thread, one selector, no user code, and it waits for no other process: `Master.run` is the whole loop. What happens is folded
into the state (`prefork.daemon`); `_tend` then looks at the state and does what is due; the selector sleeps until the next event
or deadline. What it must not do: import a handler, block, or die of what a worker, a client or a file does.
"""

import os
import selectors
import signal
import socket
import traceback
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

from prefork import carried, config, log, names
from prefork.carried import State
from prefork.changeover import Changeover
from prefork.config import Sources
from prefork.daemon import Daemon
from prefork.errors import PreforkError
from prefork.floods import ChildSignals, Doorbell
from prefork.generation import Generation
from prefork.link import Wiring
from prefork.mending import Mending
from prefork.notifying import Notifying
from prefork.ops import control
from prefork.ops.control import Client
from prefork.printable import counted
from prefork.stopping import Stopping
from prefork.system import credentials, process, program, signals
from prefork.system.hangups import HangUps
from prefork.system.program import Program
from prefork.system.systemd import Notifier, activated, line
from prefork.upgrading import Upgrading

HANDLED = (*signals.MASTERS, signal.SIGCHLD)
LONGEST_SLEEP = 86400.0
# Slept for this much longer than planned, this process was stopped or starved: nobody is punished for that time.
OVERSLEPT = 0.05
# A wrapper that forwards Ctrl-C makes two SIGINT of one: they are a millisecond apart.
SAME_INTERRUPT = 0.1

Obey = Callable[["Master", Client, dict[str, Any]], None]


class Master:
    """The master process. ``run`` serves until stopped and returns the exit code.

    ``obey(master, client, request)`` carries out what comes over the control socket (`prefork.commands`).
    """

    def __init__(self, sources: Sources, obey: Obey, how: Program | None = None) -> None:
        """``how`` this program was started; without it there are no upgrades."""
        self.obey = obey
        self.daemon = Daemon(sources)
        self.changeover = Changeover(self.daemon)
        self.mending = Mending(self.daemon, self.changeover)
        self.upgrading = Upgrading(self.daemon, self.changeover, how)
        self.stopping = Stopping(self.daemon, self.changeover, self.upgrading)
        self.notifying = Notifying(self.daemon)
        self.child_signals = ChildSignals()
        self.seen_exited = 0
        self.handed: tuple[int, str] | None = None  # by another program: the descriptor of its state, and why it is us again

    # -- the loop

    def run(self) -> int:
        """Serve until stopped; after `start`. Raises PreforkError when the first generation can't be started."""
        try:
            if self.handed is not None:
                self._take_over(*self.handed)
            self._reap()  # children from before, for whose end no signal comes any more
            while not self.stopping.finished:
                if self._sleep():
                    # The inbox is emptied before anybody is reaped: a SIGCHLD that comes after the reaping wakes the next sleep.
                    arrived = self.inbox.take()
                    ours = self._reap()
                    self._obey_signals(arrived)
                    if signal.SIGCHLD in arrived:
                        self.child_signals.came(self.daemon.now, ours=ours)
                self._tend()
                if self.upgrading.due:
                    self._hand_over()
        except Exception:
            log.event("bug", where="master", text=traceback.format_exc())
            # The fork servers know what to do when their master has gone: nobody who is connected is lost.
            self._remove_traces()
            return PreforkError.exit_code
        self._close()
        if self.daemon.failure is not None:
            raise self.daemon.failure
        return 0

    def start(self) -> None:
        """Begin, or go on with what another program of this process has begun. Raises PreforkError."""
        handed = program.handed_over(os.environ)
        try:
            if handed is None:
                self._begin()
            else:
                self._go_on(*handed)
        except PreforkError as error:
            Notifier.from_environment().send(STATUS=line(f"the start failed: {error}"))
            raise

    def _begin(self) -> None:
        daemon = self.daemon
        strangers = process.inherited_children()
        self._enter(process.working_directory())
        daemon.listeners.inherited = frozenset(process.descriptors()) - {0, 1, 2}
        daemon.activated = activated(os.environ)
        conf = daemon.config = daemon.load()
        who = credentials.wanted(conf.user, conf.group)
        log.of_master(strangers, who.uid if who is not None and who.uid != 0 else None)
        log.use(conf)
        daemon.name = conf.instance
        process.set_title(f"prefork: master {daemon.name}")
        process.become_subreaper()
        for name, remedy in config.unknown_variables(daemon.sources.environment):
            log.event("unknown_variable", name=name, remedy=remedy)
        doorbell_read, doorbell_write = process.pipe_to_share()
        for fd in (doorbell_read, doorbell_write):
            daemon.resources.callback(os.close, fd)
        devnull = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        daemon.resources.callback(os.close, devnull)
        daemon.wiring = Wiring(daemon.name, daemon.sources.folder, doorbell_read, doorbell_write, devnull, strangers, who)
        # Before anything can be seen of us: a stop or a log rotation that comes early must not end us with files left behind.
        self._prick_up()
        self._let_signals_in()  # whoever has started us may have blocked some
        try:
            names.make(daemon, partial(self.obey, self))
            self.changeover.start()
        except BaseException:
            self._close()
            raise

    def _enter(self, folder: str) -> None:
        """All that was given counts from there, by that name: settings and the Python path."""
        self.daemon.sources = replace(self.daemon.sources, folder=folder)
        program.resolve_python_path(folder)

    def _prick_up(self) -> None:
        """Hear signals and the doorbell."""
        daemon = self.daemon
        self.notifying.begin()
        daemon.selector = daemon.resources.enter_context(selectors.DefaultSelector())
        self.inbox = daemon.resources.enter_context(closing(signals.Inbox(set(HANDLED) - {signal.SIGHUP})))
        self.hang_ups = daemon.resources.enter_context(closing(HangUps()))
        daemon.selector.register(self.inbox, selectors.EVENT_READ, lambda _: None)
        daemon.selector.register(self.hang_ups, selectors.EVENT_READ, lambda _: self._hung_up())
        log.watch(daemon.selector)
        self.doorbell = Doorbell(daemon, self.mending.look)

    @staticmethod
    def _let_signals_in() -> None:
        """All but SIGHUP, which is read with its sender and needs to be blocked for that."""
        signals.let_in_all_but(signal.SIGHUP)

    def _go_on(self, fd: int, reason: str) -> None:
        """Be the successor of the program that left its state at ``fd``. All signals are blocked until we can hear them."""
        state = carried.read(program.read_state(fd))
        self._adopt(state, reason)
        self.handed = fd, reason

    def _adopt(self, state: State, reason: str) -> None:
        daemon = self.daemon
        for kept in state.descriptors():
            os.set_inheritable(kept, False)
        if reason:
            program.put_back(state.program.variables)
            self.upgrading.program = state.program  # as it was started first
        self._enter(state.wiring.folder)
        self.upgrading.adopt(state)
        log.use(daemon.config)
        process.set_title(f"prefork: master {daemon.name}")
        process.become_subreaper()
        self._prick_up()
        if state.control is not None and state.control.inode is not None:
            sock = socket.socket(fileno=state.control.fd)
            daemon.control = control.adopt(sock, state.control.path, state.control.inode, daemon.selector, partial(self.obey, self))

    def _take_over(self, fd: int, reason: str) -> None:
        """The state is adopted, and there is no way back any more: hear what has come meanwhile, and reload."""
        program.go_on(fd)
        # Whose SIGCHLD the old program has taken and not obeyed.
        self._reap()
        self.upgrading.adopted(reason)
        self._let_signals_in()

    def _hand_over(self) -> None:
        """Become the new program, unless somebody wants something of us: the inbox does not outlive us."""
        signals.block()
        late = self.inbox.take()
        if not late:
            self.notifying.become()
            self.upgrading.become()
        self._let_signals_in()
        self._reap()
        self._obey_signals(late)

    def _sleep(self) -> bool:
        """Wait for the next event or deadline, and pass events on. Whether a signal has come."""
        daemon = self.daemon
        daemon.listen_to_all()
        planned = self._wake_at()
        daemon.lost += max(0.0, daemon.clock() - daemon.now - OVERSLEPT)
        before = daemon.clock()
        # epoll takes at most 2**31 milliseconds.
        timeout = None if planned is None else min(LONGEST_SLEEP, max(0.0, planned - before))
        events = daemon.selector.select(timeout)
        if timeout is not None and (overslept := daemon.clock() - max(daemon.now, before + timeout) - OVERSLEPT) > 0:
            daemon.lost += overslept
        daemon.now = daemon.clock()
        if planned is not None and daemon.now >= planned:
            # A master that was stopped may have events from before that, or none: SIGCONT interrupts epoll_wait(2), and Python does
            # not ask again once the time is over. Nothing is found to be late that has come before the deadline.
            events = daemon.selector.select(0)
        for key, _ in events:
            key.data(daemon.now)
        return any(key.fileobj is self.inbox for key, _ in events)

    def _reap(self) -> bool:
        """Take in who has ended, was stopped or goes on. Whether a worker or fork server of ours has ended."""
        daemon, ours = self.daemon, False
        changes = process.reap(stops=True)
        if not changes:
            return False
        generations = daemon.generations()
        for change in changes:
            if isinstance(change, process.Changed):
                for generation in generations:
                    generation.note_stop(change.pid, daemon.now, stopped=change.stopped)
        ended = [change for change in changes if isinstance(change, process.Ended)]
        # What a dead fork server said last comes before its end; a channel holds 278 messages, a turn takes 256.
        dead = {change.pid for change in ended}
        for generation in generations:
            if generation.link.pid in dead and generation.receive(daemon.now):
                generation.receive(daemon.now)
        # Workers before fork servers: one end of each may have been reaped just now, and a worker must not count as vanished.
        for change in ended:
            for generation in generations:
                worker = generation.pool.by_pid(change.pid)
                if worker is not None:
                    ours = True
                    cpu = change.utime + change.stime
                    generation.exited(worker.slot, change.pid, change.status, cpu, change.max_rss_kib, daemon.now)
        for change in ended:
            for generation in generations:
                if generation.link.pid == change.pid:
                    ours = True
                    self._fork_server_ended(generation, process.describe(change.status), change.status)
            self.upgrading.ended(change.pid, change.status)
            log.child_ended(change.pid, change.status, daemon.now)
            daemon.wiring.strangers.discard(change.pid)
        return ours

    def _fork_server_ended(self, generation: Generation, cause: str, status: int | None = None) -> None:
        self.daemon.hear_no_more(generation)
        generation.fork_server_ended(self.daemon.now, status)
        self.changeover.fork_server_ended(generation, cause, generation.link.stacks.take_crash(status or 0))

    def _obey_signals(self, arrived: set[int]) -> None:
        daemon = self.daemon
        if signal.SIGQUIT in arrived:
            self.stopping.stop_quickly("SIGQUIT")
        if signal.SIGTERM in arrived:
            self.stopping.stop("SIGTERM")
        if signal.SIGINT in arrived:
            if daemon.stopping is None:
                self.stopping.stop("SIGINT")
                if daemon.busy():
                    log.event("interrupt_again")
            elif daemon.now >= daemon.stopping.at + SAME_INTERRUPT:
                self.stopping.stop_quickly("a second SIGINT" if daemon.stopping.why == "SIGINT" else "SIGINT")
        if signal.SIGUSR1 in arrived:
            self._reopen_logs()
        if signal.SIGUSR2 in arrived:
            self.upgrading.upgrade("upgrade (SIGUSR2)")
        for signo, step in ((signal.SIGTTIN, 1), (signal.SIGTTOU, -1)):
            if signo in arrived and daemon.current is not None:
                self.scale(max(1, daemon.current.targets[0] + step), signals.name(signo))

    def _hung_up(self) -> None:
        """SIGHUP has come."""
        if not self.hang_ups.take_hang_up():
            self.changeover.reload("reload (SIGHUP)")
        elif self.hang_ups.ignored:
            log.event("ignored", what="the hang-up of the terminal", why="SIGHUP was ignored at the start (nohup)")
        else:
            self.stopping.stop("SIGHUP: the terminal was closed")

    def _tend(self) -> None:
        """Do what is due; each step looks at the state and finds out by itself whether there is anything to do."""
        daemon = self.daemon
        self.changeover.tend()
        self.upgrading.tend()
        if daemon.failure is not None and daemon.stopping is None:
            self.stopping.stop_quickly("the start failed")
        generations = daemon.generations()
        live = sum(generation.live() for generation in generations)
        if daemon.tally.exited != self.seen_exited:
            self.seen_exited = daemon.tally.exited
            for generation in generations:
                generation.room_was_made(daemon.now)
        for generation in generations:
            if generation.fork_server_is_a_zombie(daemon.now):
                # Traced by user code, it ends for us when its tracer lets it go; its children are ours already.
                self._fork_server_ended(generation, "it has ended and can't be reaped: is it traced?")
            generation.tend(daemon.now, live - generation.live())
        for generation in [g for g in daemon.draining if g.gone]:
            daemon.draining.remove(generation)
            generation.close()
            daemon.close_unused_logs()
        daemon.listeners.tend(daemon.now, daemon.part_from, daemon.accepts)
        self.stopping.tend()
        for generation in daemon.draining:
            generation.let_go(daemon.now)
        self.doorbell.tend(daemon.now)
        self.child_signals.tend(daemon.now)
        if daemon.control is not None:
            daemon.control.tend(daemon.now)
        log.tend(daemon.now)
        self.notifying.tend()

    def _wake_at(self) -> float | None:
        daemon = self.daemon
        times = [generation.wake_at() for generation in daemon.generations()]
        times += [self.doorbell.paused_until, self.child_signals.paused_until]
        times += [self.changeover.wake_at(), self.upgrading.wake_at(), daemon.listeners.wake_at(daemon.now)]
        times += [self.stopping.wake_at(), self.notifying.wake_at(), log.wake_at(daemon.now)]
        if daemon.control is not None:
            times.append(daemon.control.wake_at())
        return min((at for at in times if at is not None), default=None)

    def scale(self, workers: int, why: str) -> str | None:
        """Want this many acceptors for each listener. Returns why not."""
        daemon, current = self.daemon, self.daemon.current
        if current is None or daemon.stopping is not None:
            return "the daemon is starting or stopping"
        most = daemon.config.max_workers // len(current.listeners)
        if not 1 <= workers <= most:
            ceiling = f"max_workers = {daemon.config.max_workers} for {counted(len(current.listeners), 'listener', 'listeners')}"
            reason = f"workers = {workers}: must be 1 to {most} ({ceiling})"
            log.event("ignored", what=why, why=reason)
            return reason
        if workers != current.targets[0]:
            current.retarget(workers, daemon.now)
            if daemon.reloading is not None and daemon.reloading.is_restart:
                daemon.reloading.generation.retarget(workers, daemon.now)
            log.event("scaled", workers=workers, why=why)
        return None

    # -- log files

    def _reopen_logs(self) -> None:
        """A rotation has renamed them: make new ones."""
        if not log.has_files():
            log.event("ignored", what="SIGUSR1", why="the log goes to standard error, there is no file to be opened again")
        else:
            log.reopen()

    # -- the end

    def _close(self) -> None:
        """Leave nothing behind, and tell those who wait for it."""
        daemon = self.daemon
        if os.getpid() != daemon.pid:
            os._exit(PreforkError.exit_code)
        # Nothing is left to do for a signal, and the interpreter gives them their default action while it ends.
        signals.block()
        counts = daemon.tally.counts
        daemon.listeners.close()
        if daemon.stopping is not None:
            cut = counts.killed - daemon.stopping.killed_before
            if daemon.failure is None:
                log.event("stopped", accepted=counts.begun, killed=cut)
            daemon.tell(daemon.stopping.clients, {"ok": True, "accepted": counts.begun, "killed": cut})
        self._remove_traces()

    def _remove_traces(self) -> None:
        """What says that we are here."""
        daemon = self.daemon
        if os.getpid() != daemon.pid:
            os._exit(PreforkError.exit_code)  # a child that has unwound into these frames must not act for the master
        names.remove(daemon)
        log.finish()
