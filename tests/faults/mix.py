"""What all strikes at random together need: a daemon that is prepared for each of them from its start, and the strikes that this
allows beside those of `tests.faults.strikes`. Each undoes its cause itself.

A run is of one of two kinds, by its seed. In an *exact* one daemon and clients have to have counted the same, and each failure is
that of a worker that died. In an *inexact* one a worker also writes garbage on the board, with which counters and names of peers
go until the next reload, and the queue is so short that bursts go past it, of which the kernel makes connections without a client.
"""

import errno
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import SkipTest

import psutil

from prefork.net.listener import ACCEPT_ERRORS
from tests import public, watch
from tests.faults import user_code
from tests.faults.arena import AND_FULL, Arena, Strike
from tests.faults.hostile import BURST, LONGEST_RETRY, MAX_WORKERS, PARTS, TOO_MUCH, burst, crowd
from tests.faults.machine import JUMPS, NO_MORE, SOMEBODY, MemoryGroup, faked_clock, memory_group, order, small_disk
from tests.faults.refusals import refusals
from tests.faults.strikes import BRIEFLY, CRASHES, STRIKES, crashing_code, reload
from tests.handlers.hostile import ORDER

MODULE = "from everything import loop\n"
WORKERS = 8
# The daemon at its ceiling comes by with less than half of the first; one worker that eats the second does not.
GROUP_MIB, EATEN_MIB = 256, 400
# Clients of a crowd: of an exact run, that the queue holds; of an inexact one, that it does not hold by far.
CROWD = 2_000
# Clients of the load and of strikes that may come meanwhile.
OTHERS = 32
BACKLOG = {True: 2_048, False: 64}
# Seconds in which code that crashes is taken back; every reload is on trial for so long, and none begins meanwhile.
TRIAL = 0.5
# No connection takes so long, but those that the load holds.
TIMEOUT = 20
# So many clients may fail of a trial: mostly four. But while the fork server or the master is stopped no end is known, and as many
# are forked as the ceiling allows (a new generation may exceed it by its acceptors); two ends do not take it back yet.
MOST_CRASHES = MAX_WORKERS + WORKERS + 2
# So many workers may end of what accept() has told them. Who has not served anybody counts as one that can't.
ENDING = 2
LONGEST_HEALING = 60.0
# Signals in a storm, and how long a moment without a reload is waited for.
STORM, LONGEST_QUEUE = 30, 3.0


@dataclass(slots=True)
class Preparation:
    """What a daemon is started with, and the strikes that this allows. ``left_out``: those that this machine does not, and why."""

    exact: bool
    workload: str
    log: str
    place: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    strikes: list[Strike] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    begin: list[Callable[[Arena], None]] = field(default_factory=list)
    end: list[Callable[[Arena], None]] = field(default_factory=list)

    def preload(self, environment: dict[str, str]) -> None:
        """Add to the environment; of libraries that are preloaded all are."""
        both = [found["LD_PRELOAD"] for found in (self.environment, environment) if "LD_PRELOAD" in found]
        self.environment |= environment | ({"LD_PRELOAD": ":".join(both)} if both else {})

    def add(self, *hits: Callable[[Arena], None]) -> None:
        """These strike, too."""
        self.strikes += [Strike(_name(hit), hit) for hit in hits]


def _name(hit: Callable[..., None]) -> str:
    return _name(hit.func) if isinstance(hit, partial) else hit.__name__


@contextmanager
def prepared(seed: int, workload: str | None = None) -> Iterator[Preparation]:
    """All that there is on this machine. The seed says which kind of run it is, where the log of connections goes, and which load
    there is unless it is given.
    """
    chance = random.Random(seed)
    preparation = Preparation(
        exact=chance.random() < 0.5, workload=workload or chance.choice(AND_FULL), log=chance.choice(("disk", "pipe"))
    )
    # That of `strikes` does not know of the trials that are lost because another strike has hit.
    preparation.strikes = [strike for strike in STRIKES.values() if strike not in (crashing_code, STRIKES["usr2"])]
    preparation.options = {
        "max_workers": MAX_WORKERS,
        "backlog": BACKLOG[preparation.exact],
        "canary": TRIAL,
        "boot_timeout": 1.5,
        "on_worker_start": "everything:start",
    }
    if preparation.workload in ("short", "full"):
        preparation.options["timeout"] = TIMEOUT
    with ExitStack() as stack:
        for needs in (_a_user, _memory, _refusals, _clock, _log_of_connections, _descriptors, _hostile_code, _crowds):
            try:
                needs(stack, preparation)
            except SkipTest as reason:
                preparation.left_out[needs.__name__.removeprefix("_")] = str(reason)
        preparation.add(crashing_module)
        yield preparation


