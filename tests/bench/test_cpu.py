"""CPU is that of the whole tree, whoever of it has ended."""

import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest

from tests.bench import cpu

# A child and a thread burn 0.1 s each and end; then their parent waits.
BURNER = """
import os, sys, threading, time
def burn():
    while time.thread_time() < 0.1:
        pass
if os.fork() == 0:
    burn()
    os._exit(0)
os.wait()
thread = threading.Thread(target=burn)
thread.start()
thread.join()
print(flush=True)
sys.stdin.read()
"""
ACCOUNTS: dict[str, Callable[[], AbstractContextManager[cpu.Account]]] = {
    "group": cpu.account,
    "clocks": lambda: nullcontext(cpu.Tree()),
}


@pytest.mark.parametrize("kind", ACCOUNTS)
def test_who_has_ended_is_counted(kind: str) -> None:
    with ACCOUNTS[kind]() as account:
        with account.born_here():
            process = subprocess.Popen([sys.executable, "-c", BURNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin is not None
        assert process.stdout is not None
        with process:
            account.adopt(process.pid)
            process.stdout.readline()
            assert account.pids() == [process.pid]
            # Two times 0.1 s and a start of the interpreter; a tick of 10 ms may be missing.
            assert 0.19e9 < account.usage_ns() < 2e9
            process.stdin.close()


def test_a_group_goes_with_all_that_is_in_it() -> None:
    with cpu.account() as account:
        if not isinstance(account, cpu.Group):
            pytest.skip("no control group of ours can be made here")
        with account.born_here():
            process = subprocess.Popen(["sleep", "60"])
        folder: Path = account.folder
    assert process.wait() == -9
    assert not folder.exists()
