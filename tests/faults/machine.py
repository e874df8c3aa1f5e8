"""Faults of the machine: what it has no more of, what it refuses, and its clock. Each heals at once when the cause has gone."""

import errno
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest import SkipTest

from prefork.errors import REMEDIES
from prefork.net.listener import ACCEPT_ERRORS
from prefork.pool import policy
from tests import public, watch
from tests.faults import strikes
from tests.faults.arena import HANDLERS, Arena, Fault, Figures, Rounds, arena
from tests.faults.refusals import Refusals, compiled, refusals
from tests.handlers.hostile import ORDER

HOSTILE = (HANDLERS / "hostile.py").read_text()
# How long acceptors may need once the cause has gone: the longest wait for a fork, and a busy machine.
HEALED = policy.FORK_BACKOFF_LIMIT + 1.0


def order(ring: Arena, text: str, *, may_be_cut: bool = False) -> str:
    """Have an order carried out by whichever worker takes it. An empty text when that cost the connection."""
    return ring.ask(ORDER + text.encode(), may_be_cut=may_be_cut).decode()


def healed(ring: Arena, is_well: Callable[[], bool]) -> float:
    """Seconds until it is well; in a campaign they must not be more than HEALED."""
    begun = time.monotonic()
    watch.until("it is well", is_well)
    took = time.monotonic() - begun
    assert took < HEALED or not ring.alone, f"healed {took:.2f} s after the cause had gone\n{ring.log()}"
    return round(took, 3)


def _short_of(ring: Arena) -> int:
    """How many acceptors are missing, the busy ones counted as about to be back."""
    workers = ring.server.status()["listeners"][0]["workers"]
    return max(0, int(workers["target"] - workers["idle"] - workers["busy"]))


def _verdict(ring: Arena, reason: str) -> None:
    """Wait until the status says that it backs off from this."""
    watch.until(f"backing off: {reason}", lambda: reason in ((ring.server.status()["backoff"] or {}).get("reason", "")))


# -- memory

# The daemon and its workers come by with a fraction of the first; one worker that eats the second does not.
GROUP_MIB, EATEN_MIB = 96, 400


class MemoryGroup:
    """A control group of the memory controller, of either version, with a limit."""

    def __init__(self, folder: Path, limit: str, events: str) -> None:
        self.folder, self.limit, self.events = folder, limit, events

    def add(self, pid: int) -> None:
        """Put a process there; its children are born there."""
        with suppress(ProcessLookupError):  # it has left meanwhile
            (self.folder / "cgroup.procs").write_text(str(pid))

    def add_all(self, pid: int) -> None:
        """Put a daemon there."""
        self.add(pid)
        for _ in range(2):  # a worker may be forked before its fork server is there
            for child in watch.family(pid):
                self.add(child.pid)

    def kills(self) -> int:
        """How often the limit has killed somebody."""
        lines = dict(line.split() for line in (self.folder / self.events).read_text().splitlines())
        return int(lines["oom_kill"])


@contextmanager
def memory_group(mebibytes: int) -> Iterator[MemoryGroup]:
    """A group of our own. SkipTest where this machine lets us make none."""
    root, version1 = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")
    try:
        if (version1 / "memory.limit_in_bytes").exists():
            group = MemoryGroup(version1 / f"prefork-fault-{os.getpid()}", "memory.limit_in_bytes", "memory.oom_control")
        elif "memory" in (root / "cgroup.subtree_control").read_text():
            group = MemoryGroup(root / f"prefork-fault-{os.getpid()}", "memory.max", "memory.events")
        else:
            raise SkipTest("no memory controller for groups of ours")
        group.folder.mkdir()
    except OSError as error:
        raise SkipTest(f"no control group can be made: {error}") from None
    try:
        (group.folder / group.limit).write_text(str(mebibytes << 20))
        yield group
    finally:
        watch.until("the group can go", lambda: _removed(group.folder))


def _removed(folder: Path) -> bool:
    with suppress(OSError):  # who has ended may still be charged for something
        folder.rmdir()
    return not folder.exists()


def _sigkills(ring: Arena) -> int:
    return ring.log().count(" died: signal 9 (SIGKILL), serving ")


