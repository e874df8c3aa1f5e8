"""A fork server: one process for each generation. It imports the handler once, calls on_boot, then forks, signals, reaps.

It is forked from the master, never exec'ed: an installation under a running daemon must not mix versions. It runs user
code, so the master takes everything that it says as its word only. What it must not do: keep a descriptor of the master's that
it does not need, call user code after READY, or wait for anybody.

It answers to three: the master (commands on a SOCK_SEQPACKET pair), the kernel (SIGCHLD), and its own conscience: when the
master dies it lets go of the listeners without losing anybody who waits there, and leaves after its last worker.
"""

import atexit
import errno
import math
import os
import select
import signal
import socket
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

from prefork import handler, log, request, worker
from prefork.config import Config
from prefork.errors import REMEDIES, ConfigError, HandlerError, PreforkError, RefusedError, explained
from prefork.log import records
from prefork.net import left_open
from prefork.net.handshakes import Cookies, Looks
from prefork.net.listener import FAREWELL, Listener
from prefork.pool import scoreboard, wire
from prefork.pool.scoreboard import Access, Layout, Scoreboard
from prefork.pool.wire import Command, Kind, Order, Report
from prefork.system import capabilities, credentials, finalizers, forks, originals, process, readable, signals, stacks, systemd
from prefork.system.credentials import Credentials
from prefork.values import RLIMITS

# Commands taken between two looks at dead children: a burst of forks must not let zombies wait.
COMMANDS_AT_ONCE = 64
REPEAT = 0.02
# Processes that the import has started are killed when they have not heard SIGTERM in this many seconds.
STARTED_MAY_TAKE = 2.0
# The alarm of a fork server that does not end rings this many seconds after its master has killed it, if it has one.
ALARM_AFTER = 2.0
# Workers that were stopped or go on are told of so many at once, half of what the channel holds, and then not for so long: the
# master reads twice as much meanwhile, even when it is tired of hearing it.
STOPS_AT_ONCE, STOPS_PAUSE = 128, 0.25
# Orders that are a signal to a worker.
SIGNALS = {Order.RETIRE: signals.RETIRE, Order.DUMP: stacks.DUMP}
_COMMAND = wire.pack_command(Command(Order.FORK, 0))


@dataclass(frozen=True, slots=True)
class Brief:
    """Everything that a fork server is told. Descriptors are inherited by the fork."""

    generation: int
    config: Config
    credentials: Credentials | None  # who to become before user code is imported; None: stay who we are
    name: str
    folder: str  # entered by name for each generation: a deploy may have switched what the name stands for
    master_pid: int
    listeners: tuple[Listener, ...]
    layout: Layout
    board_fd: int
    orders_fd: int
    channel: socket.socket
    doorbell: int
    gate: int
    devnull: int
    stacks: int


def main(brief: Brief) -> NoReturn:
    """Be a fork server. Called in the child, with all signals blocked; never returns."""
    status = 1
    try:
        status = ForkServer(brief).run()
    except BaseException:
        # Nothing may unwind into the master's frames below us, which would close its listeners.
        signals.block()
        log.event("bug", where="fork server", text=traceback.format_exc())
    finally:
        os._exit(status)


