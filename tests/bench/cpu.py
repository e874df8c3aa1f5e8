"""CPU of a server's whole process tree, in nanoseconds, with those that have ended: by a control group, or the kernel's clocks.

A group of our own is exact: whoever was born in it is charged to it, dead or alive. Where none can be made the CPU clocks of the
processes that live are added up (clock_getcpuclockid(3): the run time of schedstat, with that of threads that have ended) and
what they have reaped (cutime and cstime of proc_pid_stat(5): exact sums, cut to a tick when they are read).
"""

import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Protocol

import psutil

from tests import watch

_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
# Of the dynamic clock ids: what a whole process has run (CPUCLOCK_SCHED).
_SCHED = 2
_numbers = count()


def clock_ns(pid: int) -> int:
    """CPU time of one process, all its threads, without its children. Raises OSError when it has gone."""
    return time.clock_gettime_ns((~pid << 3) | _SCHED)


class Account(Protocol):
    """What the processes of one server use."""

    kind: str

    def born_here(self) -> AbstractContextManager[None]:
        """A block in which the server is started."""

    def adopt(self, pid: int) -> None:
        """This process is the server's first."""

    def usage_ns(self) -> int:
        """CPU used so far."""

    def pids(self) -> list[int]:
        """Who is alive."""


@dataclass(slots=True)
class Group:
    """A control group: ``folder`` is ours, ``home`` is where this process belongs."""

    folder: Path
    home: Path
    kind: str

    @contextmanager
    def born_here(self) -> Iterator[None]:
        """Children of this block are in the group: a process is born where its parent is."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))
        try:
            yield
        finally:
            (self.home / "cgroup.procs").write_text(str(os.getpid()))

    def adopt(self, pid: int) -> None:
        """It is here already."""

    def usage_ns(self) -> int:
        """CPU that was used in the group, by whomever."""
        if (account := self.folder / "cpuacct.usage").exists():
            return int(account.read_text())
        lines = dict(line.split() for line in (self.folder / "cpu.stat").read_text().splitlines())
        return int(lines["usage_usec"]) * 1000

    def pids(self) -> list[int]:
        """Who is alive, zombies left out."""
        return [int(line) for line in (self.folder / "cgroup.procs").read_text().split()]


@dataclass(slots=True)
class Tree:
    """The descendants of one process, which has been there all the time."""

    root: int = 0
    kind: str = "the processes' CPU clocks (no control group of ours can be made)"

    @contextmanager
    def born_here(self) -> Iterator[None]:
        """Nothing is to be prepared."""
        yield

    def adopt(self, pid: int) -> None:
        """Its descendants are the server."""
        self.root = pid

    def usage_ns(self) -> int:
        """CPU of who lives and of whom they have reaped; what ends unreaped while we look is missing."""
        used = 0
        for pid in self.pids():
            with suppress(OSError):  # it has gone meanwhile
                reaped = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[13:15]
                used += clock_ns(pid) + _TICK_NS * sum(map(int, reaped))
        return used

    def pids(self) -> list[int]:
        """Who is alive."""
        return [self.root, *(process.pid for process in watch.family(self.root))] if psutil.pid_exists(self.root) else []


@contextmanager
def account() -> Iterator[Account]:
    """Where the next server is charged to: the most exact that can be had here. Whoever is in a group at the end is killed."""
    place = _place()
    if place is None:
        yield Tree()
        return
    home, kind = place
    group = Group(home / f"prefork-bench-{os.getpid()}-{next(_numbers)}", home, kind)
    group.folder.mkdir()
    try:
        yield group
    finally:
        watch.until("the group is empty", lambda: _emptied(group), deadline=60.0)


def _emptied(group: Group) -> bool:
    for pid in group.pids():
        with suppress(ProcessLookupError):
            os.kill(pid, 9)
    with suppress(OSError):  # who has ended may not have been reaped yet
        group.folder.rmdir()
    return not group.folder.exists()


def _place() -> tuple[Path, str] | None:
    """The group in which others can be made, and this process' own; what to call it. None where none can be made."""
    paths: dict[str, str] = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        paths |= dict.fromkeys(controllers.split(","), path.lstrip("/"))
    for root, controller, file, kind in (
        (Path("/sys/fs/cgroup/cpuacct"), "cpuacct", "cpuacct.usage", "control group (v1, cpuacct.usage)"),
        (Path("/sys/fs/cgroup"), "", "cpu.stat", "control group (v2, cpu.stat)"),
    ):
        home = root / paths.get(controller, "")
        if not home.exists():  # a container sees its own part only
            home = root
        trial = home / f"prefork-bench-{os.getpid()}"
        with suppress(OSError):
            trial.mkdir()
            try:
                if (trial / file).exists():
                    (trial / "cgroup.procs").write_text(str(os.getpid()))
                    (home / "cgroup.procs").write_text(str(os.getpid()))
                    return home, kind
            finally:
                trial.rmdir()
    return None