def oom(rounds: Rounds, workload: str) -> Figures:
    """The daemon's control group is out of memory because of one worker: the kernel takes that one, and nobody else is lost.

    Seldom (0 to 3 times in 100) it takes another process, too, before the first has given its memory back: that may cost a client.
    """
    with memory_group(GROUP_MIB) as group, arena(workload, rounds=rounds, module=HOSTILE) as ring:
        group.add_all(ring.server.pid)
        for number in rounds:
            before = group.kills()
            assert order(ring, f"eat {EATEN_MIB}", may_be_cut=True) == "", "nobody was killed"
            assert group.kills() > before, "it was not the limit"
            watch.until("each death is known", lambda: number < _sigkills(ring) == group.kills())  # noqa: B023 - asked here only
        others = group.kills() - rounds.done
        assert others <= 1 + rounds.done // 50 or not ring.alone, f"{others} others were killed"
        ring.permit("another victim", others)
    return ring.figures


# -- descriptors

# No new descriptor is below it: each system call that wants one fails, and what is open stays open.
NO_MORE = 3


def no_descriptors_in_workers(rounds: Rounds, workload: str) -> Figures:
    """Every worker is at its RLIMIT_NOFILE: each leaves, after one more connection at most, and is replaced; no client is lost."""
    took = []
    with arena(workload, rounds=rounds) as ring:
        for _ in rounds:
            ring.serves(20 * ring.workers)  # one that has served no client would be backed off from
            struck = [pid for pid in ring.worker_pids() if _gets_no_more(pid)]
            watch.until("all have left", lambda struck=struck: all(map(watch.is_gone, struck)))  # type: ignore[misc]
            took.append(healed(ring, lambda: _serves(ring)))
        assert "could not accept any more and is replaced: exit status 71: accept failed: Too many open files" in ring.log()
    return ring.figures | {"healed_worst": max(took)}


def _gets_no_more(pid: int) -> bool:
    """Let a worker have no more descriptors. False of one that has gone."""
    try:
        _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (NO_MORE, hard))
    except ProcessLookupError:
        return False  # it was surplus
    return True


def _serves(ring: Arena) -> bool:
    """Somebody new is served, sooner or later."""
    assert ring.ask(b"hello") == b"hello"
    return True


def no_descriptors_in_master(rounds: Rounds, workload: str) -> Figures:
    """The master is at its RLIMIT_NOFILE: commands wait, a reload is refused with the reason, and clients notice nothing."""
    took = []
    with arena(workload, rounds=rounds) as ring:
        pid = ring.server.pid
        limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        for number in rounds:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (NO_MORE, limits[1]))
            os.kill(pid, signal.SIGHUP)
            refused = "can't start a fork server: Too many open files: see RLIMIT_NOFILE (ulimit -n)"
            ring.logged(refused, times=number + 1)
            with socket.socket(socket.AF_UNIX) as command:
                command.connect(ring.server.control)
                command.sendall(b'{"command": "status"}\n')
                ring.logged("control client refused: Too many open files", times=number + 1)
                resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
                command.settimeout(HEALED if ring.alone else watch.DEADLINE)
                assert b'"ok": true' in command.recv(65536)
            took.append(healed(ring, lambda: bool(ring.server.command("reload")["ok"])))
    return ring.figures | {"healed_worst": max(took)}


# -- forks and accepts that fail


@contextmanager
def refusing(rounds: Rounds, workload: str) -> Iterator[tuple[Arena, Refusals]]:
    """An arena whose accepts and forks fail when they are told to."""
    with (
        tempfile.TemporaryDirectory() as folder,
        refusals(Path(folder)) as orders,
        arena(workload, rounds=rounds, spare_timeout=3, environment=orders.environment) as ring,
    ):
        yield ring, orders


# What is promised of each (accept(2)), so that nobody can change the table alone.
RETRIED = "ECONNABORTED EPROTO ENETDOWN ENETUNREACH EHOSTDOWN EHOSTUNREACH ENONET ENOPROTOOPT EOPNOTSUPP ETIMEDOUT EPERM EAGAIN"
WAITED_OUT = "ENFILE ENOBUFS ENOMEM"
LOOKED_AT = "EINVAL"  # by the master, which finds nothing wrong with the listener
LEFT = "EMFILE"
ENDED = "ENOTSOCK EBADF"


def accept_errors(rounds: Rounds, workload: str) -> Figures:
    """accept() fails in every way there is: each is retried, waited out, or ends a worker, and no client is lost."""
    names = f"{RETRIED} {WAITED_OUT} {LOOKED_AT} {LEFT} {ENDED}".split()
    assert {getattr(errno, name) for name in names} == set(ACCEPT_ERRORS)
    with refusing(rounds, workload) as (ring, orders):
        for _ in rounds:
            for name in names:
                _fail_accepts(ring, orders, name)
    return ring.figures | {"errors": len(names)}


