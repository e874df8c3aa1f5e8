"""The upgrade: another prefork, or another Python, under the same pid.

The program that is on disk now is tried first (its ``check``, on a copy of the real state); what it refuses changes nothing. Then
this process blocks every signal, writes its state to a file in memory and becomes that program (`prefork.system.program`), which
adopts listeners, generations and counters, and reloads. Fork servers and workers are of the old program until that reload is
committed, and serve on meanwhile.
"""

import contextlib
import os
import selectors
import signal
import socket
import time
from dataclasses import dataclass, replace
from typing import Any

from prefork import __version__, carried, config, log, names
from prefork.carried import CarriedFile, CarriedListener, CarriedTally, CarriedWiring, State, Upgrade
from prefork.changeover import SETTLED, Changeover
from prefork.config import Config
from prefork.daemon import Daemon
from prefork.errors import PreforkError, explained
from prefork.generation import Generation
from prefork.link import Wiring
from prefork.net.listener import Listener
from prefork.ops.control import Client
from prefork.pool.tally import LastReload, Tally
from prefork.system import process, program
from prefork.system.pidfile import PidFile
from prefork.system.program import Program

# What the trial may take beyond boot_timeout, which is for its import.
START = 10.0
LOOK = 0.005
# One that is given up is killed when it has not ended by itself by then.
PATIENCE = 1.0
# A process that the trial has left behind may go on talking: so many reads are enough.
LAST_WORDS = 64
# Of what the trial says the end is kept: the error.
SAID_LIMIT = 65536


@dataclass(slots=True)
class Trial:
    """The successor's ``check``, running."""

    pid: int
    said: int
    answer: int
    deadline: float
    text: bytes = b""
    status: int | None = None

    def take(self) -> bool:
        """Take in what it has said, so that it never waits for us. False when there is nothing more now."""
        try:
            more = os.read(self.said, SAID_LIMIT)
        except BlockingIOError:
            return False
        self.text = (self.text + more)[-SAID_LIMIT:]
        return bool(more)


