"""Limits of the machine that a configuration could meet: who would only find out under load is told at the start.

`read` looks at the machine and never fails: what can't be read (ProcSubset=pid hides /proc/sys and /proc/meminfo, a container
its control groups) is None, and nobody is warned of it. `shortages` judges, and asks nobody. Each limit is held against this
daemon alone; what else the machine runs is not counted (getrlimit(2), fork(2), proc(5), cgroups(7), systemd.resource-control(5)).
"""

import posixpath
import re
import resource
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from prefork.printable import counted
from prefork.system.process import PID_LIMIT

# The master and, while a reload is under way, two fork servers.
OTHER_PROCESSES = 3
# Once pids have wrapped around the kernel starts at this one (kernel/pid.c).
RESERVED_PIDS = 300
# Standard descriptors, log, access log, selector, inbox, doorbell, /dev/null, service manager, control socket.
FIXED_DESCRIPTORS = 16
# Board and orders, each once more for its mapping, gate, channel, stacks; while the fork server is forked, its ends of these, and
# the orders to be read.
GENERATION_DESCRIPTORS = 11
# The one that serves, the next one, and some of which long connections are left.
GENERATIONS = 8
# Files that are open for a moment: configuration, /proc, directories; a client that is being turned away.
RESERVE = 16
# What a worker has for itself, beyond what it shares with its fork server: about a megabyte while it is idle, 0.2 MB in the
# kernel (both measured), and what a handler of a few lines touches.
WORKER_MEMORY = 3 << 19
MEGABYTE = 1 << 20
# capabilities(7): its bit in CapEff.
CAP_SYS_RESOURCE = 24
_UNITS = (".service", ".scope", ".slice")


@dataclass(frozen=True, slots=True)
class Group:
    """The limit of a control group, ours or one above it: its ``path`` as the kernel names it, and the ``file`` with the limit."""

    path: str
    file: str
    limit: int