def _fail_accepts(ring: Arena, orders: Refusals, name: str) -> None:
    # Few where a worker that met them all would say so.
    number, count = getattr(errno, name), 20 if name in f"{RETRIED} {WAITED_OUT}" else 2
    before = len(ring.log())
    exited = ring.server.status()["totals"]["exited"]
    orders.accepts(number, count)
    watch.until(f"all have met {name}", lambda: orders.left == 0)
    watch.until("nobody is missing", lambda: _short_of(ring) == 0)

    def said(text: str) -> int:
        return ring.log()[before:].count(text)

    if name in WAITED_OUT:
        paused = f"accept failed: {os.strerror(number)}: {REMEDIES[number]}; trying again every 0.1 s"
        watch.until(f"all accept again after {name}", lambda: said("accept works again") == said(paused) > 0)
    elif name in LEFT:
        watch.until("they have left", lambda: ring.server.status()["totals"]["exited"] >= exited + count)
        assert "exit status 71: accept failed: Too many open files" in ring.log()[before:]
    elif name in ENDED:
        watch.until("it is told", lambda: said(f"accept failed: OSError: [Errno {number}]") == count)
        watch.until("they have ended", lambda: ring.server.status()["totals"]["exited"] >= exited + count)
    else:
        assert said("accept") == 0, ring.log()


def unknown_accept_errors(rounds: Rounds, workload: str) -> Figures:
    """accept() fails in a way that is not in the table: workers end loudly and are replaced, ever more seldom, until it works."""
    assert errno.EIO not in ACCEPT_ERRORS
    with refusing(rounds, workload) as (ring, orders):
        for _ in rounds:
            # Twice as many as there are: those who have served somebody are replaced at once, those who have not are not.
            orders.accepts(errno.EIO, 4 * ring.workers)
            _verdict(ring, "a worker ended before it served anybody: exit status 70")
            watch.until("all have met it", lambda: orders.left == 0, 2 * watch.DEADLINE)
            ring.recovered()
            watch.until("nothing is backed off from", lambda: ring.server.status()["backoff"] is None)
        log = ring.log()
        assert "accept failed: OSError: [Errno 5] Input/output error; this worker ends and is replaced" in log
        assert "workers start again, after" in log
    return ring.figures


# Longer than a reload takes.
LATE_MS = 500


def late_accepts(rounds: Rounds, workload: str) -> Figures:
    """Workers are told to leave just before they enter accept(), where a signal is not seen any more: it is repeated."""
    with refusing(rounds, workload) as (ring, orders):
        orders.late(LATE_MS)
        for _ in rounds:
            for _ in range(2):  # the second retires whom the first has just let in
                generation = ring.generation()
                strikes.hup(ring)
                ring.replaced(generation)
            watch.until("who was told has left", lambda: not watch.workers(ring.server, "retiring"))
    return ring.figures


# Long enough that most connections are in such hands at any time.
HELD_MS = 50


def held_accepts(rounds: Rounds, workload: str) -> Figures:
    """Workers are told to leave when accept() has a connection for them of which they do not know yet: they serve it first."""
    with refusing(rounds, workload) as (ring, orders):
        for _ in rounds:
            generation = ring.generation()
            orders.held(HELD_MS)
            ring.serves(2 * ring.workers)  # now others are in such hands
            strikes.hup(ring)
            ring.replaced(generation)
            orders.held(0)
    return ring.figures


def _forks_again(ring: Arena, times: int) -> bool:
    return ring.log().count("workers start again, after") >= times


def fork_errors(rounds: Rounds, workload: str) -> Figures:
    """fork() fails, in the fork server and in the master: it is said, and heals within a second of the cause."""
    took = []
    failures = 4
    with refusing(rounds, workload) as (ring, orders):
        for number in rounds:
            failure = (errno.EAGAIN, errno.ENOMEM, errno.ENOSYS)[number % 3]
            reason, remedy = os.strerror(failure), REMEDIES[failure].format(call="fork")
            pid = ring.fork_server()
            assert pid is not None
            orders.forks(pid, failure, failures)
            os.kill(ring.server.pid, signal.SIGTTIN)
            _verdict(ring, f"fork failed: {reason}")
            watch.until("all have failed", lambda: orders.left == 0)
            took.append(healed(ring, partial(_forks_again, ring, number + 1)))
            os.kill(ring.server.pid, signal.SIGTTOU)
            orders.forks(ring.server.pid, failure, 1)
            answer = ring.server.command("reload")
            assert answer["reason"].startswith(f"can't start a fork server: {reason}: {remedy}"), answer
            assert ring.server.command("reload")["ok"]
    return ring.figures | {"healed_worst": max(took)}