def _scratch(stack: ExitStack, preparation: Preparation) -> Path:
    """A folder that the handlers' user can read, too."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=preparation.place)))
    folder.chmod(0o755)
    return folder


def _needed(program: str) -> None:
    if shutil.which(program) is None:
        assert os.environ.get("CI") != "true", f"{program} is not installed"
        raise SkipTest(f"{program} is not installed")


# -- a user of the handlers' own


def _a_user(stack: ExitStack, preparation: Preparation) -> None:
    preparation.place, environment = stack.enter_context(public.interpreter())
    preparation.preload(environment)
    preparation.options["user"] = str(SOMEBODY)
    # Handlers leave files there.
    preparation.begin.append(lambda ring: os.chown(ring.folder, SOMEBODY, SOMEBODY))
    preparation.add(partial(no_processes, threading.Lock()))


def no_processes(lock: threading.Lock, ring: Arena) -> None:
    """The fork server is at its RLIMIT_NPROC for a moment, and somebody has to be forked."""
    pid = ring.fork_server()
    with lock:
        if pid is None or not _limit(pid, "--nproc=1:"):
            return
        os.kill(ring.server.pid, signal.SIGTTIN)
        time.sleep(BRIEFLY)
        _limit(pid, "--nproc=4096:")


def _limit(pid: int, limit: str) -> bool:
    """Set a limit (prlimit(1)) of a process that may have gone, or be root's still. Whether it was set.

    By a process of its user: to root without CAP_SYS_RESOURCE it is not given (prlimit(2)).
    """
    try:
        user = psutil.Process(pid).uids().real  # /proc of a fork server is root's, who it may be
    except psutil.NoSuchProcess:
        return False
    command = ["prlimit", f"--pid={pid}", limit]
    done = subprocess.run(command, user=user, group=user, extra_groups=[], capture_output=True, text=True, check=False)
    assert done.returncode == 0 or re.search("No such process|Operation not permitted", done.stderr), done.stderr
    return done.returncode == 0


# -- memory


def _memory(stack: ExitStack, preparation: Preparation) -> None:
    group = stack.enter_context(memory_group(GROUP_MIB))
    memory = Memory(group)
    preparation.begin.append(lambda ring: group.add_all(ring.server.pid))
    preparation.add(memory.oom)
    preparation.end.append(memory.permit_others)


@dataclass(slots=True)
class Memory:
    """The control group, and how often it was to kill somebody."""

    group: MemoryGroup
    ordered: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def oom(self, ring: Arena) -> None:
        """A worker eats more than there is, and the kernel takes it."""
        with self.lock:
            before = self.group.kills()
            peer, answer = ring.converse(ORDER + f"eat {EATEN_MIB}".encode())
            assert answer == b"", answer
            if self.group.kills() > before:
                self.ordered += 1
            else:
                ring.lost.append(peer)  # another strike was faster

    def permit_others(self, ring: Arena) -> None:
        """Seldom the kernel takes a second one before the first has given its memory back (`tests.faults.machine.oom`).

        How seldom depends on what else runs: 7 in 176 at a load of 28.
        """
        others = self.group.kills() - self.ordered
        ring.figures["others_killed_for_memory"] = others
        ring.permit("another victim of oom", others)


# -- accepts and forks that fail


def _refusals(stack: ExitStack, preparation: Preparation) -> None:
    _needed("cc")
    orders = stack.enter_context(refusals(_scratch(stack, preparation)))
    preparation.preload(orders.environment)
    accepts, forks, late, held = (threading.Lock() for _ in range(4))
    errors = [*filter(None, ACCEPT_ERRORS), errno.EIO]  # without those that this system does not have

    def accepts_fail(ring: Arena) -> None:
        """For a moment, in a way of the table or in another."""
        number = ring.chance.choice(errors)
        ends = number in (errno.ENOTSOCK, errno.EBADF, errno.EMFILE, errno.EIO)
        with accepts:
            orders.accepts(number, ENDING if ends else ring.chance.randint(1, 3 * WORKERS))
            time.sleep(BRIEFLY)
            orders.accepts(0, 0)

    def forks_fail(ring: Arena) -> None:
        """For a moment, in the fork server or in the master, and both have to."""
        pid = ring.chance.choice((ring.fork_server(), ring.server.pid))
        if pid is None:
            return
        with forks:
            orders.forks(pid, ring.chance.choice((errno.EAGAIN, errno.ENOMEM, errno.ENOSYS)), ring.chance.randint(1, 4))
            os.kill(ring.server.pid, signal.SIGTTIN)
            os.kill(ring.server.pid, signal.SIGHUP)
            time.sleep(BRIEFLY)
            orders.forks(0, 0, 0)

    def late_accepts(ring: Arena) -> None:
        """For a moment each accept is entered late."""
        with late:
            orders.late(ring.chance.choice((1, 10, 100)))
            time.sleep(BRIEFLY)
            orders.late(0)

    def held_accepts(ring: Arena) -> None:
        """For a moment each accept comes back late with what it has got."""
        with held:
            orders.held(ring.chance.choice((1, 10, 100)))
            time.sleep(BRIEFLY)
            orders.held(0)

    preparation.add(accepts_fail, forks_fail, late_accepts, held_accepts)


# -- the clock


def _clock(stack: ExitStack, preparation: Preparation) -> None:
    _needed("faketime")
    _needed("cc")
    file, environment = faked_clock(_scratch(stack, preparation))
    preparation.preload(environment)
    lock = threading.Lock()

    def put(jump: str) -> None:
        following = file.with_name("next")  # whoever looks finds one of the two
        following.write_text(jump)
        following.rename(file)

    def clock(ring: Arena) -> None:
        """The wall clock is set, and put right again."""
        with lock:
            put(ring.chance.choice(JUMPS))
            time.sleep(BRIEFLY)
            put("+0")

    preparation.add(clock)


# -- the log: of connections only, because the checks read the other


def _log_of_connections(stack: ExitStack, preparation: Preparation) -> None:
    if preparation.log == "disk":
        disk = stack.enter_context(small_disk())
        preparation.options["access_log"] = f"{disk}/access"
        preparation.add(partial(full_log_disk, disk, threading.Lock()))
    else:
        # The user's, who may open it again then.
        pipe = Pipe(_scratch(stack, preparation) / "pipe", int(preparation.options.get("user", os.getuid())))
        stack.callback(pipe.close)
        preparation.options["access_log"] = str(pipe.path)
        preparation.add(pipe.log_is_read, pipe.reader_dies)


def full_log_disk(disk: Path, lock: threading.Lock, ring: Arena) -> None:
    """The disk of the log is full for a moment."""
    with lock:
        with suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        assert os.statvfs(disk).f_bavail == 0
        before = ring.connections
        time.sleep(BRIEFLY)
        (disk / "filler").unlink()
        os.truncate(disk / "access", 0)
        ring.figures["served_with_a_full_disk"] = ring.figures.get("served_with_a_full_disk", 0) + ring.connections - before


class Pipe:
    """The log's pipe. Nobody reads it, unless a strike does, so it is full soon."""

    def __init__(self, path: Path, user: int) -> None:
        os.mkfifo(path)
        os.chown(path, user, user)
        self.path = path
        self.lock = threading.Lock()
        self.reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    def close(self) -> None:
        """It is not read any more."""
        os.close(self.reader)

    def log_is_read(self, ring: Arena) -> None:
        """All that there is, for a moment."""
        end = time.monotonic() + BRIEFLY
        with self.lock:
            while (left := end - time.monotonic()) > 0 and _happens(self.reader, select.POLLIN, left):
                with suppress(BlockingIOError):  # nobody had it open to write, and somebody has now
                    ring.figures["log_bytes"] = ring.figures.get("log_bytes", 0) + len(os.read(self.reader, 1 << 20))

    def reader_dies(self, _ring: Arena) -> None:
        """And another one comes."""
        with self.lock:
            os.close(self.reader)
            time.sleep(BRIEFLY)
            self.reader = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)