def settle(conf: Config, who: Credentials | None, folder: str) -> None:
    """Take on what the configuration says of this process and its workers. Raises PreforkError; user code comes after.

    ``folder`` is the working directory unless the configuration names one.
    """
    if conf.umask is not None:
        os.umask(conf.umask)
    try:
        if conf.nice:  # a sandbox may forbid setpriority(2), whatever is asked of it
            os.nice(conf.nice)
    except OSError as error:
        if conf.nice < 0 and error.errno in (errno.EPERM, errno.EACCES):
            raise ConfigError(f"nice = {conf.nice}: only root may be less nice than it was started: 0 or more") from None
        raise ConfigError(f"nice = {conf.nice}: {explained(error)}") from None
    for name, value in conf.rlimit:
        try:
            process.allow_limit(RLIMITS[name], value)
        except PermissionError as error:
            raise ConfigError(f"rlimit {name}: {error}: ask for less, or have it raised before prefork starts") from None
    if who is not None:
        try:
            credentials.become(who)
        except OSError as error:
            unmapped = "this user namespace does not have them (/proc/self/uid_map, gid_map): name others"
            why = f"{error.strerror}: {unmapped}" if error.errno == errno.EINVAL else explained(error)
            raise ConfigError(f"user = {conf.user!r}: can't become user {who.uid}, group {who.gid}: {why}") from None
    if os.geteuid() != 0:
        try:
            capabilities.give_up()
        except OSError as error:
            log.event("capabilities_kept", reason=error.strerror)
    if who is not None and (refusal := readable.refusal(who.name or str(who.uid))) is not None:
        raise HandlerError(refusal)
    folder = conf.chdir or folder
    try:
        os.chdir(folder)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not conf.chdir and process.is_nowhere():
            log.event("folder_gone", folder=folder)
            handler.prepare_path(folder)
            return
        asking = f" as user {who.name or who.uid}" if who is not None else ""
        remedy = readable.hidden_by(folder) or ("give them access to it" if error.errno == errno.EACCES else "make it")
        raise HandlerError(
            f"can't enter the working directory {folder}{asking}: {error.strerror}: {remedy}, or name another one (chdir)"
        ) from None
    handler.prepare_path(folder)


def kill(board: Scoreboard, slot: int, pid: int) -> None:
    """Kill a worker, which is our child. If it serves a connection, its process group holds that, too: children have its socket."""
    process.kill_child(pid, group=board.states[slot] == scoreboard.BUSY)


def handlers_undone(installed: Iterable[int]) -> str:
    """The names of those of these signals for which no handler of user code can stay in workers."""
    return ", ".join(signals.name(signo) for signo in installed if signo in worker.SIGNALS)


def finish_import(aside: finalizers.Aside, started: Iterable[int], failed: Callable[[str], None]) -> None:
    """Run what the import has registered, and end the processes that it has started."""
    us = os.getpid()
    finalizers.put_back(aside, process.is_child)
    finalizers.finish(failed)
    if os.getpid() != us:  # forked by what was run
        os._exit(0)
    process.end_children(started, STARTED_MAY_TAKE)