BOOTS_FAIL = """
import os
os.register_at_fork(after_in_child=lambda: os._exit(3) if os.path.exists("broken") else None)
"""


def failing_boots(rounds: Rounds, workload: str) -> Figures:
    """Workers die before they are ready: ever fewer are forked and it is said why; a reload with the cause gone heals at once."""
    took = []
    with arena(workload, rounds=rounds, first=BOOTS_FAIL) as ring:
        for number in rounds:
            broken = ring.folder / "broken"
            broken.touch()
            os.kill(ring.server.pid, signal.SIGTTIN)
            _verdict(ring, "a worker died before it was ready: exit status 3")
            ring.logged("2 in a row, next try in 2.2 s", times=number + 1)
            broken.unlink()
            os.kill(ring.server.pid, signal.SIGHUP)
            took.append(healed(ring, lambda: ring.server.status()["backoff"] is None and _short_of(ring) == 0))
    return ring.figures | {"healed_worst": max(took)}


# A user whom nobody else is: the limit counts all processes of a user.
SOMEBODY = 64_321


def no_processes(rounds: Rounds, workload: str) -> Figures:
    """The handlers' user is at its RLIMIT_NPROC: forks fail, it is said, and acceptors are back at once when it is raised."""
    took = []
    with (
        public.interpreter() as (place, environment),
        arena(workload, rounds=rounds, place=place, user=str(SOMEBODY), environment=environment) as ring,
    ):
        for number in rounds:
            pid = ring.fork_server()
            assert pid is not None
            _limit_processes(pid, "1:")
            os.kill(ring.server.pid, signal.SIGTTIN)
            _verdict(ring, "fork failed: Resource temporarily unavailable")
            ring.logged("kernel.threads-max; 4 in a row", times=number + 1)
            _limit_processes(pid, "4096:")
            took.append(healed(ring, partial(_forks_again, ring, number + 1)))
            assert ring.server.command("reload")["ok"]
    return ring.figures | {"healed_worst": max(took)}


def _limit_processes(pid: int, limit: str) -> None:
    """Of a process of theirs: to root without CAP_SYS_RESOURCE it is not given (prlimit(2))."""
    command = ["prlimit", f"--pid={pid}", f"--nproc={limit}"]
    subprocess.run(command, user=SOMEBODY, group=SOMEBODY, extra_groups=[], check=True)


# -- the clock

JUMPS = ("+400d", "-400d", "+0", "+3h", "-3h")


def clock(rounds: Rounds, workload: str) -> Figures:
    """The wall clock is set back and forth, for the daemon alone: nobody is cut or recycled, and nothing is late or early."""
    watch.needs("faketime")
    with tempfile.TemporaryDirectory() as folder:
        file, environment = faked_clock(Path(folder))
        limits: dict[str, Any] = {"max_lifetime": "1h", "socket_timeout": "1h", "drain_timeout": "1h"}
        begun = time.monotonic()
        with arena(workload, rounds=rounds, module=HOSTILE, environment=environment, **limits) as ring:
            for number in rounds:
                jump = JUMPS[number % len(JUMPS)]
                file.write_text(jump)
                told = float(order(ring, "clock"))
                assert abs(told - time.time() - _seconds(jump)) < 60, f"{jump} was not seen"
                command = [sys.executable, "-m", "prefork", "status", "--json", f"--control={ring.server.control}"]
                status = json.loads(subprocess.check_output(command, env={**os.environ, **environment}))
                assert (status["state"], status["backoff"]) == ("running", None), status
                assert 0 <= status["uptime"] <= time.monotonic() - begun, status["uptime"]
                assert ring.server.command("scale", workers=str(ring.workers + number % 2))["ok"]
                if number % 4 == 3:
                    assert ring.server.command("reload")["ok"]
            assert " is killed" not in ring.log()
    return ring.figures