def _happens(fd: int, event: int, seconds: float) -> bool:
    poll = select.poll()  # select(2) takes no number beyond 1023
    poll.register(fd, event)
    return bool(poll.poll(seconds * 1000))


# -- descriptors


def _descriptors(stack: ExitStack, preparation: Preparation) -> None:
    _needed("prlimit")
    # One lock for both: who raises the limits of workers that were forked meanwhile raises those of all. And one with the
    # upgrade: a program that has no descriptors for its libraries can't be executed, and nobody can go back to the one before.
    descriptors, upgrades = threading.Lock(), threading.Lock()

    def no_descriptors_in_workers(ring: Arena) -> None:
        """All workers are at their RLIMIT_NOFILE for a moment."""
        with descriptors:
            pids = ring.worker_pids()
            before = {pid: limits for pid in pids if (limits := _nofile(pid)) and _limit(pid, f"--nofile={NO_MORE}:")}
            time.sleep(BRIEFLY)
            for pid, soft in before.items():
                _limit(pid, f"--nofile={soft}:")

    def no_descriptors_in_master(ring: Arena) -> None:
        """The master is at its RLIMIT_NOFILE for a moment, and has to reload."""
        with descriptors, upgrades:
            watch.until("no upgrade is under way", lambda: ring.server.status()["state"] != "upgrading")
            pid = ring.server.pid
            limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (NO_MORE, limits[1]))
            os.kill(pid, signal.SIGHUP)
            time.sleep(BRIEFLY)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
            for child in watch.family(pid):  # who was forked in the meantime
                if _nofile(child.pid) == NO_MORE:
                    _limit(child.pid, f"--nofile={limits[0]}:")

    def usr2(ring: Arena) -> None:
        """An upgrade."""
        with upgrades:
            os.kill(ring.server.pid, signal.SIGUSR2)
            # Whoever asks next is told of it: signals are obeyed after those who have asked in the same turn.
            ring.server.status()

    def upgrade(ring: Arena) -> None:
        """One that is not refused because of a reload under way, if there is a moment without one."""
        end = time.monotonic() + LONGEST_QUEUE
        while time.monotonic() < end:
            with ring.module_lock, upgrades:
                if ring.server.command("upgrade")["ok"]:
                    return

    def signal_storm(ring: Arena) -> None:
        """Reloads, upgrades and scaling, faster than anybody can."""
        for _ in range(STORM):
            signo = ring.chance.choice((signal.SIGHUP, signal.SIGUSR2, signal.SIGTTIN, signal.SIGTTOU))
            if signo == signal.SIGUSR2:
                usr2(ring)
            else:
                os.kill(ring.server.pid, signo)
            time.sleep(ring.chance.choice((0.0, 0.001, 0.01)))

    preparation.add(no_descriptors_in_workers, no_descriptors_in_master, usr2, upgrade, signal_storm)


