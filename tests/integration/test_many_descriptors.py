"""With more than 1,024 descriptors open, of which select(2) takes no number (FD_SETSIZE)."""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefork.testing import serve
from tests import watch
from tests.integration.test_upgrade import ECHO, Module, address, says, upgrade

MANY = 1100


@pytest.fixture
def many() -> Iterator[None]:
    """So many descriptors."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limits[1] < 2 * MANY:
        pytest.skip(f"a hard limit of {limits[1]} descriptors (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], 2 * MANY), limits[1]))
    found = [os.open(os.devnull, os.O_RDONLY)]
    try:
        while found[-1] < MANY:
            found.append(os.dup(found[0]))
        yield
    finally:
        for fd in found:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


# What executes a command with all numbers below taken.
FILL = f"""
import os, sys
while (fd := os.dup(0)) < {MANY}:
    os.set_inheritable(fd, True)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


@pytest.mark.usefixtures("many")
def test_a_daemon_that_has_inherited_them_is_upgraded_and_the_commands_work(tmp_path: Path, module: Module) -> None:
    prefork = [sys.executable, "-c", FILL, "-m", "prefork"]
    folder = module(ECHO)

    def command(*words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([*prefork, *words], cwd=folder, capture_output=True, text=True, check=False)

    done = command("check", "--module=mine:loop")
    assert (done.returncode, done.stderr) == (0, "")
    with watch.running([*prefork, "serve", "--module=mine:loop", "--workers=1", "--bind=127.0.0.1:0"], folder, tmp_path) as server:
        assert upgrade(server)["generation"] == 2
        assert says(address(server)) == b"x"
        done = command("stop", "--control", server.control)
        assert (done.returncode, done.stdout) == (0, "stopped: 1 connection accepted, 0 cut\n")


@pytest.mark.usefixtures("many")
def test_the_fixture_works_in_a_process_that_has_them() -> None:
    with serve("echo:loop", workers=1) as server:
        assert server.status()["state"] == "running"