def faked_clock(folder: Path) -> tuple[Path, dict[str, str]]:
    """With this environment a daemon's time of day is what this file says, as a distance from ours."""
    file = folder / "faketime"
    file.write_text("+0")
    sleep = compiled(Path(__file__).with_name("sleep.c"), folder)
    return file, {
        "LD_PRELOAD": f"{sleep}:{next(Path('/usr/lib').glob('*/faketime/libfaketime.so.1'))}",
        "FAKETIME_TIMESTAMP_FILE": str(file),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",
    }


def _seconds(jump: str) -> int:
    units = {"d": 86400, "h": 3600, "0": 1}
    return int(jump[:-1] or 0) * units[jump[-1]] if jump[-1] in "dh" else 0


# -- the log


def _tell(ring: Arena, times: int) -> None:
    """Have the master log something."""
    for number in range(times):
        assert ring.server.command("scale", workers=str(ring.workers + 1 - number % 2))["ok"]


def full_log_disk(rounds: Rounds, workload: str) -> Figures:
    """The disk of the log is full: lines are dropped and counted, nobody waits, and it goes on when there is room."""
    with small_disk() as disk, arena(workload, rounds=rounds, log_file=f"{disk}/log", access_log=f"{disk}/access") as ring:
        dropped = 0
        for _ in rounds:
            watch.until("it is full", lambda: os.statvfs(disk).f_bavail == 0)
            _tell(ring, 4)
            ring.serves(100)
            os.truncate(disk / "access", 0)
            watch.until("it is written again", lambda: _dropped((disk / "access").read_text()))
            _tell(ring, 2)
            dropped += _dropped((disk / "access").read_text())
            os.truncate(disk / "access", 0)
    return ring.figures | {"dropped_lines": dropped}


def _dropped(text: str) -> int:
    """How many lines were not written, by the log's own word."""
    return sum(int(count) for count in re.findall(r"(\d+) log lines? could not be written", text))


@contextmanager
def small_disk() -> Iterator[Path]:
    """A file system of 256 KiB, in a mount namespace of its own, that is gone with the block."""
    if os.geteuid() != 0:
        raise SkipTest("only root can mount a file system")
    with tempfile.TemporaryDirectory() as folder:
        script = f"mount -t tmpfs -o size=256k none {folder} && echo mounted && exec cat"
        command = ["unshare", "--mount", "sh", "-c", script]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"mounted\n"
            yield Path(f"/proc/{holder.pid}/root{folder}")


def full_log_pipe(rounds: Rounds, workload: str) -> Figures:
    """Nobody reads the log's pipe, then somebody does, and nothing is missing; then its reader is dead: nobody waits."""
    lines = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipe"
        os.mkfifo(path)
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            with arena(workload, rounds=rounds, access_log=str(path)) as ring:
                for _ in rounds:
                    ring.serves(2000)  # ten times what fits into it
                    lines = _read_until(reader, lines, ring.connections)
                os.close(reader)
                reader = -1
                ring.serves(500)
        finally:
            if reader >= 0:
                os.close(reader)
    return ring.figures | {"lines": lines}


def _read_until(reader: int, lines: int, wanted: int) -> int:
    """Read until there was a line for each of so many connections. Returns how many there were."""

    def look() -> bool:
        nonlocal lines
        with suppress(BlockingIOError):
            text = os.read(reader, 1 << 20)
            assert b" could not be written" not in text, text
            lines += text.count(b"\n")
        return lines >= wanted

    watch.until("there is a line for each connection", look)
    return lines


FAULTS = {
    "oom": Fault(oom, 100, 1, ("mixed",)),
    "no_descriptors_in_workers": Fault(no_descriptors_in_workers, 100, 2, ("short",)),
    "no_descriptors_in_master": Fault(no_descriptors_in_master, 100, 2, ("mixed",)),
    "accept_errors": Fault(accept_errors, 20, 1, ("short",)),
    "unknown_accept_errors": Fault(unknown_accept_errors, 20, 1, ("short",)),
    "late_accepts": Fault(late_accepts, 60, 2, ("long",)),
    "held_accepts": Fault(held_accepts, 60, 1, ("short",)),
    "fork_errors": Fault(fork_errors, 60, 2, ("long",)),
    "failing_boots": Fault(failing_boots, 30, 1, ("long",)),
    "no_processes": Fault(no_processes, 60, 1, ("long",)),
    "clock": Fault(clock, 100, 4, ("mixed",)),
    "full_log_disk": Fault(full_log_disk, 30, 1, ("short",)),
    "full_log_pipe": Fault(full_log_pipe, 30, 1, ("short",)),
}