def _nofile(pid: int) -> int | None:
    """The soft limit; None of a process that has gone."""
    with suppress(FileNotFoundError, ProcessLookupError):
        found = re.search(r"^Max open files +(\d+)", Path(f"/proc/{pid}/limits").read_text(), re.MULTILINE)
        return int(found[1]) if found else None
    return None


# -- hostile code


def _hostile_code(stack: ExitStack, preparation: Preparation) -> None:
    preparation.add(garbage_on_the_doorbell, partial(full_doorbell, threading.Lock()), lies_on_the_channel)
    preparation.add(*user_code.EXACT)
    preparation.end.append(no_more_lies)
    if not preparation.exact:
        preparation.add(garbage_on_the_board, *user_code.INEXACT)
        preparation.end.append(put_totals_right)


def garbage_on_the_doorbell(ring: Arena) -> None:
    """Random bytes and forged records where workers ring."""
    order(ring, "ring 300")


def full_doorbell(lock: threading.Lock, ring: Arena) -> None:
    """The master is stopped for a moment, and the workers' pipe is full."""
    with lock:
        os.kill(ring.server.pid, signal.SIGSTOP)
        # It goes on by itself: perhaps nobody but the master can get somebody who takes the order.
        later = threading.Timer(BRIEFLY, os.kill, (ring.server.pid, signal.SIGCONT))
        later.start()
        try:
            order(ring, "ring 100000")
        finally:
            later.join()


def lies_on_the_channel(ring: Arena) -> None:
    """The fork server says nonsense before its next fork; too much of it, and it is replaced."""
    (ring.folder / "lies").write_text(str(ring.chance.choice((100, TOO_MUCH))))
    os.kill(ring.server.pid, signal.SIGTTIN)


def no_more_lies(ring: Arena) -> None:
    """Of a fork server that had nobody to fork."""
    (ring.folder / "lies").unlink(missing_ok=True)


def garbage_on_the_board(ring: Arena) -> None:
    """Random bytes over a part of the generation's board."""
    order(ring, f"spoil {ring.chance.choice(PARTS)} {2 * MAX_WORKERS}")


def put_totals_right(ring: Arena) -> None:
    """By a reload: a board's counters end with its generation."""
    reloaded(ring)


# -- crowds


def _crowds(stack: ExitStack, preparation: Preparation) -> None:
    lock = threading.Lock()  # a crowd raises our own limit of descriptors, and puts it back
    preparation.add(partial(silent_clients, lock))
    if not preparation.exact:
        preparation.options["socket_timeout"] = 5  # for connections without a client (`tests.faults.hostile.syn_burst`)
        preparation.add(partial(syn_burst, lock))


