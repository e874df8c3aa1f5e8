"""Limits of the machine that a configuration exceeds are named at the start, and at a reload that changes the numbers."""

import os
import resource
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prefork.system import limits
from prefork.testing import Server, serve
from tests import public, watch

Start = Callable[..., Server]
PIDS = Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup")


def warnings(server: Server) -> list[str]:
    lines = [line for line in server.log().splitlines() if " WARNING " in line]
    return [line for line in lines if "handlers run as root" not in line]


def test_a_usual_machine_is_enough_for_the_defaults(prefork_server: Start) -> None:
    server = prefork_server("echo:loop")
    assert warnings(server) == []
    assert server.command("reload")["ok"]
    assert warnings(server) == []


@pytest.fixture
def few_descriptors() -> Iterator[int]:
    """What this process may open, and so the daemon that it starts."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 100
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, before[1]))
    yield few
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_too_few_descriptors_are_named_with_the_remedy(few_descriptors: int, prefork_server: Start) -> None:
    [line] = warnings(prefork_server("echo:loop", workers=1))
    assert f"RLIMIT_NOFILE is {few_descriptors}, a master with 1 listener can need " in line
    assert line.rpartition(": ")[2].startswith(("ulimit -n ", "LimitNOFILE="))


def test_the_master_has_no_more_descriptors_than_is_reckoned_with(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=1)
    before = len(watch.descriptors(server.pid))
    assert before <= limits.FIXED_DESCRIPTORS + 1 + limits.GENERATION_DESCRIPTORS
    held = []
    for _ in range(4):
        held.append(server.connect())
        held[-1].sendall(b"x")
        assert held[-1].recv(1) == b"x"
        assert server.command("reload")["ok"]
    # What is left of a generation when its fork server has gone and a connection has not.
    watch.family_of(server.pid, 2 + len(held), "old fork servers have left")
    assert len(watch.descriptors(server.pid)) - before <= len(held) * limits.GENERATION_DESCRIPTORS
    for sock in held:
        sock.close()


def run_as_nobody(limit: str) -> str:
    """The log of a daemon of another user than root that is asked to stop as soon as it serves."""
    become = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    interpreter = [*become, sys.executable]
    if subprocess.run([*interpreter, "-c", "import prefork"], capture_output=True, check=False, cwd="/").returncode != 0:
        pytest.skip("another user can't run this interpreter")
    command = [*interpreter, "-m", "prefork", "serve", "--module=echo:loop", "--bind=127.0.0.1:0", "--workers=1", "--control=off"]
    with subprocess.Popen(["prlimit", limit, *command], stderr=subprocess.PIPE, text=True, cwd="/") as daemon:
        assert daemon.stderr is not None
        lines: list[str] = []
        while not lines or " serving " not in lines[-1]:
            lines.append(daemon.stderr.readline())
            assert lines[-1], lines
        daemon.terminate()
        daemon.communicate()
    return "".join(lines)


def test_too_few_processes_of_an_ordinary_user_are_named_with_the_remedy() -> None:
    uid = 65534 if os.geteuid() == 0 else os.geteuid()
    # Soft: 250 and what this user has running already are more than this start needs.
    assert f"RLIMIT_NPROC of user {uid} is 250, max_workers = 256 can need 260: " in run_as_nobody("--nproc=250:")
    assert "RLIMIT_NPROC" not in run_as_nobody("--nproc=260:")


def test_the_user_option_says_whose_processes_are_counted(prefork_server: Start) -> None:
    before = resource.getrlimit(resource.RLIMIT_NPROC)
    with public.interpreter() as (_, environment):
        resource.setrlimit(resource.RLIMIT_NPROC, (250, before[1]))
        try:
            mine = prefork_server("echo:loop", workers=1, environment=environment)
            assert "RLIMIT_NPROC" not in mine.log(), "it does not bind root"
            theirs = prefork_server("echo:loop", workers=1, user="nobody", folder="/", environment=environment)
            assert "RLIMIT_NPROC of user nobody is 250, max_workers = 256 can need 260: " in theirs.log()
        finally:
            resource.setrlimit(resource.RLIMIT_NPROC, before)


@pytest.fixture
def pids_groups() -> Iterator[tuple[Path, Path]]:
    """Two control groups of our own that count processes, one in the other, below the one that we are in; we are in the inner."""
    paths = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    old = next((path for _, names, path in paths if "pids" in names.split(",")), None)
    new = next((path for _, names, path in paths if not names), "/")
    home = PIDS[0] / old.lstrip("/") if old is not None else PIDS[1] / new.lstrip("/")
    outer = home / f"prefork-{secrets.token_hex(4)}"
    inner = outer / "inner.service"
    try:
        inner.mkdir(parents=True)
        if old is None:
            (outer / "cgroup.subtree_control").write_text("+pids")
        (inner / "cgroup.procs").write_text(str(os.getpid()))
        (inner / "pids.max").write_text("max")
        yield outer, inner
    except OSError as error:
        pytest.skip(f"no control group that counts processes can be made here: {error}")
    finally:
        if inner.exists():
            (home / "cgroup.procs").write_text(str(os.getpid()))
            inner.rmdir()
        if outer.exists():
            outer.rmdir()


def test_a_control_group_that_allows_too_few_processes_is_named_with_the_remedy(
    pids_groups: tuple[Path, Path], tmp_path: Path
) -> None:
    outer, inner = pids_groups
    (outer / "pids.max").write_text("250")
    file = tmp_path / "echo.toml"
    file.write_text("max_workers = 256\n")
    with serve("echo:loop", workers=1, arguments=("--config", str(file))) as server:
        [line] = warnings(server)
        assert line.endswith(f"pids.max of {name_of(outer)} is 250, max_workers = 256 can need 260: echo max > {outer}/pids.max")
        # The same numbers say nothing new; others do.
        assert server.command("reload")["ok"]
        assert len(warnings(server)) == 1
        file.write_text("max_workers = 300\n")
        (inner / "pids.max").write_text("260")
        assert server.command("reload")["ok"]
        watch.logged(server, "max_workers = 300 can need 304: ", times=2)
        assert "systemctl set-property --runtime inner.service TasksMax=infinity" in server.log()
        file.write_text("max_workers = 200\n")
        assert server.command("reload")["ok"]
        assert len(warnings(server)) == 3


def name_of(group: Path) -> str:
    """As the kernel names it: without the place where it is mounted."""
    place = PIDS[0] if group.is_relative_to(PIDS[0]) else PIDS[1]
    return "/" + str(group.relative_to(place))