class Upgrading:
    """The upgrades of a daemon. ``ready``: the successor was tried and found good."""

    def __init__(self, daemon: Daemon, changeover: Changeover, how: Program | None) -> None:
        self.daemon = daemon
        self.changeover = changeover
        self.program = how
        self.trial: Trial | None = None
        self.ready = False
        self.tried: tuple[int, ...] = ()  # the interpreter that the check ran in
        self.reload_before: LastReload | None = None  # the last one before the upgrade's own
        self.dropped: list[tuple[int, float]] = []  # trials that were asked to end, and until when they may
        self.settled_by = 0.0  # then nobody waits any more for those who accept with old code

    # -- in the old program

    def upgrade(self, what: str, client: Client | None = None) -> None:
        """Try the program that is there now, and become it. A client hears the upgrade's number, and asks for its outcome later."""
        daemon = self.daemon
        clients = [client] if client is not None else []
        reason = self._refusal()
        if reason is not None:
            log.event("ignored", what=what, why=reason)
            daemon.tell(clients, {"ok": False, "reason": reason})
            return
        number = daemon.upgrade.number + 1 if daemon.upgrade is not None else 1
        daemon.upgrade = Upgrade(number, time.time(), what, __version__, os.urandom(16).hex())
        try:
            names.restore(daemon)
            self._try(self._program())
        except PreforkError as error:
            self._give_up(str(error))
        except OSError as error:
            self._give_up(f"{self._program().executable} can't be started: {explained(error)}")
        daemon.tell(clients, {"ok": True, "upgrade": number})

    def _program(self) -> Program:
        if self.program is None:
            raise RuntimeError("an upgrade without a program")
        return self.program

    def _refusal(self) -> str | None:
        daemon = self.daemon
        if daemon.stopping is not None:
            return "the daemon is stopping"
        if daemon.current is None:
            return "the daemon is starting"
        if daemon.upgrade is not None and not daemon.upgrade.result:
            return "an upgrade is under way"
        if daemon.reloading is not None or self.changeover.wanted is not None:
            return "a reload is under way; try again when it has ended"
        if self.program is None:
            return "this daemon was not started as `prefork serve`, so its successor can't be, either: it needs a restart"
        if program.interpreter_has_moved(self.program):
            script = self.program.prefix[-1]
            return (
                f"{script} names another interpreter in its first line than {self.program.executable}, which it named at the start "
                "and which would be executed again: it needs a restart; upgrades follow a daemon that is started as `PYTHON -m "
                "prefork serve`, by a path of PYTHON that stays"
            )
        return None

    def _try(self, how: Program) -> None:
        daemon = self.daemon
        log.event("upgrading", what=daemon.upgrade.what if daemon.upgrade else "", program=" ".join(how.line("serve")))
        daemon.trying = True
        # Python 3.13.0 fails in a working directory that was removed (any AttributeError of a module becomes a SystemError).
        with contextlib.suppress(OSError):  # its name may stand for nothing now: then the new program starts where we are
            os.chdir(daemon.wiring.folder)
        self.tried = program.identity(how.executable)
        state = program.keep_state(carried.write(self.carry()))
        try:
            pid, said, answer = program.try_out(how, state)
        finally:
            os.close(state)
        daemon.wiring.strangers.add(pid)
        self.trial = Trial(pid, said, answer, daemon.now + daemon.config.boot_timeout + START)
        try:
            daemon.selector.register(said, selectors.EVENT_READ, self._listen)
        except OSError as error:  # no memory, or fs.epoll.max_user_watches: what is refused must not become this program later
            self.drop(f"{how.executable} can't be heard: {explained(error)}")

    def _listen(self, _now: float) -> None:
        # It was readable: nothing to read is the end.
        if self.trial is not None and not self.trial.take():
            self.daemon.selector.unregister(self.trial.said)

    def ended(self, pid: int, status: int) -> None:
        """A child was reaped: if it was the trial, that is its verdict."""
        if self.trial is not None and self.trial.pid == pid:
            self.trial.status = status
        self.dropped = [(dropped, until) for dropped, until in self.dropped if dropped != pid]  # the number may be another's soon

    def tend(self) -> None:
        """Do what is due."""
        while self.dropped and self.dropped[0][1] <= self.daemon.now:
            process.signal_child(self.dropped.pop(0)[0], signal.SIGKILL)
        trial = self.trial
        if trial is None:
            if not self.ready:
                self._note_outcome()
        elif trial.status is not None:
            proved = self.daemon.upgrade is not None and program.is_answer(trial.answer, self.daemon.upgrade.token)
            self._end_trial(trial)
            if trial.status == 0 and proved:
                self.ready = True
            else:
                self._give_up(self._why_refused(trial))
        elif trial.deadline <= self.daemon.now:
            self.drop("the new program's check has not ended in time")

    def _why_refused(self, trial: Trial) -> str:
        if trial.status == 0:
            how = self._program()
            what = " ".join((how.executable, *how.prefix))
            return f"{what} is no prefork, or not a whole one: its check has ended with exit status 0 and did not read the state"
        text = trial.text.decode(errors="replace").strip()
        # What it has logged before its error is no reason.
        reason = ("\n" + text).rpartition("\nprefork: ")[2].strip()
        return reason or f"the new program's check said nothing: {process.describe(trial.status or 0)}"

    def wake_at(self) -> float | None:
        """When to `tend`."""
        if self.ready:
            return self.daemon.now + LOOK if self.daemon.reloading is None else None
        times = [self.trial.deadline] if self.trial is not None else []
        times += [self.dropped[0][1]] if self.dropped else []
        return min(times, default=None)

    @property
    def due(self) -> bool:
        """Whether `become` can be called: no dead fork server is being replaced."""
        return self.ready and self.daemon.reloading is None

    def drop(self, reason: str) -> None:
        """It is not to be."""
        if self.trial is not None:
            if self.trial.status is None:
                # Not SIGKILL yet: it has to end what its import has started.
                process.signal_child(self.trial.pid, signal.SIGTERM)
                self.dropped.append((self.trial.pid, self.daemon.now + PATIENCE))
            self._end_trial(self.trial)
            self._give_up(reason)
        elif self.ready:
            self.ready = False
            self._give_up(reason)

    def _end_trial(self, trial: Trial) -> None:
        self.trial = None
        for _ in range(LAST_WORDS):
            if not trial.take():
                break
        if trial.said in self.daemon.selector.get_map():
            self.daemon.selector.unregister(trial.said)
        os.close(trial.said)
        os.close(trial.answer)

    def _give_up(self, reason: str) -> None:
        daemon = self.daemon
        self._end("refused", reason)
        first, _, rest = reason.partition("\n")
        number = daemon.current.number if daemon.current is not None else 0
        log.event("refused", what="upgrade", generation=number, reason=first, text=rest)

    def _end(self, result: str, reason: str = "", generation: int = 0) -> None:
        self.daemon.trying = False
        if self.daemon.upgrade is not None:
            self.daemon.upgrade = replace(self.daemon.upgrade, result=result, reason=reason, generation=generation)

    def become(self) -> None:
        """Become the new program. Called with all signals blocked; returns only when that can't be."""
        daemon, how = self.daemon, self._program()
        self.ready = False
        # Who waits for a reload gets it with the upgrade; for the rest there is nobody any more who would know them.
        number = daemon.upgrade.number if daemon.upgrade is not None else 0
        daemon.tell(self.changeover.wanted or [], {"ok": True, "upgrade": number})
        self.changeover.wanted = [] if self.changeover.wanted is not None else None
        if daemon.control is not None:
            daemon.control.dismiss("the daemon became another program meanwhile; see prefork status", daemon.now)
        try:
            if program.identity(how.executable) != self.tried:  # what is no Python does not know the way back
                self._give_up(f"{how.executable} is another file than the one that was tried; try again")
                return
            self._execute(how)
        except OSError as error:
            self._give_up(f"{how.executable} can't be executed: {explained(error)}")

    def _execute(self, how: Program) -> None:
        generations = self.daemon.generations()
        for generation in generations:
            generation.forks_nothing()
        state = self.carry()
        fd = program.keep_state(carried.write(state))
        log.event("handing_over", version=__version__, program=how.executable)
        try:
            program.become(how, fd, state.descriptors())
        finally:
            os.close(fd)
            for generation in generations:
                generation.look_soon_all(self.daemon.now)

    def carry(self) -> State:
        """The daemon, for another program."""
        daemon = self.daemon
        if daemon.current is None or daemon.upgrade is None:
            raise RuntimeError("nothing to carry")
        generations = daemon.generations()
        everywhere = [*daemon.listeners.current, *(farewell.listener for farewell in daemon.listeners.farewells)]
        everywhere += [listener for generation in generations for listener in generation.listeners]
        listeners = list(dict.fromkeys(everywhere))
        places = {listener: place for place, listener in enumerate(listeners)}
        tally, wiring, control = daemon.tally, daemon.wiring, daemon.control
        return State(
            version=__version__,
            pid=daemon.pid,
            program=self._program(),
            upgrade=daemon.upgrade,
            name=daemon.name,
            started=daemon.started,
            began=daemon.began,
            lost=daemon.lost,
            left=daemon.clock(),
            suspended=daemon.suspended,
            next_number=daemon.next_number,
            last_reload=daemon.last_reload,
            reload_wanted=self.changeover.wanted is not None,
            inherited=tuple(sorted(daemon.listeners.inherited & set(process.descriptors()))),
            activated=daemon.activated,
            wiring=CarriedWiring(
                folder=wiring.folder,
                doorbell_read=wiring.doorbell_read,
                doorbell_write=wiring.doorbell_write,
                devnull=wiring.devnull,
                logs=tuple(log.carry()),
                strangers=tuple(wiring.strangers),
                credentials=wiring.credentials,
            ),
            control=CarriedFile(control.path, control.sock.fileno(), control.inode) if control is not None else None,
            pid_file=_carried_file(daemon.pid_file),
            listeners=tuple(_carried_listener(listener) for listener in listeners),
            current_listeners=tuple(places[listener] for listener in daemon.listeners.current),
            farewells=daemon.listeners.carry(places),
            cookies=tuple(daemon.listeners.cookies.readings),
            generations=tuple(generation.carry(places) for generation in generations),
            tally=CarriedTally(
                counts=tally.counts,
                histogram=tuple(tally.histogram),
                forked=tally.forked,
                exited=tally.exited,
                saturated=tally.saturated,
                stalled=tally.stalled,
                deaths=tuple(tally.deaths),
            ),
            lock=_carried_file(daemon.lock),
        )

    # -- in the new one

    def adopt(self, state: State) -> None:
        """Put everything in its place again. Raises PreforkError, OSError and ValueError."""
        daemon = self.daemon
        if state.pid != daemon.pid:
            raise ValueError(f"the state is that of process {state.pid}")
        daemon.name, daemon.started, daemon.began, daemon.lost = state.name, state.started, state.began, state.lost
        # The time without a program, or with one that hung, counts against no deadline.
        missed = max(0.0, daemon.clock() - state.left)
        daemon.lost += missed
        daemon.suspended, daemon.next_number, daemon.last_reload = state.suspended, state.next_number, state.last_reload
        self.changeover.wanted = [] if state.reload_wanted else None
        daemon.now, daemon.upgrade, daemon.activated = daemon.clock(), state.upgrade, state.activated
        counted = state.tally
        daemon.tally = Tally(
            counted.counts, list(counted.histogram), counted.forked, counted.exited, counted.saturated, counted.stalled
        )
        daemon.tally.deaths.extend(counted.deaths)
        strangers, who = set(state.wiring.strangers), state.wiring.credentials
        log.of_master(strangers, who.uid if who is not None and who.uid != 0 else None)
        log.adopt(state.wiring.logs)
        daemon.pid_file, daemon.lock = _adopted_file(state.pid_file), _adopted_file(state.lock)
        # In loops, because what is made belongs to this frame then: if the rest fails, the way back needs it open.
        listeners: list[Listener] = []
        for listener in state.listeners:
            listeners.append(_adopted_listener(listener))  # noqa: PERF401
        daemon.listeners.inherited = frozenset(state.inherited)
        daemon.listeners.current = [listeners[place] for place in state.current_listeners]
        daemon.listeners.cookies.readings = list(state.cookies)
        daemon.listeners.adopt(state.farewells, listeners)
        configs = [_config(generation, listeners) for generation in state.generations]
        daemon.config = configs[0]
        wiring = state.wiring
        daemon.wiring = Wiring(
            name=daemon.name,
            folder=wiring.folder,
            doorbell_read=wiring.doorbell_read,
            doorbell_write=wiring.doorbell_write,
            devnull=wiring.devnull,
            strangers=strangers,
            credentials=wiring.credentials,
        )
        adopted: list[Generation] = []
        for generation, conf in zip(state.generations, configs, strict=True):
            its = [listeners[place] for place in generation.listeners]
            adopted.append(Generation.adopted(generation, conf, its, daemon.wiring, daemon.tally, daemon.now))
            adopted[-1].hung.forgive(missed)
        daemon.current, daemon.draining = adopted[0], adopted[1:]

    def adopted(self, reason: str) -> None:
        """The master hears again: read configuration and code with the new program, or say why we are the old one again."""
        daemon = self.daemon
        before = daemon.upgrade.version if daemon.upgrade is not None else ""
        if reason:
            self._give_up(f"the new program failed, and became this one again: {reason}")
            self.changeover.ensure_fork_server()  # when it was to be replaced is not carried
            return
        self.changeover.wanted = None  # the reload that follows is the one that was wanted
        log.event("upgraded", version=__version__, before=before, pid=daemon.pid)
        log.renew()
        self.reload_before = daemon.last_reload
        self.changeover.reload("reload after the upgrade")

    def _note_outcome(self) -> None:
        """The upgrade's own reload has ended."""
        daemon = self.daemon
        if daemon.upgrade is None or daemon.upgrade.result or daemon.reloading is not None:
            return
        last = daemon.last_reload
        if last is None or last is self.reload_before:
            return
        self.settled_by = daemon.now + SETTLED
        if last.result == "ok" and daemon.current is not None:
            self._end("ok", generation=daemon.current.number)
        else:
            self._end(last.result, f"prefork {__version__} runs, but its reload was {last.result}: {last.reason}")

    def outcome(self, number: int) -> dict[str, Any] | None:
        """What became of this upgrade, once it is known and nobody accepts with old code any more."""
        daemon = self.daemon
        upgrade = daemon.upgrade
        if upgrade is None or upgrade.number != number:
            return {"ok": False, "reason": "the daemon was started anew, or another upgrade came between"}
        if not upgrade.result:
            return {"ok": False, "reason": "the daemon is stopping"} if daemon.stopping is not None else None
        if upgrade.result != "ok":
            return {"ok": False, "reason": upgrade.reason}
        if any(generation.accepts for generation in daemon.draining) and daemon.now < self.settled_by:
            return None
        return {"ok": True, "generation": upgrade.generation, "version": __version__, "suspended": daemon.suspended}


def _carried_listener(listener: Listener) -> CarriedListener:
    return CarriedListener(listener.fileno(), listener.configured, listener.address, listener.inode, listener.ours)


def _adopted_listener(listener: CarriedListener) -> Listener:
    sock = socket.socket(fileno=listener.fd) if listener.fd != -1 else _closed()
    return Listener(listener.configured, listener.address, sock, listener.inode, listener.ours)


def _carried_file(file: PidFile | None) -> CarriedFile | None:
    return CarriedFile(file.path, file.fd) if file is not None else None


def _adopted_file(file: CarriedFile | None) -> PidFile | None:
    return PidFile(file.path, file.fd) if file is not None else None


def _closed() -> socket.socket:
    sock = socket.socket()
    sock.close()
    return sock


def _config(generation: carried.CarriedGeneration, listeners: list[Listener]) -> Config:
    # Of addresses that a reload has changed meanwhile the listener has the latest.
    return config.restored(generation.config, tuple(listeners[place].configured for place in generation.listeners))
