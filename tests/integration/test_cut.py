"""A connection that is cut is cut for the children of its handler, too, which have its socket."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from prefork.system import process
from prefork.testing import Server
from tests import public, watch

Start = Callable[..., Server]
Module = Callable[[str], Path]

# Each client says how its handler's child is started, and gets its number; the child echoes until the client closes.
SOURCE = """
import subprocess
def loop(sock):
    how = sock.recv(1)
    child = subprocess.Popen(["cat"], stdin=sock, stdout=sock, start_new_session=how == b"s")
    sock.sendall(b"%d\\n" % child.pid)
    if how == b"h":
        return  # a helper that outlives its connection
    child.wait()
    sock.recv(1)
"""


def begin(server: Server, how: bytes) -> tuple[socket.socket, int]:
    sock = server.connect()
    sock.sendall(how)
    number = b""
    while not number.endswith(b"\n"):
        number += sock.recv(1)
    return sock, int(number)


def is_cut(sock: socket.socket) -> bool:
    """Whether nobody answers any more: there is the end, and no echo."""
    with sock:
        return watch.cut(sock)


CUTS = {
    "a time-out": ({"timeout": 0.3}, {}),
    "the end of graceful_timeout": ({"graceful_timeout": 0.1}, {}),
    "a quick stop": ({}, {"quick": True}),
}


@pytest.mark.parametrize("fork_server", ["alive", "dead"])
@pytest.mark.parametrize(("options", "stop"), CUTS.values(), ids=[name.replace(" ", "-") for name in CUTS])
def test_a_handlers_child_ends_with_the_connection(
    prefork_server: Start, module: Module, options: dict[str, float], stop: dict[str, bool], fork_server: str
) -> None:
    server = prefork_server("mine:loop", folder=module(SOURCE), workers=1, **options)
    sock, child = begin(server, b"c")
    sock.sendall(b"echo")
    assert sock.recv(4) == b"echo"
    if fork_server == "dead":
        os.kill(watch.fork_server(server), signal.SIGKILL)
        watch.logged(server, "fork server")
    if "timeout" not in options:
        server.command("stop", **stop)
    watch.until("the child has ended", lambda: watch.is_gone(child))
    assert is_cut(sock)


@pytest.fixture
def ended() -> Iterator[list[int]]:
    """Processes that outlive their daemon on purpose; they are ended afterwards."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        psutil.Process(pid).kill()
        watch.until("it has gone", lambda pid=pid: watch.is_gone(pid))  # type: ignore[misc]


def test_a_child_in_a_session_of_its_own_is_left_alone(prefork_server: Start, module: Module, ended: list[int]) -> None:
    server = prefork_server("mine:loop", folder=module(SOURCE), workers=1, timeout=0.3)
    sock, child = begin(server, b"s")
    ended.append(child)
    with sock:
        watch.until("its worker is killed", lambda: server.status()["totals"]["killed"] == 1)
        sock.sendall(b"echo")
        assert sock.recv(4) == b"echo"


def test_a_helper_of_an_earlier_connection_ends_with_a_later_one_that_is_cut(prefork_server: Start, module: Module) -> None:
    server = prefork_server("mine:loop", folder=module(SOURCE), workers=1, timeout=0.3)
    first, helper = begin(server, b"h")
    watch.until("its connection has ended", lambda: server.status()["totals"]["ok"] == 1)
    first.sendall(b"echo")
    assert first.recv(4) == b"echo"
    second, child = begin(server, b"c")
    watch.until("both have ended", lambda: watch.is_gone(child) and watch.is_gone(helper))
    assert is_cut(first)
    assert is_cut(second)


def test_a_helper_is_left_alone_by_an_orderly_end(prefork_server: Start, module: Module, ended: list[int]) -> None:
    server = prefork_server("mine:loop", folder=module(SOURCE), workers=1)
    sock, helper = begin(server, b"h")
    ended.append(helper)
    with sock:
        watch.until("its connection has ended", lambda: server.status()["totals"]["ok"] == 1)
        server.command("stop", quick=True)
        sock.sendall(b"echo")
        assert sock.recv(4) == b"echo"


@pytest.fixture
def fork() -> Iterator[Callable[[int], int]]:
    """Make a process that waits, in this process group, or as the leader of its own (0). It has gone afterwards."""
    pids: list[int] = []

    def start(group: int) -> int:
        pid = os.fork()
        if pid == 0:
            while True:
                signal.pause()
        pids.append(pid)
        os.setpgid(pid, group or pid)
        return pid

    yield start
    for pid in pids:
        if process.is_child(pid):
            process.signal_child(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def killed(pid: int) -> bool:
    return os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL


def test_a_worker_that_has_joined_its_neighbours_group_ends_without_that(fork: Callable[[int], int]) -> None:
    neighbour, worker = fork(0), fork(0)
    child = fork(worker)
    os.setpgid(worker, neighbour)
    process.kill_child(worker, group=True)
    assert killed(worker)
    assert killed(child), "the worker's own group is the one that it was given"
    process.kill_child(worker, group=True)  # it was reaped, and its number may be another process's
    assert not process.has_ended(neighbour)


def test_the_group_of_a_child_that_is_killed_alone_goes_on(fork: Callable[[int], int]) -> None:
    worker = fork(0)
    helper = fork(worker)
    process.kill_child(worker, group=False)
    assert killed(worker)
    assert not process.has_ended(helper)
    process.kill_child(helper, group=True)  # it leads no group
    assert killed(helper)


# setuid(2) by a program that root owns: real and saved user are root, too, and nobody else may signal it.
BECOMES_ROOT = '#include <unistd.h>\nint main(void) { return setuid(0) || write(1, "root", 4) < 0 ? 1 : pause(); }\n'
KILLER = """
import os, subprocess, sys
from prefork.system import process
with subprocess.Popen([sys.argv[1]], stdout=subprocess.PIPE, process_group=0) as child:
    child.stdout.read(4)
    process.kill_child(child.pid, group=True)
    print(child.pid, flush=True)
    os._exit(0)
"""


def test_a_group_that_has_become_root_is_left_alone(ended: list[int]) -> None:
    with public.interpreter() as (folder, environment):
        watch.needs("cc")
        program = folder / "program"
        subprocess.run(["cc", "-x", "c", "-", "-o", program], input=BECOMES_ROOT, text=True, check=True)
        program.chmod(0o4755)
        done = subprocess.run(
            [sys.executable, "-c", KILLER, program], user="nobody", env=environment, stdout=subprocess.PIPE, check=True
        )
        ended.append(int(done.stdout))
        assert not watch.is_gone(ended[0])
