"""Limits of the machine: each is judged on both sides of its boundary, and read from whatever the kernel shows of it."""

import dataclasses
import resource
from pathlib import Path
from typing import Any

import pytest

from prefork.system import limits
from prefork.system.limits import Demand, Group, Machine, Shortage

MB = 1 << 20
DEMAND = Demand(backlog=2048, listeners=2, workers=8, max_workers=100, control_clients=64, user="www-data")
PROCESSES = 100 + 8 * 2 + 3
SLICE = "/system.slice/prefork.service"


def judged(demand: Demand = DEMAND, **machine: Any) -> list[Shortage]:
    return limits.shortages(Machine(**machine), demand)


def group(limit: int, path: str = SLICE) -> Group:
    return Group(path, f"/sys/fs/cgroup{path}/pids.max", limit)


def test_nothing_is_said_of_what_is_not_known() -> None:
    assert judged() == []


@pytest.mark.parametrize(
    ("enough", "less", "what", "needs"),
    [
        ({"somaxconn": 2048}, {"somaxconn": 2047}, "net.core.somaxconn", 2048),
        (
            {"rlimits": {"nofile": (DEMAND.descriptors, None)}},
            {"rlimits": {"nofile": (DEMAND.descriptors - 1, None)}},
            "RLIMIT_NOFILE",
            DEMAND.descriptors,
        ),
        (
            {"rlimits": {"nproc": (PROCESSES, None)}},
            {"rlimits": {"nproc": (PROCESSES - 1, None)}},
            "RLIMIT_NPROC of user www-data",
            PROCESSES,
        ),
        ({"pid_max": PROCESSES + 300}, {"pid_max": PROCESSES + 299}, "kernel.pid_max", PROCESSES + 300),
        ({"pids": (group(PROCESSES),)}, {"pids": (group(PROCESSES - 1),)}, f"pids.max of {SLICE}", PROCESSES),
        ({"memory_available": 150 * MB}, {"memory_available": 150 * MB - 1}, "the available memory in MB", 150),
        ({"memory": (group(150 * MB),)}, {"memory": (group(150 * MB - 1),)}, f"the memory in MB of {SLICE}", 150),
    ],
)
def test_a_limit_is_named_when_it_is_less_than_what_can_be_needed(
    enough: dict[str, Any], less: dict[str, Any], what: str, needs: int
) -> None:
    assert judged(**enough) == []
    [found] = judged(**less)
    assert (found.what, found.needs) == (what, needs)


def test_a_group_above_ours_that_allows_less_is_named_too() -> None:
    found = judged(pids=(group(PROCESSES), group(PROCESSES - 1, "/system.slice"), group(10, "/")))
    assert [shortage.what for shortage in found] == ["pids.max of /system.slice", "pids.max of /"]


@pytest.mark.parametrize("user", ["root", "0"])
def test_the_number_of_processes_does_not_bind_root(user: str) -> None:
    assert judged(dataclasses.replace(DEMAND, user=user), rlimits={"nproc": (1, 1)}) == []


def test_memory_that_workers_have_taken_is_not_asked_for_again() -> None:
    demand = dataclasses.replace(DEMAND, running=90)
    assert demand == DEMAND, "how many run is no other demand"
    assert judged(demand, memory_available=15 * MB) == []
    assert len(judged(demand, memory_available=15 * MB - 1)) == 1
    assert len(judged(demand, memory=(group(150 * MB - 1),))) == 1, "the group's limit counts them"


def test_where_sysctls_are_hidden_the_kernel_tells_what_it_made_of_the_backlog() -> None:
    demand = dataclasses.replace(DEMAND, queue_limit=128)
    assert [(found.has, found.needs) for found in judged(demand)] == [(128, 2048)]
    assert judged(demand, somaxconn=4096) == []