class ForkServer:
    """One fork server process."""

    def __init__(self, brief: Brief) -> None:
        self.brief = brief
        self.pid = os.getpid()
        self.children: dict[int, int] = {}  # pid: slot, of workers that were not reaped yet
        self.by_slot: dict[int, int] = {}
        self.outbox: deque[bytes] = deque()
        self.stops: dict[int, bool] = {}  # pid: whether it is stopped now, of workers that are to be told of
        self.stops_at = 0.0  # not told before
        self.leaving = False
        self.orphaned_at: float | None = None
        self.cookies = Cookies()
        self.parted = False
        self.booted = False
        self.registered = False  # by the import or on_boot, for the end of this process
        self.aside: finalizers.Aside | None = None
        self.started: dict[int, str] = {}  # processes that the import or on_boot have started and left running

    # -- its life

    def run(self) -> int:
        """Boot, then serve commands. Returns the exit status."""
        try:
            self._become_a_process()
            try:
                self._boot()
            finally:
                log.finish_prints()
        except PreforkError as error:
            return self._failed(str(error), error.exit_code)
        except OSError as error:  # not user code's, which is a HandlerError by now
            if error.errno not in REMEDIES:
                raise
            return self._failed(f"the fork server can't begin: {explained(error)}", RefusedError.exit_code)
        self._send(Report(Kind.READY, status=int(self.registered)))
        poll = select.poll()
        inbox = self.inbox.fileno()
        poll.register(inbox, select.POLLIN)
        while True:
            self._flush()
            timeout = self._tell_stops(time.monotonic())
            if self._done():
                if self.registered:
                    self._finish()
                return 0
            if self.orphaned_at is None:
                self.cookies.note(time.monotonic())
                poll.register(self.brief.channel, select.POLLIN | (select.POLLOUT if self.outbox else 0))
            else:
                timeout = REPEAT
            ready = poll.poll(None if timeout is None else math.ceil(timeout * 1000))
            arrived: set[int] = set()
            if any(fd == inbox for fd, _ in ready):
                arrived = self.inbox.take()
                self._reap()
                self._flush()
            if self.orphaned_at is not None:
                self._say_farewell(self.orphaned_at)
            elif (signals.PARENT_DIED in arrived and os.getppid() != self.brief.master_pid) or not self._obey():
                self._orphaned(poll)

    def _failed(self, text: str, status: int) -> int:
        """Tell the master why there will be no workers, and finish what the import has begun. Returns the exit status."""
        self._send(Report(Kind.FAILED, text=text))
        self._flush(wait=True)
        self._finish()
        return status

    def _become_a_process(self) -> None:
        brief = self.brief
        finalizers.begin()  # first of all: whatever fails from here on, this process finishes nothing of its parent's
        self.part = process.parting()
        self.part()
        process.become_private()
        signals.fresh(signals.passing_over())
        forks.in_child(self._end_passing_over)
        systemd.forget(os.environ)
        self.board = Scoreboard(brief.board_fd, brief.orders_fd, brief.layout, Access.WORKER)
        os.dup2(brief.devnull, 0)
        log.begin_fork_server(brief.config, f"gen {brief.generation}")
        keep = {*log.descriptors(), 0, brief.channel.fileno(), brief.doorbell, brief.gate, brief.devnull, brief.stacks}
        process.close_all_but(keep | {listener.fileno() for listener in brief.listeners})
        process.set_title(f"prefork: {brief.name} gen {brief.generation}")
        self._tie_to_master(signal.SIGKILL)  # until the handler is imported: an import that hangs dies with the master
        brief.channel.setblocking(False)
        signals.watch()
        process.watch_folder(signals.mark)
        credentials.watch(signals.mark)
        originals.keep()  # with what was just put there to watch user code
        signals.unblock()

    def _tie_to_master(self, signo: int) -> None:
        process.signal_when_orphaned(signo)
        if os.getppid() != self.brief.master_pid:
            os._exit(0)

    def _end_passing_over(self) -> None:
        """A child that the import forked is user code's, and ends by what it is sent."""
        if not self.booted:
            signals.hear_again()
            stacks.be_silent()

    def _boot(self) -> None:
        """Load the handler and make all that the workers have in common. Raises PreforkError."""
        settle(self.brief.config, self.brief.credentials, self.brief.folder)
        self._tie_to_master(signal.SIGKILL)  # the kernel has forgotten both if credentials have changed
        process.become_private()
        sockets, mapped = left_open.sockets(), handler.files_in_memory(self.brief.config)
        records.install(log.Level[self.brief.config.log_level.upper()])
        stacks.tell_of_import(self.brief.stacks)
        try:
            loaded = handler.load(self.brief.config)
        finally:
            self._end_if_child()
        # Those that a stop had not closed when this process began.
        listeners = {place: listener for place, listener in enumerate(self.brief.listeners) if listener.fileno() != -1}
        try:
            loaded.run_hook("on_boot")
            bound = self._bind(loaded, listeners)
        finally:
            self._end_if_child()
        handler.refuse_threads(self.brief.config.module)
        left = handler.refuse_connections(self.brief.config, sockets)
        if left.listening:
            log.event("listening_left", sockets=", ".join(left.listening))
        if left.event_loops:
            log.event("event_loops_left", descriptors=", ".join(left.event_loops))
        records.give_way()
        records.take_http_messages()
        users = self._users_handlers()
        # Import and hook may have changed any of it; SIGCHLD ignored, for one, would lose every exit status.
        with signals.blocked():
            signals.stop_timers()
            for alarm in signals.TIMERS.values():
                signal.signal(alarm, signal.SIG_IGN)  # one that has rung, and waits behind a mask, would end us
            # User code is not called here any more: its handlers are for workers.
            signals.fresh(signals.passing_over(signo for signo, action in users.items() if callable(action)))
            self.inbox = signals.Inbox({signal.SIGCHLD, signals.PARENT_DIED})
        signals.unblock()
        self.booted = True
        self._tie_to_master(signals.PARENT_DIED)  # once more: user code may have changed credentials
        process.become_private()
        stacks.tell(self.brief.stacks, dumps=self.brief.config.timeout > 0)
        process.settle()
        self.aside = self._set_aside()
        private = {self.brief.channel.fileno(), *self.inbox.descriptors(), *(other.fileno() for other in listeners.values())}
        self.offer, self.schedule = credentials.offering_to_the_oom_killer(), self._scheduling()
        make = {place: (self._brief(place, private), loaded, bound.get(place), users) for place in listeners}
        self.workers = {place: worker.Worker(*given) for place, given in make.items()}
        handler.serve_current(worker.connection_here)
        log.configure(role=partial(worker.role, self.brief.generation))
        forks.in_child(worker.after_fork)
        forks.prepare_to_spare()
        worker.freeze()
        handler.refuse_size(self.brief.config, mapped)

    def _bind(self, loaded: handler.Handler, listeners: Mapping[int, Listener]) -> dict[int, dict[str, Any]]:
        """What a server that is the handler is at each listener; nothing of another handler. Raises HandlerError."""
        if loaded.shape is not handler.Shape.SERVER:
            return {}
        label = f"{self.brief.config.module}: {request.BINDING}"
        names = {place: (int(listener.sock.family), request.name_of(listener)) for place, listener in listeners.items()}
        return {place: handler.run(label, partial(request.bind, loaded.call, *name)) for place, name in names.items()}

    def _users_handlers(self) -> dict[int, Any]:
        """The signal handlers of import and on_boot, which workers keep; for signals that these need they are undone, and told."""
        users = signals.installed()
        if undone := handlers_undone(users):
            log.event("handlers_undone", module=self.brief.config.module, signals=undone)
        return {signo: action for signo, action in users.items() if signo not in worker.SIGNALS}

    def _set_aside(self) -> finalizers.Aside:
        """Keep what the import and on_boot have registered for the end of this process, and name it.

        Run at each worker's end it would remove, say, a temporary directory that the others use. A worker runs what was registered
        in it.
        """
        aside, self.started = finalizers.set_aside(self._exit_failed), process.started_by_us()
        self.registered = bool(aside.registered or self.started)
        if aside.registered:
            log.event("registered", generation=self.brief.generation, what=", ".join(aside.registered))
        if self.started:
            log.event("import_processes", generation=self.brief.generation, who=", ".join(self.started.values()))
        return aside

    def _finish(self) -> None:
        """Run what the import and on_boot have registered, once. The master ends this process when that takes too long."""
        # Without a master the alarm does it, which nothing hears.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, self.brief.config.boot_timeout + ALARM_AFTER)
        finish_import(self.aside or self._set_aside(), self.started, self._exit_failed)
        log.finish_prints()

    def _exit_failed(self, what: str) -> None:
        self._end_if_child()
        log.event("import_exit_failed", generation=self.brief.generation, what=f"{what} raised", text=traceback.format_exc())

    def _scheduling(self) -> Callable[[], object] | None:
        if self.brief.config.scheduling == "inherit":
            return None
        try:
            return process.batch_scheduling()
        except OSError as error:  # a sandbox
            log.event("not_batch", reason=error.strerror)
            return None

    def _brief(self, place: int, private: Collection[int]) -> worker.Brief:
        """What each worker of this listener is told. ``private``: what no worker keeps, but for its own listener."""
        brief, listener = self.brief, self.brief.listeners[place]
        return worker.Brief(
            generation=brief.generation,
            config=brief.config,
            name=brief.name,
            master_pid=brief.master_pid,
            fork_server_pid=self.pid,
            scoreboard=self.board,
            place=place,
            listener=listener,
            listener_stat=os.fstat(listener.fileno()),
            doorbell=brief.doorbell,
            gate=brief.gate,
            devnull=brief.devnull,
            devnull_stat=os.fstat(brief.devnull),
            stacks=brief.stacks,
            reopen=tuple(process.reopening(fd) for fd in (brief.doorbell, brief.stacks, *log.pipes())),
            offer=self.offer,
            part=self.part,
            schedule=self.schedule,
            forget=(atexit._clear,) if atexit._ncallbacks() else (),
            private=frozenset(private) - {listener.fileno()},
        )

    def _end_if_child(self) -> None:
        """A child that user code forked and that has come back, or raised, must not report in our name."""
        if os.getpid() != self.pid:
            os._exit(0)

    def _done(self) -> bool:
        if self.orphaned_at is not None:
            return not self.children
        # What the import registered may be what the workers live on.
        return self.leaving and not self.outbox and not (self.registered and self.children)

    # -- what the master asks

    def _obey(self) -> bool:
        """Carry out what has arrived. False when nobody is at the other end any more."""
        commands, connected = self._receive()
        slots: list[int] = []
        for command in commands:
            if command.order is Order.FORK:
                slots.append(command.slot)
                continue
            if slots:
                self._fork(slots)  # it may be for one of those
                slots.clear()
            self._carry_out(command)
        if slots:
            self._fork(slots)
        return connected

    def _receive(self) -> tuple[list[Command], bool]:
        """The commands that have arrived, and whether there may be more, ever."""
        commands: list[Command] = []
        for _ in range(COMMANDS_AT_ONCE):
            try:
                message = self.brief.channel.recv(wire.MESSAGE_LIMIT)
            except BlockingIOError:
                break
            except ConnectionResetError:
                return commands, False
            if not message:
                return commands, False
            if (command := wire.read_command(message)) is not None:
                commands.append(command)
        return commands, True

    def _carry_out(self, command: Command) -> None:
        pid = self.by_slot.get(command.slot)
        match command.order:
            case Order.RETIRE | Order.DUMP as order:
                if pid is not None:
                    process.signal_child(pid, SIGNALS[order])
            case Order.KILL:
                if pid is not None:
                    kill(self.board, command.slot, pid)
            case Order.LEAVE:
                # Who is still serving a connection becomes the master's child, and costs only itself.
                self.leaving = True
            case Order.QUIT:
                for pid, slot in self.children.items():
                    kill(self.board, slot, pid)
                self.leaving = True

    def _fork(self, slots: Sequence[int]) -> None:
        """Fork a worker for each. Nothing else between two forks: of all that is written there, each worker keeps a copy."""
        workers = [self.workers[self.brief.layout.listener(slot)] for slot in slots]
        outcomes: list[int] = []
        forks.spare(everything=not log.has_dropped())
        with signals.blocked():
            for place, slot in enumerate(slots):
                try:
                    pid = os.fork()
                except OSError as error:
                    pid = -(error.errno or errno.EAGAIN)
                if pid == 0:
                    worker.main(workers[place], slot)
                outcomes.append(pid)
        os.sched_yield()  # whoever was forked last goes first where the kernel has put it on our CPU
        for slot, pid in zip(slots, outcomes, strict=True):
            if pid < 0:
                self._send(Report(Kind.FORK_FAILED, slot, status=-pid))
                continue
            self.children[pid] = slot
            self.by_slot[slot] = pid
            self._send(Report(Kind.FORKED, slot, pid))
        self._flush()
        self._touch()

    def _touch(self) -> None:
        """Do what a death makes us do, for nothing, and have the loop go round once.

        A fork shares all pages, and each that we write to next is copied first: 220 at 3 us, which nobody waits for now.
        """
        wire.read_command(_COMMAND)
        with signals.blocked():
            signal.raise_signal(signal.SIGCHLD)

    # -- what the kernel tells

    def _reap(self) -> None:
        for change in process.reap(stops=True):
            slot = self.children.get(change.pid)
            if slot is None:
                continue  # a process that user code started
            if isinstance(change, process.Changed):
                self.stops[change.pid] = change.stopped
                continue
            self.stops.pop(change.pid, None)
            del self.children[change.pid]
            del self.by_slot[slot]
            self._send(
                Report(
                    Kind.EXITED,
                    slot,
                    change.pid,
                    change.status,
                    int(change.utime * 1e6),
                    int(change.stime * 1e6),
                    change.max_rss_kib,
                )
            )

    # -- what we tell

    def _send(self, report: Report) -> None:
        if self.orphaned_at is None:
            self.outbox.append(wire.pack_report(report))

    def _tell_stops(self, now: float) -> float | None:
        """Tell which workers were stopped, and which go on. Returns the seconds until there may be more to be told.

        User code stops and continues them as fast as it likes, so these are states and no events: the newest counts, and none
        goes before a fork or an end that waits.
        """
        if not self.stops or self.outbox:
            return None
        if now < self.stops_at:
            return self.stops_at - now
        for pid in list(self.stops)[:STOPS_AT_ONCE]:
            # Told although it may be what was told last: the master has held that against the kernel, perhaps in between.
            kind = Kind.STOPPED if self.stops.pop(pid) else Kind.CONTINUED
            self._send(Report(kind, self.children[pid], pid))
        self._flush()
        self.stops_at = now + STOPS_PAUSE
        return STOPS_PAUSE if self.stops else None

    def _flush(self, *, wait: bool = False) -> None:
        """Send what the channel takes (it holds 278 small messages); the rest waits in the outbox, in order."""
        if wait:
            self.brief.channel.setblocking(True)
        while self.outbox:
            try:
                self.brief.channel.send(self.outbox[0])
            except BlockingIOError:
                return
            except (BrokenPipeError, ConnectionResetError):
                self.outbox.clear()  # nobody is left to hear it
                return
            self.outbox.popleft()

    # -- the master is dead

    def _orphaned(self, poll: select.poll) -> None:
        self.orphaned_at = time.monotonic()
        poll.unregister(self.brief.channel)
        self.outbox.clear()
        self.stops.clear()
        self.brief.channel.close()
        cookies, looks = self.cookies.lately(self.orphaned_at), Looks()
        for listener in self.brief.listeners:
            listener.turn_away(self.orphaned_at, looks, cookies=cookies, hurried=True)

    def _say_farewell(self, since: float) -> None:
        """Serve handshakes and queue, then free the addresses and retire everybody; who serves a connection may finish it."""
        if not self.parted:
            now = time.monotonic()
            # All of them: each look counts.
            unserved = [listener for listener in self.brief.listeners if not self._is_served(listener, now)]
            if unserved and now - since < FAREWELL:
                return
            for pid in self.children:
                process.signal_child(pid, signals.RETIRE)
            for listener in self.brief.listeners:
                listener.close()
            self.parted = True
            return
        for pid, slot in self.children.items():
            if self.board.states[slot] not in (scoreboard.BUSY, scoreboard.LEAVING):
                process.signal_child(pid, signals.RETIRE)  # again: the first may have come just before the system call

    @staticmethod
    def _is_served(listener: Listener, now: float) -> bool:
        """Whether this is the moment to close it."""
        over = listener.handshakes is None or listener.handshakes.over(now)
        # After that, because a handshake that the look has not found any more is in the queue; and in any case: each look counts.
        return listener.drained() and over
