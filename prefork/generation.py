"""One generation as its master sees it: a fork server, its workers, their scoreboard, and what was asked of them.

The effects of the pool live here, the decisions in `prefork.pool.policy`. Everything is level-triggered: events only say
where to look, `tend` looks and acts, and `wake_at` says when it wants to look again without any event. What fork servers and
workers say is checked against `prefork.pool.state` and against the kernel before anything is done with it.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from prefork import log
from prefork.accepting import EXIT_CANT_ACCEPT
from prefork.acceptors import Acceptors, Slots
from prefork.carried import CarriedGeneration, CarriedPool
from prefork.computing import Computing
from prefork.config import Config, plain
from prefork.errors import PreforkError, explained
from prefork.hung import Hung
from prefork.killing import Killing
from prefork.link import Link, Wiring
from prefork.net.listener import Listener
from prefork.pool import lives, policy, scoreboard, wire
from prefork.pool.episode import Episode, Episodes
from prefork.pool.lives import WorkerLives
from prefork.pool.policy import Memory, Tired, View
from prefork.pool.scoreboard import BUSY, FREE, IDLE, LEAVING, NOTHING, PARKED, PAUSED, STARTING, Counts, Layout, Scoreboard
from prefork.pool.state import Pool, Worker
from prefork.pool.tally import Death, Overdue, Tally, Trouble
from prefork.pool.throttle import Throttle
from prefork.pool.wire import Kind, Order, Report
from prefork.retiring import Retiring, Unserved
from prefork.system import process, stacks
from prefork.system.identity import Missing, identify

# After asking to be rung the master looks once more before it sleeps: a store can't stay in a CPU's buffer for a millisecond.
SETTLE = 0.001
# A fork that was ordered of a fork server which then died: its child, if any, has mostly written its pid long before.
LIMBO, LIMBO_LOOK = 0.5, 0.02
# A fork server that somebody stopped, or that was told to leave and does not, is killed after this long.
PATIENCE = 2.0
# So many crashes are remembered for a reload that may be taken back.
CRASHES_KEPT = 8
# Workers that end by themselves are replaced at once: all that there can be and so many more, then so many a second on average. A
# death and a fork cost the master 0.5 to 0.9 ms: 3.6 % of a core at most.
DEATHS, DEATHS_A_SECOND = 64, 40
# Reports that it was not asked for (nonsense, and that workers were stopped and continued): so many at once and so many a second.
TALK, TALK_A_SECOND, TALK_PAUSE = 200, 50, 0.25
# A fork server that has closed its end and is not reaped is looked at after so long, then ever more seldom.
ZOMBIE_LOOK, ZOMBIE_LOOK_SELDOM = 0.02, 1.0
# So much nonsense is not a misunderstanding: that fork server is replaced.
GOSSIP_LIMIT = 10_000


class Generation:
    """One generation. The master drives it: `receive`, `tend`, `commit`, `retire`, and `gone` at the end."""

    def __init__(
        self,
        number: int,
        config: Config,
        listeners: Sequence[Listener],
        wiring: Wiring,
        tally: Tally,
        now: float,
        targets: Sequence[int] | None = None,
        layout: Layout | None = None,
        pool: Pool | None = None,
    ) -> None:
        """``layout`` and ``pool``: of one that is there already."""
        self.number = number
        self.config = config
        self.listeners = tuple(listeners)
        self.tally = tally
        self.boot_deadline = now + config.boot_timeout
        # A reload may go past the ceiling by its targets, and targets may be raised up to the ceiling.
        self.layout = layout or Layout(len(listeners), 2 * config.max_workers)
        self.pool = pool or Pool(self.layout.listeners, self.layout.capacity)
        self.failure: str | None = None
        self.ready = False  # the handler has been imported
        self.registered = False  # the import has registered something for the end: the fork server outlives its workers
        self.committed = False
        self.suspended = False
        self.kept = False  # its fork server stays although it is retired: it may have to serve again
        self.crashes: list[str] = []  # what was said of the first workers that ended by themselves before they should
        self.trouble = Trouble()  # of workers that do not start
        self.fork_trouble = Trouble()
        self.committed_at = float("-inf")  # of one that was committed by another program: long ago
        self._lives = WorkerLives()
        self._talk = Throttle(TALK_A_SECOND, TALK, TALK_PAUSE)
        self._deaf_until: float | None = None  # to the fork server
        self._told_deaf = False
        self._zombie_look_at: float | None = None
        self._zombie_wait = ZOMBIE_LOOK
        self._is_zombie = False
        self._deaths = Throttle(DEATHS_A_SECOND, DEATHS + config.max_workers, policy.BACKOFF_LIMIT)
        self._failed_ns = time.monotonic_ns()  # when a worker did so last, as workers' clocks have it
        self.gossip = 0
        self.exhausted = 0  # workers that have served clients and then could not accept any more
        self._why_exhausted = ""  # the latest word of such a worker
        self._denied: set[int] = set()  # free slots whose last fork has failed, as the fork server says
        self._absent: set[int] = set()  # slots in use that are no acceptors whatever they say: asked to leave, stopped, tired
        self._tired: set[int] = set()  # those of them that want to be recycled, and were not asked to leave yet
        self._untold: list[Callable[[], object]] = []  # of deaths: clients wait for a replacement, and for the log nobody does
        self._limbo_at: float | None = None
        self._limbo_until = 0.0
        self._patience_at: float | None = None
        self._counted: dict[int, Counts] = {}  # counters of slots whose last worker was reaped
        self._left = False
        self.link = Link(number, self.layout, wiring)
        slots = Slots(self.link, self.pool, self._absent, self._tired)
        self._acceptors = [
            Acceptors(place, config, slots, target, now)
            for place, target in enumerate(targets or [config.workers] * len(listeners))
        ]
        self.killing = Killing(self.link)
        its = self.listeners
        self.retiring = Retiring(self.link, self.pool, self.killing, its, config.timeout, end_input=config.drain == "eof")
        addresses = [listener.address for listener in its]
        self.computing = Computing(self.link, addresses, config.timeout, self._tire)
        lost = time.monotonic() - now
        looks = self.computing.look, self.retiring.is_in_accept
        self.hung = Hung(self.link, self.pool, self.killing, self._recycle, *looks, config.timeout, lost)

    # -- an upgrade

    def carry(self, places: Mapping[Listener, int]) -> CarriedGeneration:
        """What another program has to know to go on with it (`adopted`). ``places``: of the listeners in the state's list."""
        served, unseen_since = self.hung.carry()
        return CarriedGeneration(
            number=self.number,
            config=plain(self.config),
            listeners=tuple(places[listener] for listener in self.listeners),
            layout=self.layout,
            targets=tuple(self.targets),
            retired=tuple(place for place, acceptors in enumerate(self._acceptors) if acceptors.retired),
            ready=self.ready,
            registered=self.registered,
            committed=self.committed,
            suspended=self.suspended,
            left=self._left,
            trouble=self.trouble,
            fork_trouble=self.fork_trouble,
            gossip=self.gossip,
            counted=self._counted,
            pool=CarriedPool(
                workers=tuple(self.pool.workers.values()),
                unready=tuple(self.pool.unready),
                unborn=tuple(self.pool.unborn),
                high=tuple(self.pool.high),
            ),
            link=self.link.carry(),
            served=served,
            unseen_since=unseen_since,
            unserved={slot: (one.begun, *one.peer) for slot, one in self.retiring.unserved.items()},
            episodes=tuple(acceptors.episodes for acceptors in self._acceptors),
        )

    @classmethod
    def adopted(
        cls, carried: CarriedGeneration, config: Config, listeners: Sequence[Listener], wiring: Wiring, tally: Tally, now: float
    ) -> "Generation":
        """The generation that another program of this process has carried. Raises OSError and ValueError."""
        layout, its = carried.layout, carried.pool
        pool = Pool.restored(layout.listeners, layout.capacity, its.workers, its.unready, its.unborn, its.high)
        self = cls(carried.number, config, listeners, wiring, tally, now, carried.targets, layout, pool)
        self.ready, self.registered, self.committed = carried.ready, carried.registered, carried.committed
        self.suspended, self._left = carried.suspended, carried.left
        self._counted = dict(carried.counted)
        self.trouble, self.fork_trouble = carried.trouble, carried.fork_trouble
        self.gossip = carried.gossip
        for acceptors, episodes in zip(self._acceptors, carried.episodes, strict=True):
            acceptors.episodes = episodes
        self.link.adopt(carried.link)
        self.retiring.ask_again(now)
        for slot, (begun, host, port) in carried.unserved.items():
            self.retiring.unserved[slot] = Unserved(begun, (host, port))
        self.hung.adopt(carried.served, carried.unseen_since)
        self.hung.looked(now)
        for worker in self.pool.workers.values():
            self._note_absence(worker)
            if worker.killed:
                self.killing.note(worker, now)
        for place in carried.retired:
            self._acceptors[place].retire(now)
        if self.link.pid is None:
            self._limbo_at, self._limbo_until = now, now + LIMBO
        elif self.link.stopped or self._left:
            self._patience_at = now + (PATIENCE if self.link.stopped else self._time_to_leave)
        return self

    @property
    def board(self) -> Scoreboard:
        """The generation's scoreboard."""
        return self.link.board

    @property
    def targets(self) -> list[int]:
        """For each listener, how many acceptors are wanted."""
        return [acceptors.target for acceptors in self._acceptors]

    # -- what the fork server tells

    def receive(self, now: float) -> bool:
        """Take in what the fork server reports. False once it has closed its end, or talks nothing but nonsense."""
        reports, open_ = self.link.receive()
        unasked = 0
        for report in reports:
            unasked += report is not None and report.kind in (Kind.STOPPED, Kind.CONTINUED)
            if report is None or not self._fold(report, now):
                unasked += 1
                self.gossip += 1
                if self.gossip & (self.gossip - 1) == 0:  # 1, 2, 4, 8, ...: a liar must not fill the log
                    log.event("gossip", count=self.gossip, generation=self.number)
        if unasked and self._talk.spend(now, unasked):
            what = f"reports of stopped and continued workers, and nonsense, from generation {self.number}"
            log.event("flood", what=what, rate=TALK_A_SECOND)
        if self._talk.is_paused(now):
            self._deaf_until = self._talk.until
        return open_ and self.gossip < GOSSIP_LIMIT

    def _fold(self, report: Report, now: float) -> bool:
        """Fold one report into the state. False when it can't be true."""
        match report.kind:
            case Kind.READY if not self.ready:
                self.ready, self.registered = True, report.status != 0
                self.boot_deadline = now + self.config.boot_timeout
                self.look_soon_all(now)
            case Kind.FAILED if not self.ready:
                self.failure = report.text
                # It leaves by itself, and may have registered something before it failed.
                self.registered = self._left = True
                self._patience_at = now + self._time_to_leave
            case Kind.FORKED:
                if not self._may_be_a_worker(report.slot, report.pid) or not self._born(report.slot, report.pid):
                    if report.slot in self._denied:  # so it had not failed, and what was forked is nobody's
                        self.link.send(Order.RETIRE, report.slot)
                    return False
                if now >= self.fork_trouble.until:  # before, it was ordered together with one that failed
                    self.fork_trouble = self._overcome(self.fork_trouble)
            case Kind.FORK_FAILED:
                worker = self.pool.fork_failed(report.slot)
                if worker is None:
                    return False
                self._forget(worker)
                self._denied.add(report.slot)
                self.board.retire[report.slot] = 1  # should it have happened: it leaves before it accepts
                self._fork_failed(OSError(report.status, os.strerror(report.status)), now)
                self.look_soon(worker.listener, now)
            case Kind.EXITED if os.WIFEXITED(report.status) or os.WIFSIGNALED(report.status):
                worker = self.pool.workers.get(report.slot)
                if worker is None or worker.pid != report.pid or self.link.still_runs(report.pid):
                    return False
                cpu = (report.utime_us + report.stime_us) / 1e6
                return self.exited(report.slot, report.pid, report.status, cpu, report.max_rss_kib, now)
            case Kind.STOPPED | Kind.CONTINUED:
                worker = self.pool.workers.get(report.slot)
                if worker is None or worker.pid != report.pid:
                    return False
                # It may go on by now; and where the kernel hides its state, the report is all there is.
                worker.stopped = report.kind is Kind.STOPPED and process.state(worker.pid) in (b"T", b"t", b"")
                self._note_absence(worker)
                self.look_soon(worker.listener, now)
            case _:
                return False
        return True

    def _fork_failed(self, error: OSError, now: float) -> None:
        trouble = self.fork_trouble
        reason = explained(error)
        seconds = trouble.add(now, f"fork failed: {reason}", wait=policy.fork_backoff)
        if trouble.failures & (trouble.failures - 1) == 0:  # 1, 2, 4, ...: it is tried every second, perhaps for days
            log.event("fork_failed", reason=reason, failures=trouble.failures, seconds=seconds)
        self.forks_nothing()

    def forks_nothing(self) -> None:
        """Until the next look no worker waits for its replacement."""
        self.board.order_words[scoreboard.FORKS] = 0

    def _overcome(self, trouble: Trouble) -> Trouble:
        if trouble.failures:
            log.event("fork_again", failures=trouble.failures)
        return Trouble()

    @property
    def is_heard(self) -> bool:
        """Whether the fork server's reports are read now."""
        return self._deaf_until is None and not self.link.hung_up

    def hear_later(self, until: float, why: OSError) -> None:
        """The fork server's channel could not be registered: its reports wait there."""
        self._deaf_until = until
        if not self._told_deaf:
            self._told_deaf = True
            log.event("deaf", what=f"the fork server of generation {self.number}", reason=explained(why))

    def hang_up(self, now: float) -> None:
        """The fork server has closed its end of the channel, or talks nothing but nonsense: it is killed."""
        self.link.hang_up()
        self._zombie_look_at = now + self._zombie_wait

    def fork_server_is_a_zombie(self, now: float) -> bool:
        """Whether the fork server has ended, without being there to be reaped: two looks in a row have found it so."""
        if self._zombie_look_at is None or self._zombie_look_at > now or self.link.pid is None:
            return False
        self._zombie_wait = min(2 * self._zombie_wait, ZOMBIE_LOOK_SELDOM)
        self._zombie_look_at = now + self._zombie_wait
        was_zombie, self._is_zombie = self._is_zombie, process.state(self.link.pid) == b"Z"
        return was_zombie and self._is_zombie

    def fork_server_ended(self, now: float, status: int | None = None) -> None:
        """The fork server was reaped: its workers are the master's children from now on, and nobody can be forked.

        ``status`` is None where it can't be reaped.
        """
        self.link.ended()
        self.forks_nothing()
        if self.registered and not (self._left and status is not None and os.WIFEXITED(status)):
            cause = "it can't be reaped" if status is None else process.describe(status)
            log.event("import_unfinished", generation=self.number, cause=cause)
        self._zombie_look_at = self._deaf_until = None
        for worker in list(self.pool.workers.values()):
            if worker.pid and not (process.is_child(worker.pid) and self._may_be_a_worker(worker.slot, worker.pid)):
                # It was reaped by a fork server that died before it could tell.
                self.exited(worker.slot, worker.pid, None, 0.0, 0, now)
        self._limbo_at, self._limbo_until = now, now + LIMBO
        self._patience_at = None
        self.killing.kill_again()
        self.retiring.ask_again(now)
        self.look_soon_all(now)

    def _may_be_a_worker(self, slot: int, pid: int) -> bool:
        """Whether the fork server can have forked it: what is taken for a worker may be signalled. It may have gone already."""
        known = 0 < pid <= process.PID_LIMIT and pid not in self.link.wiring.strangers
        return known and self.link.has_forked(slot, pid) is not False

    def _clear_limbo(self, now: float) -> None:
        """Workers whose fork was ordered and never confirmed: known by the pid they wrote, or given up."""
        for worker in list(self.pool.unborn.values()):
            pid = self.board.words[self.board.record(worker.slot) + scoreboard.PID]
            if self.link.has_adopted(worker.slot, pid) and self._born(worker.slot, pid):
                continue
            if now >= self._limbo_until:
                if 0 < pid <= process.PID_LIMIT and identify(pid) is Missing.GONE and self._born(worker.slot, pid):
                    self.exited(worker.slot, pid, None, 0.0, 0, now)  # it has come and gone, perhaps with a connection
                else:
                    self.pool.fork_failed(worker.slot)
                    self._settle(worker.slot)
                    self._forget(worker)
                # One that comes even later (it was starved, or a fork hook took its time) is nobody's: it leaves before it accepts.
                self.board.retire[worker.slot] = 1
        self._limbo_at = now + LIMBO_LOOK if self.pool.unborn else None

    # -- workers

    def _born(self, slot: int, pid: int) -> bool:
        """The fork happened. False when it can't be true."""
        if self.pool.forked(slot, pid) is None:
            return False
        self.tally.forked += 1
        if self._was_ready(slot):  # its ring came before this
            self._came(slot)
        return True

    def _came(self, slot: int) -> None:
        """A worker is known, and has come as far as accept(): two events, in whichever order."""
        worker = self.pool.unready.pop(slot, None)
        if worker is None:
            return
        self._acceptors[worker.listener].come += 1
        if not self.trouble.until_served:
            self.trouble = self._overcome(self.trouble)

    def exited(self, slot: int, pid: int, status: int | None, cpu: float, max_rss_kib: int, now: float) -> bool:
        """A worker was reaped. False when that slot does not hold that pid."""
        worker = self.pool.exited(slot, pid)
        if worker is None:
            return False
        self.tally.exited += 1
        was_ready = self._was_ready(slot)
        before = self._counted.get(slot, NOTHING).begun
        serving = self._settle(slot, self.retiring.unserved.get(slot))
        served = self._counted[slot].begun != before
        peer = self.board.peer(slot) if serving else None
        cause, stack, told = self._post_mortem(worker, status, serving=serving)
        most = self.config.max_connections
        recycled = status == 0 and 0 < most <= self._counted[slot].begun - before
        was_expected = worker.retiring or slot in self._tired
        self._forget(worker)
        if not was_expected:
            self._acceptors[worker.listener].vacated += 1
        if (status != 0 or serving) and self.committed:
            self.tally.deaths.append(
                Death(time.time(), slot, pid, self.number, cause, peer, cpu, max_rss_kib * 1024, stack or None)
            )
        who: dict[str, Any] = {"slot": slot, "generation": self.number, "pid": pid, "cause": cause}
        exhausted = served and not serving and _could_not_accept(status)
        if not worker.retiring and not worker.killed and not recycled and self._deaths.spend(now):
            log.event("deaths_flood", generation=self.number, most=DEATHS_A_SECOND)
        if not worker.retiring and (not was_ready or (not served and self._fails(worker, status, now))):
            self._failed_early(who, now, stack, ready=was_ready)
        elif exhausted:
            self._note_exhausted(who)
        elif (status != 0 or serving) and (not worker.killed or (serving and worker.hung is not None)):
            self._note_crash(f"worker {slot} died: {cause}, serving {peer or 'nobody'}\n{stack}".rstrip())
            self._untold.append(lambda: log.event("worker_died", text="" if told else stack, peer=peer or "nobody", **who))
        else:
            if recycled and not worker.retiring:
                count = self._counted[slot].begun
                self._untold.append(lambda: log.event("recycled", slot=slot, generation=self.number, pid=pid, connections=count))
            self._untold.append(lambda: log.event("worker_ended", **who))
        self.look_soon(worker.listener, now)
        return True

    def _fails(self, worker: Worker, status: int | None, now: float) -> bool:
        """Whether the end of a worker that was ready, and has served nothing, is a failure to back off from."""
        if status is None:
            return False  # nobody knows what has become of it
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == PreforkError.exit_code:
            return True  # by its own word it can't accept
        ready_ns = self.board.words[self.board.record(worker.slot) + scoreboard.STARTED]
        # Since it was ready, by its own word; it can't be older than the order to fork it.
        lived = min(now - worker.since, max(0, time.monotonic_ns() - ready_ns) / 1e9)
        acceptors = self._acceptors[worker.listener]
        if _could_not_accept(status):
            # The next one can't either, unless this one could for a while, and others do.
            return lived < lives.SHORT or not acceptors.latest(acceptors.row(), ready_ns)
        if lived >= lives.SHORT or now < self.trouble.until:
            return False
        if self.trouble.until_served and not self.trouble.is_over(now):
            return True  # the next try has failed, too
        others = acceptors.view(0, acceptors.true_row()).idle
        return self._lives.ended(now, self.begun(), others, sum(self.targets))

    def troubles(self) -> list[Trouble]:
        """What keeps workers from being forked, or did."""
        throttled = Trouble(until=self._deaths.until, reason="workers end by themselves again and again")
        return [self.trouble, self.fork_trouble, throttled]

    def _post_mortem(self, worker: Worker, status: int | None, *, serving: bool) -> tuple[str, str, bool]:
        """What a worker died of, in words, where it was then, if that is known, and whether that has been logged."""
        if status is None:
            return "not told by its dead fork server", "", False
        sought = serving and worker.hung == self._counted[worker.slot].begun
        if sought and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            late = "" if worker.stack else self.link.stacks.take_dump()
            why = f"timeout after {self.config.timeout:g} s" if self.config.timeout else "its time to finish was over"
            return f"{why} (SIGKILL)", worker.stack or late, not late
        cause = process.describe(status)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == stacks.DUMP and self.config.timeout:
            cause = f"timeout after {self.config.timeout:g} s ({cause})"  # it has become another program, which has no such stack
        if _could_not_accept(status):
            # Several that leave at once write over each other, and say the same.
            self._why_exhausted = self.board.take_last_words().partition("\n")[0] or self._why_exhausted
            cause = f"{cause}: {self._why_exhausted}"
        return cause, self.link.stacks.take_crash(status), False

    def _note_exhausted(self, who: dict[str, Any]) -> None:
        """A worker has left like one that is recycled, but for a reason that is to be known."""
        self._note_crash(f"worker {who['slot']} ended: {who['cause']}")
        self.exhausted += 1
        if self.exhausted & (self.exhausted - 1) == 0:  # 1, 2, 4, ...: it may happen after each connection
            count = self.exhausted
            self._untold.append(lambda: log.event("worker_exhausted", count=count, **who))
        else:
            self._untold.append(lambda: log.event("worker_ended", **who))

    def _failed_early(self, who: dict[str, Any], now: float, stack: str, *, ready: bool) -> None:
        what = "ended before it served anybody" if ready else "died before it was ready"
        last_words = stack if ready else "\n".join(filter(None, (self.board.take_last_words(), stack)))
        said = f"worker {who['slot']} {what}: {who['cause']}\n{last_words}".rstrip()
        if not self.committed:
            self.failure = self.failure or said
            return
        self._note_crash(said)
        self._failed_ns = time.monotonic_ns()
        seconds = self.trouble.add(now, f"a worker {what}: {who['cause']}", until_served=ready)
        log.event("worker_early", text=last_words, what=what, failures=self.trouble.failures, seconds=seconds, **who)

    def _note_crash(self, said: str) -> None:
        if len(self.crashes) < CRASHES_KEPT:
            self.crashes.append(said)

    def _settle(self, slot: int, unserved: Unserved | None = None) -> bool:
        """Close the books of a slot whose worker has gone. True when it was serving a connection: that one was killed.

        ``unserved``: a client that it was seen to hold before it was killed, and that it has perhaps not counted.
        """
        before = self._counted.get(slot, NOTHING)
        durations = sum(self.board.histogram(slot))
        counts = self.board.written(slot, before)
        if counts is None:
            log.event("spoilt_slot", slot=slot, generation=self.number)
            self.board.restore(slot, before)
            counts = before
        if durations > counts.orderly:
            self.board.clear_histogram(slot)
        if unserved is not None and (counts.begun, counts.serving) == (unserved.begun, 0):
            counts = replace(counts, begun=counts.begun + 1)
            self.board.restore(slot, counts)
            self.board.put_peer(slot, *unserved.peer)
        serving = counts.serving == 1
        if serving:
            counts = replace(counts, killed=counts.killed + 1)
            self._log_killed(slot)
        self._counted[slot] = counts
        self.board.keep_account(slot, counts)
        return serving

    def _counts(self, slot: int) -> Counts:
        """The slot's counters, held against what was counted before."""
        return self.board.counts(slot, self._counted.get(slot, NOTHING))

    def _log_killed(self, slot: int) -> None:
        """The access log's line that a worker could not write any more."""
        duration = max(0, time.monotonic_ns() - self.board.words[self.board.record(slot) + scoreboard.SINCE]) / 1e9
        listener = str(self.listeners[self.layout.listener(slot)].address)
        who: dict[str, Any] = {"slot": slot, "generation": self.number, "listener": listener}
        log.open_for(self.config).event("access", peer=self.board.peer(slot), duration=duration, outcome="killed", **who)

    def _forget(self, worker: Worker) -> None:
        self.board.states[worker.slot] = FREE
        self.killing.forget(worker.slot)
        self.retiring.forget(worker.slot)
        self.computing.forget(worker.slot)
        self.board.tired[worker.slot] = 0
        self._absent.discard(worker.slot)
        self._tired.discard(worker.slot)

    def _note_absence(self, worker: Worker) -> None:
        if worker.retiring or worker.stopped or worker.slot in self._tired:
            self._absent.add(worker.slot)
        else:
            self._absent.discard(worker.slot)

    # -- looking and forking

    def rang(self, ring: wire.Doorbell, now: float) -> bool:
        """A worker's doorbell. False when it names a slot that is not in use."""
        worker = self.pool.workers.get(ring.slot)
        if worker is None:
            return False
        if ring.why is wire.Ring.READY:
            self._came(worker.slot)
        elif ring.why is wire.Ring.ACCEPTED and self.trouble.until_served:
            self.trouble = self._overcome(self.trouble)
        # A storm of accepts must not wake the master more often than a look is worth.
        acceptors = self._acceptors[worker.listener]
        acceptors.wake(max(now, acceptors.looked_at + policy.LOOK_AGAIN))
        return True

    def look_soon(self, place: int, now: float) -> None:
        """Look at this listener's workers at once."""
        self._acceptors[place].wake(now)

    def room_was_made(self, now: float) -> None:
        """A process somewhere has ended: who waits at the ceiling may go on."""
        for acceptors in self._acceptors:
            if acceptors.memory.at_ceiling:
                acceptors.wake(now)

    def look_soon_all(self, now: float) -> None:
        """Look at every listener's workers at once."""
        for acceptors in self._acceptors:
            acceptors.wake(now)

    def look_at_everything(self, now: float) -> None:
        """Rings were lost: find out what they would have said."""
        for slot in list(self.pool.unready):
            if self._was_ready(slot):
                self._came(slot)
        self.look_soon_all(now)

    def retarget(self, workers: int, now: float) -> None:
        """Want this many acceptors for each listener from now on; surplus ones go at once."""
        for acceptors in self._acceptors:
            acceptors.vacated += max(0, workers - acceptors.target)
            acceptors.target, acceptors.memory = workers, Memory()
            row = acceptors.row()
            view = acceptors.view(0, row)
            self._retire_some(acceptors, row, view.idle + view.starting - workers, now)
            acceptors.wake(now)

    def tend(self, now: float, live_elsewhere: int) -> None:
        """Do everything that is due."""
        if self._limbo_at is not None and self._limbo_at <= now:
            self._clear_limbo(now)
        if self._deaf_until is not None and self._deaf_until <= now:
            self._deaf_until = None
        for acceptors in self._acceptors:
            if acceptors.look_at is not None and acceptors.look_at <= now:
                acceptors.look_at = None
                if self.ready and not acceptors.retired:
                    self._look(acceptors, now, live_elsewhere)
        self.retiring.tend(now)
        if self.retiring.waiting:
            self.hung.looked(now)  # any of them may still take a connection
        self.hung.tend(now, time.monotonic_ns())
        self.killing.tend(now)
        self._cut_unready(now)
        if self._fork_server_hangs(now):
            log.event("fork_server_hung", generation=self.number)
            self._patience_at = None
            self.link.kill()
        self.tell()

    def tell(self) -> None:
        """Log the deaths of this turn: after their replacements were ordered, and before anybody is told otherwise."""
        while self._untold:
            self._untold.pop(0)()

    def _look(self, acceptors: Acceptors, now: float, live_elsewhere: int) -> None:
        acceptors.looked_at = now
        self.hung.looked(now)
        seen_before, acceptors.seen_ns = acceptors.seen_ns, time.monotonic_ns()
        self.board.order_words[scoreboard.LAST_LOOK] = acceptors.seen_ns
        quiet_until = max(self.trouble.until, self.fork_trouble.until, self._deaths.until)
        can_fork = self.link.pid is not None and not self.suspended and now >= quiet_until
        self.board.order_words[scoreboard.FORKS] = can_fork
        if self.suspended:
            return  # nobody is missing who is not wanted
        if not can_fork:
            self._look_without_forks(acceptors, now, quiet_until)
            return
        row = acceptors.true_row()
        if self.trouble.until_served and acceptors.latest(row, self._failed_ns):
            self.trouble = self._overcome(self.trouble)  # nobody rings for it while a load goes on
        room = policy.rooms(self.config.max_workers, self.targets, self.pool.live, live_elsewhere)[acceptors.place]
        if acceptors.note_tired() and live_elsewhere + self.live() <= self.config.max_workers:
            # At the ceiling, too, a replacement is there before the recycled worker leaves: one process more, for a moment.
            room = max(room, 1)
        view = self._with_queue(acceptors, acceptors.view(room, row, seen_before))
        acceptors.vacated = acceptors.come = 0
        acceptors.memory, decision = policy.decide(acceptors.memory, view, now, self.config.spare_timeout)
        self._note_episodes(acceptors, now)
        for _ in range(decision.fork):
            self._fork(acceptors.place, now)
        self._retire_some(acceptors, row, decision.retire, now)
        if self._tired:
            self._release_tired(acceptors, row, view, now)
        if decision.look_at is not None:
            acceptors.wake(decision.look_at)
        # Not in a calm load, where there is a look soon anyhow.
        if decision.ring_below > acceptors.ring_below and (decision.look_at is None or decision.look_at > now + policy.CALM_LOOK):
            acceptors.wake(now + SETTLE)
        acceptors.arm(decision.ring_below)

    def _look_without_forks(self, acceptors: Acceptors, now: float, quiet_until: float) -> None:
        """No worker can be forked. Those that are there serve on; that none of them accepts is told and counted."""
        if self.link.pid is not None:
            acceptors.wake(quiet_until)
        if not self.committed:
            return
        view = self._with_queue(acceptors, acceptors.view(0, acceptors.true_row()))
        wait = policy.ever_more_seldom(acceptors.memory)
        acceptors.memory = replace(acceptors.memory, wait=wait, due=now + wait, at_ceiling=False, saturated=False)
        why = "its fork server has ended" if self.link.pid is None else max(self.troubles(), key=lambda one: one.until).reason
        # One that leaves makes room, and nobody comes in its place.
        self._note_episodes(acceptors, now, why_stalled=why if policy.unserved(replace(view, leaving=0)) else None)
        if not view.idle + view.tired:
            acceptors.wake(now + wait)
        acceptors.arm(1)

    def _with_queue(self, acceptors: Acceptors, view: View) -> View:
        """How many clients wait, where that matters: nobody accepts, and there is no room for another worker."""
        if view.room > 0 or view.idle + view.tired:
            return view
        queue = self.listeners[acceptors.place].queue()
        return view if queue is None else replace(view, waiting=queue[0])

    def _release_tired(self, acceptors: Acceptors, row: bytes, view: View, now: float) -> None:
        # By the row that the view was made of: a worker may have ended its connection since, and would be of no kind.
        kinds: dict[int, list[int]] = {IDLE: [], PAUSED: [], BUSY: []}
        for slot in acceptors.tired():
            kinds.get(row[slot - acceptors.first], []).append(slot)  # any other starts, or has left by itself
        idle, waiting, busy = kinds[IDLE], kinds[PAUSED], kinds[BUSY]
        may = policy.released(view, Tired(len(idle), len(waiting), len(busy)))
        for slot in idle[: may.idle] + waiting[: may.waiting] + busy[: may.busy]:
            self._recycle(self.pool.workers[slot], now)

    def _recycle(self, worker: Worker, now: float) -> None:
        count = self._counts(worker.slot).begun
        log.event("recycled", slot=worker.slot, generation=self.number, pid=worker.pid, connections=count)
        self._ask_to_leave(worker, now, self.drain_deadline(now))

    def _tire(self, worker: Worker, since: float, now: float) -> None:
        """Have a worker leave, once another is there in its place, that may hold a client since then and does not serve it."""
        if worker.slot in self._tired:
            return
        log.event("computing", slot=worker.slot, generation=self.number, pid=worker.pid)
        self.retiring.holds_since[worker.slot] = since
        self._tired.add(worker.slot)
        self._absent.add(worker.slot)
        self._acceptors[worker.listener].vacated += 1
        self.look_soon(worker.listener, now)

    def drain_deadline(self, now: float) -> float | None:
        """Until when workers that are retired now may finish; None is as long as they take."""
        return now + self.config.drain_timeout if self.config.drain_timeout else None

    def _fork(self, place: int, now: float) -> None:
        worker = self.pool.take(place, now)
        if worker is None:
            return  # more slots than the ceiling: only with a fork server that lies about its children
        board, slot = self.board, worker.slot
        record = board.record(slot)
        board.words[record + scoreboard.PID] = 0
        board.words[record + scoreboard.STARTED] = 0
        counted = self._counted.get(slot, NOTHING)
        board.keep_account(slot, counted)  # what the worker goes on from
        board.restore(slot, counted)  # a stray write may have been here
        board.states[slot] = STARTING
        board.retire[slot] = 0
        self._denied.discard(slot)
        board.order_words[board.listener_word(place, scoreboard.HIGH)] = self.pool.high[place]
        self.link.send(Order.FORK, slot)

    def _note_episodes(self, acceptors: Acceptors, now: float, *, why_stalled: str | None = None) -> None:
        """Tell once, and count, that fewer than wanted can wait, and that clients do; ``why_stalled``: though there may be more."""
        episodes, memory, most = acceptors.episodes, acceptors.memory, self.config.max_workers
        address, workers = self.listeners[acceptors.place].address, acceptors.target

        def note(episode: Episode, begun: Callable[[], object], over: Callable[[float], object], *, is_so: bool) -> None:
            if is_so:
                if episode.begin(now):
                    begun()
            elif (seconds := episode.end(now)) is not None:
                over(seconds)
            elif episode.told is not None:
                acceptors.wake(episode.over_at)

        note(
            episodes.at_ceiling,
            lambda: log.event("ceiling_reached", max_workers=most, address=address, workers=workers),
            lambda seconds: log.event("ceiling_left", address=address, seconds=seconds),
            is_so=memory.at_ceiling,
        )
        note(
            episodes.saturated,
            lambda: log.event("saturated", max_workers=most, address=address),
            lambda seconds: log.event("unsaturated", address=address, seconds=seconds),
            is_so=memory.saturated,
        )
        note(
            episodes.stalled,
            lambda: log.event("stalled", address=address, reason=why_stalled),
            lambda seconds: log.event("unstalled", address=address, seconds=seconds),
            is_so=why_stalled is not None,
        )

    def _cut_unready(self, now: float) -> None:
        """Kill workers that have not come as far as accept() in time: what runs in them then is somebody's code."""
        for slot, worker in list(self.pool.unready.items()):
            if worker.since + self.config.boot_timeout > now:
                return
            del self.pool.unready[slot]
            # That it was not is read on the board, where others write, and its ring may have come before it was known.
            if not self._was_ready(slot) and not worker.killed and not self.retiring.is_in_accept(worker):
                self.retiring.kill(worker, now, f"not ready after boot_timeout = {self.config.boot_timeout:g} s")

    def _was_ready(self, slot: int) -> bool:
        return self.board.words[self.board.record(slot) + scoreboard.STARTED] != 0

    def _fork_server_hangs(self, now: float) -> bool:
        """One that does not carry out orders in time runs somebody's code, or is stopped: it is to be replaced."""
        if self.link.pid is None or self.link.killed:
            return False
        oldest = next(iter(self.pool.unborn.values()), None)
        late = oldest is not None and oldest.since + self.config.boot_timeout <= now
        return late or (self._patience_at is not None and self._patience_at <= now)

    def note_stop(self, pid: int, now: float, *, stopped: bool) -> None:
        """A child of ours was stopped or goes on: a fork server that stays stopped is replaced."""
        if pid == self.link.pid:
            self.link.stopped = stopped
            if stopped:
                self._patience_at = now + PATIENCE
            else:
                self._patience_at = now + self._time_to_leave if self._left else None

    # -- retiring

    def commit(self, now: float) -> None:
        """Open the gate: the workers that wait there go to accept()."""
        self.committed, self.committed_at = True, now
        self.link.open_gate()
        self.board.order_words[scoreboard.COMMITTED] = 1
        self.look_soon_all(now)

    @property
    def parked(self) -> bool:
        """Whether the first acceptors of every listener are ready."""
        return self.ready and all(
            acceptors.retired or acceptors.row().count(PARKED) >= acceptors.target for acceptors in self._acceptors
        )

    def retire(self, place: int, now: float, deadline: float | None) -> None:
        """Nobody accepts on this listener any more: idle workers leave at once, busy ones by ``deadline`` (None: whenever)."""
        acceptors = self._acceptors[place]
        if acceptors.retired:
            return
        acceptors.retire(now)
        acceptors.arm(0)
        self.hung.looked(now)  # nobody looks there again
        for worker in self.pool.workers.values():
            if worker.listener == place:
                self._ask_to_leave(worker, now, deadline)

    def retire_all(self, now: float, deadline: float | None) -> None:
        """The same for every listener."""
        for place in range(len(self.listeners)):
            self.retire(place, now, deadline)

    def suspend(self, now: float) -> None:
        """Nobody accepts until `resume`: idle workers leave at once, busy ones after their connection."""
        self.suspended = True
        for acceptors in self._acceptors:
            acceptors.arm(0)
            acceptors.memory = Memory()
            acceptors.episodes.stop(now)
        for worker in self.pool.workers.values():
            if not worker.retiring:
                self._ask_to_leave(worker, now, None)

    def resume(self, now: float) -> None:
        """Accept again."""
        self.suspended = False
        for acceptors in self._acceptors:
            acceptors.vacated, acceptors.memory = acceptors.target, Memory()
        self.look_soon_all(now)

    def reinstate(self, now: float) -> None:
        """Serve again after having been retired: those who were asked to leave do, and others are forked."""
        self.kept = False
        for acceptors in self._acceptors:
            acceptors.retired = False
        self.resume(now)

    def abandon(self, now: float) -> None:
        """Give up a generation that was never committed: none of its workers has ever accepted, so all can be killed."""
        self.retire_all(now, None)
        self.quit(now)

    def announce_stop(self) -> None:
        """From now on ``conn.stopping`` is true, and a closed listener no surprise; with drain = "eof" connections end now.

        Workers that end so are replaced like any other as long as the queue is served: at the ceiling they make room for it.
        """
        self.board.order_words[scoreboard.STOPPING] = 1
        self.retiring.end_inputs(self.pool.workers.values())

    def _retire_some(self, acceptors: Acceptors, row: bytes, count: int, now: float) -> None:
        """Ask ``count`` workers that the row shows idle to leave, the highest slots first, so that rows stay short."""
        if count <= 0:
            return
        for offset in reversed(range(len(row))):
            worker = self.pool.workers.get(acceptors.first + offset)
            if worker is None or worker.retiring or row[offset] in (BUSY, LEAVING):
                continue
            self._ask_to_leave(worker, now, self.drain_deadline(now))
            count -= 1
            if count == 0:
                return

    def _ask_to_leave(self, worker: Worker, now: float, deadline: float | None) -> None:
        self._absent.add(worker.slot)
        self._tired.discard(worker.slot)
        self.retiring.ask(worker, now, deadline)

    def quit(self, now: float) -> None:
        """Everybody at once, by one order."""
        for worker in self.pool.workers.values():
            worker.retiring = True
            self.killing.note(worker, now)
            if self.link.pid is None and worker.pid:
                self.link.kill_adopted(worker)
        if self.link.pid is not None:
            if self.ready and not self.link.stopped:
                self.link.send(Order.QUIT)
                if self.registered and not self._left:
                    self._left = True
                    self._patience_at = now + self._time_to_leave
            elif not self._left or self.link.stopped:
                self.link.kill()

    # -- the end

    def let_go(self, now: float) -> None:
        """Tell a fork server that nobody needs any more to leave. Who still serves is then the master's child."""
        if self.link.pid is None or self._left or not self.ready or self.kept:
            return
        if self.registered and self.pool.workers:
            return
        if all(acceptors.retired for acceptors in self._acceptors) and not self.retiring.prompt and not self.pool.unborn:
            self._left = True
            self.link.send(Order.LEAVE)
            self._patience_at = now + self._time_to_leave

    @property
    def _time_to_leave(self) -> float:
        """Seconds that a fork server may take once it was told: what the import has registered may take as long as the import."""
        return self.config.boot_timeout if self.registered else PATIENCE

    @property
    def finishes(self) -> bool:
        """Whether nothing is left of it but what its import has registered for the end, which is being run."""
        return self.registered and self._left and not self.pool.workers and self.link.pid is not None and not self.link.killed

    @property
    def accepts(self) -> bool:
        """Whether one that was asked to leave a moment ago may still be in accept(); who is late is not waited for."""
        return self.retiring.prompt

    def accepts_at(self, listener: Listener) -> bool:
        """The same for one listener."""
        return any(self.listeners[self.layout.listener(slot)] is listener for slot in self.retiring.waiting)

    @property
    def left(self) -> bool:
        """Whether the fork server was told to leave, so that its end is no accident."""
        return self._left

    @property
    def gone(self) -> bool:
        """No process of it is left."""
        return self.link.pid is None and not self.pool.workers

    def close(self) -> None:
        """Fold its counters into the tally and let go of its memory and descriptors."""
        for slot in self._slots():
            counts = self._counted.get(slot, NOTHING)
            self.tally.counts += counts
            durations = self.board.histogram(slot)
            if sum(durations) <= counts.orderly:  # else they were overwritten
                self.tally.histogram = [a + b for a, b in zip(self.tally.histogram, durations, strict=True)]
        self.tally.saturated += sum(its.saturated.total for its in self.episodes())
        self.tally.stalled += sum(its.stalled.total for its in self.episodes())
        self.link.close()
        log.event("drained", generation=self.number)

    def _slots(self) -> Iterator[int]:
        """Every slot that was ever used."""
        for place, high in enumerate(self.pool.high):
            yield from range(place * self.layout.capacity, place * self.layout.capacity + high)

    # -- what the master asks

    def pids(self) -> list[int]:
        """Its processes, as far as they are known."""
        return [pid for pid in (self.link.pid, *(worker.pid for worker in self.pool.workers.values())) if pid]

    def overdue(self, now: float) -> list[Overdue]:
        """Its workers that should have gone."""
        found = [("killed", late) for late in self.killing.overdue(now)]
        found += [("asked to leave", late) for late in self.retiring.overdue(now)]
        return [Overdue(worker.pid, worker.slot, self.number, seconds, what) for what, (worker, seconds) in found]

    def live(self) -> int:
        """Worker processes, ordered forks included."""
        return sum(self.pool.live)

    def count(self, state: int) -> int:
        """Workers in this state, whatever was asked of them."""
        return sum(self.board.row(place, high).count(state) for place, high in enumerate(self.pool.high))

    def settled(self) -> bool:
        """Whether every listener has as many acceptors as it can have, and nobody surplus by order is left."""
        if self.suspended:
            return not self.retiring.prompt
        return not self.retiring.prompt and all(
            acceptors.memory.at_ceiling
            or ((view := acceptors.view(0, acceptors.row())).idle + view.returning >= acceptors.target and not view.starting)
            for acceptors in self._acceptors
        )

    @property
    def at_ceiling(self) -> bool:
        """Whether the ceiling keeps a listener from having its acceptors."""
        return any(acceptors.memory.at_ceiling for acceptors in self._acceptors)

    def episodes(self) -> list[Episodes]:
        """For each listener, since when it is at the ceiling, saturated or stalled, and for how long it has been."""
        return [acceptors.episodes for acceptors in self._acceptors]

    def begun(self) -> int:
        """Connections so far, for a rate: as the workers say, without a check."""
        return sum(self.board.begun(place, high) for place, high in enumerate(self.pool.high))

    def accepted(self) -> Counts:
        """The sum of all slots' counters."""
        return sum(map(self._counts, self._slots()), NOTHING)

    def wake_at(self) -> float | None:
        """When to `tend` even without an event."""
        times = [acceptors.look_at for acceptors in self._acceptors if acceptors.look_at is not None] if self.ready else []
        rooms = self.retiring, self.hung, self.killing
        times += [at for room in rooms if (at := room.wake_at()) is not None]
        times += [at for at in (self._limbo_at, self._deaf_until, self._zombie_look_at) if at is not None]
        if self.link.pid is not None and not self.link.killed:  # as `_fork_server_hangs` has it
            if self._patience_at is not None:
                times.append(self._patience_at)
            oldest = next(iter(self.pool.unborn.values()), None)
            if oldest is not None:
                times.append(oldest.since + self.config.boot_timeout)
        oldest = next(iter(self.pool.unready.values()), None)
        if oldest is not None:
            times.append(oldest.since + self.config.boot_timeout)
        return min(times, default=None)


def _could_not_accept(status: int | None) -> bool:
    return status is not None and os.WIFEXITED(status) and os.WEXITSTATUS(status) == EXIT_CANT_ACCEPT