def silent_clients(lock: threading.Lock, ring: Arena) -> None:
    """A crowd that says nothing, and leaves after a moment."""
    with lock:
        if ring.exact:
            # Else the kernel tells clients that they are connected, and has no place for them: nobody will accept those.
            room = BACKLOG[True] - CROWD - OTHERS
            watch.until("the queue is empty", lambda: ring.server.status()["listeners"][0]["queue"] <= room, LONGEST_HEALING)
        _be_silent(ring)


def _be_silent(ring: Arena) -> None:
    with crowd(ring.server, CROWD) as clients:
        if ring.exact:
            for client in clients:
                assert _happens(client.fileno(), select.POLLOUT, LONGEST_RETRY), "not connected"
            ring.silent += CROWD
        time.sleep(BRIEFLY)


def syn_burst(lock: threading.Lock, ring: Arena) -> None:
    """More clients at once than the queue holds: each is served, but for those whose worker dies."""
    with lock:
        burst(ring, BURST)


# -- code that crashes


def crashing_module(ring: Arena) -> None:
    """A reload to code that crashes at each connection, beside everything else that happens to its trial.

    It is taken back, or refused, unless the way back has died meanwhile, or nobody was served long enough to crash three
    times: then it serves, as it is told, until the next reload. So it does if a dead fork server is replaced meanwhile, which
    imports what is there and is not on trial.
    """
    with ring.module_lock:
        lost, served, crashed, undone = (_count(ring, what) for what in (LOST, SERVES, CRASHED, UNDONE))
        ring.write_module(CRASHES, last="")
        over = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            # A crowd may be before it in the queue, of which crashing code ends 40 a second: better code does not wait for it.
            asking = pool.submit(_ask_again_and_again, ring, over)
            try:
                answer = reload(ring)
            finally:
                over.set()
            if answer["ok"]:
                passed = re.search(
                    rf"generation {answer['generation']} has passed its trial, with ([02] crashes|1 crash)", ring.log()
                )
                assert passed or _count(ring, LOST) > lost, f"code that crashes serves: {answer}"
            trials = _count(ring, UNDONE) - undone
            if trials == _count(ring, SERVES) - served:  # each generation that has served this was taken back
                found = _count(ring, CRASHED) - crashed
                assert found <= MOST_CRASHES * trials, f"{found} crashed in {trials} trials: {answer}"
            ring.write_module()
            reloaded(ring)
        asking.result()


def _ask_again_and_again(ring: Arena, over: threading.Event) -> None:
    while not over.is_set():  # held connections do not crash
        ring.ask(b"hello")
        time.sleep(0.01)


LOST = "the reload can't be taken back any more"
SERVES = " serves mine:loop ("
UNDONE = " taken back, generation "
CRASHED = ") died: signal 6 (SIGABRT), serving "


def _count(ring: Arena, text: str) -> int:
    return ring.log().count(text)


def permit_crashes(ring: Arena) -> None:
    """Nothing but the crashing code is ended by SIGABRT, each with the client that it serves."""
    ring.permit("crashed", _count(ring, CRASHED) + _count(ring, ") died: not told by its dead fork server, serving "))


def tell_events(ring: Arena) -> None:
    """What the log says of the strikes' effects, for the figures."""
    said = {
        "upgrades": " goes on where prefork ",
        "generations": SERVES,
        "taken_back": UNDONE,
        "refused": " keeps serving: ",
        "fork_servers_died": " its workers serve on\n",
        "forks_failed": "fork failed: ",
        "accepts_failed": "accept failed",
        "lies": " made no sense and w",
        "could_not_accept": " could not accept any more and is replaced",
        "listener_undone": " on the listening socket, which all share: undone",
        "backed_off": " in a row, next try in ",
        "floods": "a flood of ",
        "at_the_ceiling": f"max_workers = {MAX_WORKERS} reached on ",
        "died": ") died: ",
    }
    ring.figures["events"] = {what: _count(ring, text) for what, text in said.items()}


def reloaded(ring: Arena) -> None:
    """Have a reload succeed; that it is refused, or taken back, may be of another strike."""
    answers: list[dict[str, Any]] = []

    def look() -> bool:
        answers.append(reload(ring))
        return bool(answers[-1]["ok"])

    try:
        watch.until("a reload succeeds", look, LONGEST_HEALING)
    except AssertionError as error:
        raise AssertionError(f"{error}: {json.dumps(answers)}") from None