@dataclass(frozen=True, slots=True)
class Machine:
    """What the machine allows. None and what is missing: there is no limit, or it can't be read.

    ``rlimits``: soft and hard of this process, by name. ``service``: the systemd unit that we are, when we are one.
    """

    somaxconn: int | None = None
    rlimits: Mapping[str, tuple[int | None, int | None]] = field(default_factory=dict)
    pid_max: int | None = None
    pids: tuple[Group, ...] = ()
    memory: tuple[Group, ...] = ()
    memory_available: int | None = None
    may_raise: bool = False
    service: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a configuration can need. ``user`` runs the handlers.

    How things are does not make it another one: the memory of ``running`` workers has been taken already, and ``queue_limit``
    is what the kernel has made of the backlog.
    """

    backlog: int
    listeners: int
    workers: int
    max_workers: int
    control_clients: int
    user: str
    rlimit: tuple[tuple[str, int], ...] = ()
    running: int = field(default=0, compare=False)
    queue_limit: int | None = field(default=None, compare=False)

    @property
    def processes(self) -> int:
        """The most processes there can be: a reload goes past the ceiling by what is reserved for each listener."""
        return self.max_workers + self.workers * self.listeners + OTHER_PROCESSES

    @property
    def descriptors(self) -> int:
        """The most descriptors the master can have open: a reload that changes every address has both sets for a while."""
        return FIXED_DESCRIPTORS + 2 * self.listeners + GENERATIONS * GENERATION_DESCRIPTORS + self.control_clients + RESERVE

    @property
    def memory(self) -> int:
        """Bytes that the workers can need on top of what is in use."""
        return max(0, self.max_workers - self.running) * WORKER_MEMORY

    @property
    def as_root(self) -> bool:
        return self.user in ("0", "root")


@dataclass(frozen=True, slots=True)
class Shortage:
    """One limit that is too low: ``why`` names what can need more, ``remedy`` is the command that raises it."""

    what: str
    has: int
    why: str
    needs: int | str
    remedy: str


# -- judging


def shortages(machine: Machine, demand: Demand) -> list[Shortage]:
    """Every limit that the configuration can exceed."""
    return [
        *_queue(machine, demand),
        *_descriptors(machine, demand),
        *_worker_limits(machine, demand),
        *_processes(machine, demand),
        *_memory(machine, demand),
    ]


def _queue(machine: Machine, demand: Demand) -> Iterator[Shortage]:
    limit = machine.somaxconn if machine.somaxconn is not None else demand.queue_limit
    if limit is not None and limit < demand.backlog:
        remedy = f"sysctl -w net.core.somaxconn={demand.backlog}"
        yield Shortage("net.core.somaxconn", limit, f"backlog = {demand.backlog}", demand.backlog, remedy)


def _descriptors(machine: Machine, demand: Demand) -> Iterator[Shortage]:
    soft, _ = machine.rlimits.get("nofile", (None, None))
    if soft is not None and soft < demand.descriptors:
        why = f"a master with {counted(demand.listeners, 'listener', 'listeners')}"
        yield Shortage("RLIMIT_NOFILE", soft, why, demand.descriptors, _raised(machine, "nofile", "n", demand.descriptors))


def _worker_limits(machine: Machine, demand: Demand) -> Iterator[Shortage]:
    """What ``rlimit`` asks for: root raises hard limits before it is given up."""
    if machine.may_raise:
        return
    for name, wanted in demand.rlimit:
        _, hard = machine.rlimits.get(name, (None, None))
        if hard is not None and (wanted > hard or wanted == resource.RLIM_INFINITY):
            text = "unlimited" if wanted == resource.RLIM_INFINITY else str(wanted)
            setting = "infinity" if wanted == resource.RLIM_INFINITY else text
            remedy = f"sudo prlimit --pid $$ --{name}={text}:{text}"
            if machine.service is not None:
                remedy = f"Limit{name.upper()}={setting} in {machine.service}"
            yield Shortage(f"the hard RLIMIT_{name.upper()}", hard, f"rlimit = {name}={text}", text, remedy)


def _processes(machine: Machine, demand: Demand) -> Iterator[Shortage]:
    why, needs = f"max_workers = {demand.max_workers}", demand.processes
    soft, _ = machine.rlimits.get("nproc", (None, None))
    # It counts all processes of the real user, threads included, and does not bind root (setrlimit(2)).
    if soft is not None and soft < needs and not demand.as_root:
        yield Shortage(f"RLIMIT_NPROC of user {demand.user}", soft, why, needs, _raised(machine, "nproc", "u", needs))
    if machine.pid_max is not None and machine.pid_max < needs + RESERVED_PIDS:
        yield Shortage("kernel.pid_max", machine.pid_max, why, needs + RESERVED_PIDS, f"sysctl -w kernel.pid_max={PID_LIMIT}")
    for group in machine.pids:
        if group.limit < needs:
            yield Shortage(f"pids.max of {group.path}", group.limit, why, needs, _lifted(group, "TasksMax=infinity", "max"))


def _memory(machine: Machine, demand: Demand) -> Iterator[Shortage]:
    why, needs = f"max_workers = {demand.max_workers}", -(-demand.memory // MEGABYTE)
    available = machine.memory_available
    if available is not None and available < demand.memory:
        fits = demand.running + available // WORKER_MEMORY
        remedy = "add memory" if fits < demand.workers * demand.listeners else f"max_workers = {fits} fits, or add memory"
        yield Shortage("the available memory in MB", available // MEGABYTE, why, needs, remedy)
    everybody = demand.max_workers * WORKER_MEMORY
    for group in machine.memory:
        if group.limit < everybody:
            megabytes = -(-everybody // MEGABYTE)
            remedy = _lifted(group, f"MemoryMax={megabytes}M", str(everybody))
            yield Shortage(f"the memory in MB of {group.path}", group.limit // MEGABYTE, why, megabytes, remedy)


def _raised(machine: Machine, name: str, letter: str, needs: int) -> str:
    """How to raise a limit of this process, for whoever starts it."""
    if machine.service is not None:
        return f"Limit{name.upper()}={needs} in {machine.service}"
    _, hard = machine.rlimits[name]
    if hard is None or needs <= hard or machine.may_raise:
        return f"ulimit -{letter} {needs}"
    return f"sudo prlimit --pid $$ --{name}={needs}:{needs}"


def _lifted(group: Group, setting: str, value: str) -> str:
    """How to raise a control group's limit: systemd writes its own units' limits again."""
    unit = posixpath.basename(group.path)
    if not unit.endswith(_UNITS):
        return f"echo {value} > {shlex.quote(group.file)}"
    manager = "systemctl --user" if re.search(r"/user@[0-9]+\.service/", group.path) else "systemctl"
    return f"{manager} set-property --runtime {shlex.quote(unit)} {setting}"


# -- reading


def read(environment: Mapping[str, str], root: str = "") -> Machine:
    """What this machine allows this process. ``root``: where /proc and /sys are looked for."""
    cgroup, mountinfo = _text(f"{root}/proc/self/cgroup"), _text(f"{root}/proc/self/mountinfo")
    available = re.search(r"^MemAvailable: +([0-9]+) kB$", _text(f"{root}/proc/meminfo"), re.MULTILINE)
    capabilities = re.search(r"^CapEff:\t([0-9a-f]+)$", _text(f"{root}/proc/self/status"), re.MULTILINE)
    return Machine(
        somaxconn=_number(f"{root}/proc/sys/net/core/somaxconn"),
        rlimits=_rlimits(),
        pid_max=_number(f"{root}/proc/sys/kernel/pid_max"),
        pids=tuple(_limits_of(root, groups("pids", cgroup, mountinfo), "pids.max")),
        memory=tuple(_limits_of(root, groups("memory", cgroup, mountinfo), "memory.max", "memory.limit_in_bytes")),
        memory_available=int(available[1]) << 10 if available else None,
        may_raise=bool(capabilities and int(capabilities[1], 16) >> CAP_SYS_RESOURCE & 1),
        service=_service(cgroup, environment),
    )


def groups(controller: str, cgroup: str, mountinfo: str) -> Iterator[tuple[str, str]]:
    """Our control group, and all above it: each one's name, and where it is mounted.

    From the texts of /proc/self/cgroup and /proc/self/mountinfo: version 1 has a hierarchy for each controller or several,
    version 2 one for all, and both may be there. A container sees the groups below the root of its mount only.
    """
    mounts = [found for line in mountinfo.splitlines() if (found := _cgroup_mount(line)) is not None]
    for controllers, path in _memberships(cgroup):
        for kind, options, top, point in mounts:
            fits = kind == "cgroup2" if not controllers else controller in controllers and controller in options
            if not fits or not f"{path}/".startswith(f"{top}/"):
                continue
            inside = path[len(top) :].rstrip("/")
            while True:
                yield top + inside or "/", point + inside
                if not inside:
                    break
                inside = posixpath.dirname(inside).rstrip("/")


def _memberships(cgroup: str) -> Iterator[tuple[list[str], str]]:
    """Controllers (none: version 2) and path of each line."""
    for line in cgroup.splitlines():
        parts = line.split(":", 2)
        if len(parts) == 3:
            yield [name for name in parts[1].split(",") if name], parts[2]


def _cgroup_mount(line: str) -> tuple[str, list[str], str, str] | None:
    """Type, options, root and mount point of a line of /proc/self/mountinfo; None when no control groups are mounted there."""
    where, _, what = line.partition(" - ")
    fields, kind = where.split(), what.split()
    if len(fields) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
        return None
    return kind[0], kind[2].split(","), fields[3].rstrip("/"), fields[4]


def _limits_of(root: str, found: Iterator[tuple[str, str]], *names: str) -> Iterator[Group]:
    for path, folder in found:
        for name in names:
            file = f"{folder}/{name}"
            if (limit := _number(root + file)) is not None:
                yield Group(path, file, limit)


def socket_unit(environment: Mapping[str, str]) -> str:
    """What passes us sockets, for a message."""
    return f"the .socket unit of {_service(_text('/proc/self/cgroup'), environment) or 'this service'}"


def _service(cgroup: str, environment: Mapping[str, str]) -> str | None:
    """Our unit. The variables alone don't tell: a terminal that a service has started hands them down."""
    if not {"NOTIFY_SOCKET", "INVOCATION_ID"} & environment.keys():
        return None
    paths = [path for controllers, path in _memberships(cgroup) if controllers in ([], ["name=systemd"])]
    unit = next((posixpath.basename(path) for path in paths if path.endswith(".service")), None)
    # In a namespace of its own every path is the root.
    return unit or ("the unit" if paths and set(paths) == {"/"} else None)


def _rlimits() -> dict[str, tuple[int | None, int | None]]:
    found: dict[str, tuple[int | None, int | None]] = {}
    for name in dir(resource):
        if name.startswith("RLIMIT_"):
            pair = resource.getrlimit(getattr(resource, name))
            soft, hard = (None if limit == resource.RLIM_INFINITY else limit for limit in pair)
            found[name.removeprefix("RLIMIT_").lower()] = soft, hard
    return found


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:  # not on this machine, or not for us: then nothing is known of that limit
        return ""


def _number(path: str) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None