@pytest.mark.parametrize(
    ("wanted", "user", "may_raise", "short"),
    [
        (1024, "www-data", True, False),
        (1025, "www-data", True, False),
        (1025, "root", False, True),
        (1025, "root", True, False),
        (resource.RLIM_INFINITY, "www-data", False, True),
    ],
)
def test_a_worker_can_not_be_given_more_than_the_hard_limit(wanted: int, user: str, may_raise: bool, short: bool) -> None:
    demand = dataclasses.replace(DEMAND, user=user, rlimit=(("nofile", wanted),))
    found = judged(demand, rlimits={"nofile": (1024, 1024)}, may_raise=may_raise)
    assert [shortage.what for shortage in found] == (["the hard RLIMIT_NOFILE"] if short else [])


@pytest.mark.parametrize(
    ("machine", "remedy"),
    [
        ({"somaxconn": 1}, "sysctl -w net.core.somaxconn=2048"),
        ({"pid_max": 1}, "sysctl -w kernel.pid_max=4194304"),
        ({"rlimits": {"nofile": (1, None)}}, f"ulimit -n {DEMAND.descriptors}"),
        ({"rlimits": {"nofile": (1, 1)}}, f"sudo prlimit --pid $$ --nofile={DEMAND.descriptors}:{DEMAND.descriptors}"),
        ({"rlimits": {"nofile": (1, 1)}, "may_raise": True}, f"ulimit -n {DEMAND.descriptors}"),
        ({"rlimits": {"nproc": (1, PROCESSES)}}, f"ulimit -u {PROCESSES}"),
        ({"rlimits": {"nproc": (1, 1)}, "service": "a.service"}, f"LimitNPROC={PROCESSES} in a.service"),
        ({"pids": (group(1),)}, "systemctl set-property --runtime prefork.service TasksMax=infinity"),
        ({"pids": (group(1, "/user.slice"),)}, "systemctl set-property --runtime user.slice TasksMax=infinity"),
        ({"pids": (group(1, "/a/b-\\x2d.service"),)}, "systemctl set-property --runtime 'b-\\x2d.service' TasksMax=infinity"),
        (
            {"pids": (group(1, "/user.slice/user-7.slice/user@7.service/app.slice/a.service"),)},
            "systemctl --user set-property --runtime a.service TasksMax=infinity",
        ),
        ({"pids": (group(1, "/docker/4f2a"),)}, "echo max > /sys/fs/cgroup/docker/4f2a/pids.max"),
        ({"memory": (group(1),)}, "systemctl set-property --runtime prefork.service MemoryMax=150M"),
        ({"memory": (group(1, "/docker/4f2a"),)}, f"echo {150 * MB} > /sys/fs/cgroup/docker/4f2a/pids.max"),
        ({"memory_available": 30 * MB}, "max_workers = 20 fits, or add memory"),
        ({"memory_available": 3 * MB}, "add memory"),
    ],
)
def test_a_remedy_is_a_command(machine: dict[str, Any], remedy: str) -> None:
    assert [shortage.remedy for shortage in judged(**machine)] == [remedy]


# -- reading

UNIFIED = "29 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n"
LEGACY = (
    "23 28 0:21 / /proc rw - proc proc rw\n"
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "39 31 0:36 / /sys/fs/cgroup/pids rw shared:17 - cgroup cgroup rw,pids\n"
    "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
)


@pytest.mark.parametrize(
    ("cgroup", "mountinfo", "found"),
    [
        (
            "0::/system.slice/prefork.service\n",
            UNIFIED,
            [
                ("/system.slice/prefork.service", "/sys/fs/cgroup/system.slice/prefork.service"),
                ("/system.slice", "/sys/fs/cgroup/system.slice"),
                ("/", "/sys/fs/cgroup"),
            ],
        ),
        ("0::/\n", UNIFIED, [("/", "/sys/fs/cgroup")]),
        (
            "8:pids:/a\n4:memory:/m\n1:name=systemd:/a\n0::/\n",
            LEGACY,
            [("/a", "/sys/fs/cgroup/pids/a"), ("/", "/sys/fs/cgroup/pids"), ("/", "/sys/fs/cgroup/unified")],
        ),
        # A container of version 1 without a namespace of its own: its group is mounted as the root.
        (
            "8:pids:/docker/4f2a/inner\n",
            "39 31 0:36 /docker/4f2a /sys/fs/cgroup/pids ro - cgroup cgroup rw,pids\n",
            [("/docker/4f2a/inner", "/sys/fs/cgroup/pids/inner"), ("/docker/4f2a", "/sys/fs/cgroup/pids")],
        ),
        ("8:pids:/docker/4f2abc\n", "39 31 0:36 /docker/4f2a /sys/fs/cgroup/pids ro - cgroup cgroup rw,pids\n", []),
        ("8:cpu,pids:/a\n", "39 31 0:36 /a /p ro - cgroup cgroup rw,cpu,pids\n", [("/a", "/p")]),
        ("", UNIFIED, []),
        ("0::/a\n", "", []),
        ("nonsense\n::\n", "nonsense\n- cgroup\n 1 2 - cgroup2\n", []),
    ],
)
def test_a_group_is_found_with_all_above_it(cgroup: str, mountinfo: str, found: list[tuple[str, str]]) -> None:
    assert list(limits.groups("pids", cgroup, mountinfo)) == found


def machine_in(root: Path, files: dict[str, str], **environment: str) -> Machine:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return limits.read(environment, str(root))


def test_a_machine_is_read_from_proc_and_its_control_groups(tmp_path: Path) -> None:
    found = machine_in(
        tmp_path,
        {
            "proc/sys/net/core/somaxconn": "4096\n",
            "proc/sys/kernel/pid_max": "32768\n",
            "proc/meminfo": "MemTotal:       24684084 kB\nMemAvailable:   1000 kB\n",
            "proc/self/status": "Name:\tx\nCapEff:\t0000000001000000\nCapBnd:\t0\n",
            "proc/self/cgroup": f"0::{SLICE}\n",
            "proc/self/mountinfo": UNIFIED,
            f"sys/fs/cgroup{SLICE}/pids.max": "max\n",
            "sys/fs/cgroup/system.slice/pids.max": "500\n",
            f"sys/fs/cgroup{SLICE}/memory.max": "1048576\n",
        },
        INVOCATION_ID="x",
    )
    assert found.pids == (Group("/system.slice", "/sys/fs/cgroup/system.slice/pids.max", 500),)
    assert found.memory == (Group(SLICE, f"/sys/fs/cgroup{SLICE}/memory.max", MB),)
    assert (found.somaxconn, found.pid_max, found.memory_available) == (4096, 32768, 1000 << 10)
    assert (found.may_raise, found.service) == (True, "prefork.service")
    assert found.rlimits["nofile"][0] == resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def test_memory_of_version_1_has_another_file(tmp_path: Path) -> None:
    found = machine_in(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/a\n",
            "proc/self/mountinfo": LEGACY,
            "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "1048576",
        },
    )
    assert found.memory == (Group("/a", "/sys/fs/cgroup/memory/a/memory.limit_in_bytes", MB),)


def test_what_can_not_be_read_is_not_known(tmp_path: Path) -> None:
    (tmp_path / "proc" / "meminfo").mkdir(parents=True)
    found = machine_in(tmp_path, {"proc/sys/kernel/pid_max": "\xff many"})
    assert found == Machine(rlimits=found.rlimits)


@pytest.mark.parametrize(
    ("cgroup", "variables", "service"),
    [
        ("0::/system.slice/a.service\n", {"INVOCATION_ID": "x"}, "a.service"),
        ("1:name=systemd:/system.slice/a.service\n0::/\n", {"NOTIFY_SOCKET": "x"}, "a.service"),
        ("0::/system.slice/a.service\n", {}, None),
        # A terminal has what its service was given, and is none.
        ("0::/user.slice/user-7.slice/user@7.service/app.slice/vte-1.scope\n", {"INVOCATION_ID": "x"}, None),
        ("0::/\n", {"INVOCATION_ID": "x"}, "the unit"),
        ("", {"INVOCATION_ID": "x"}, None),
    ],
)
def test_the_unit_is_known_by_its_group_and_the_variables_of_systemd(
    tmp_path: Path, cgroup: str, variables: dict[str, str], service: str | None
) -> None:
    assert machine_in(tmp_path, {"proc/self/cgroup": cgroup}, **variables).service == service
