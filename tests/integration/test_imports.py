"""What an import does that no daemon can serve with: it crashes, it takes more memory than a worker may, it is no module at all."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefork.testing import Server, StartError, serve
from tests import watch

Start = Callable[..., Server]
Module = Callable[[str], Path]

HANDLER = "\ndef loop(sock):\n    sock.sendall(b'hello')\n"
CRASH = "import ctypes\ndef crash():\n    ctypes.string_at(0)\n"
LARGE = "kept = b'x' * (60 << 20)\n"


def check(folder: Path, *options: str, target: str = "mine:loop") -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-P", "-m", "prefork", "check", f"--module={target}", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def refusal(folder: Path, target: str = "mine:loop", **options: Any) -> str:
    """What a start says that is refused."""
    with pytest.raises(StartError) as refused, serve(target, folder=folder, **options):
        raise AssertionError("it serves")
    assert refused.value.exit_status == 78
    return str(refused.value)


def stack_ends_with(said: str, *frames: str) -> None:
    """The frames are user code's, from the innermost one on, and nothing of ours follows."""
    assert "Fatal Python error: Segmentation fault" in said
    assert "signal 11 (SIGSEGV)" in said
    found = [line.strip() for line in said.splitlines() if line.strip().startswith("File ")]
    assert [line.rpartition("/")[2] for line in found[1:]] == list(frames), said


def test_an_import_that_crashes_brings_its_stack(module: Module) -> None:
    folder = module(f"{CRASH}crash()\n")
    frames = ('mine.py", line 3 in crash', 'mine.py", line 4 in <module>')
    stack_ends_with(refusal(folder), *frames)
    checked = check(folder)
    assert checked.returncode == 78
    stack_ends_with(checked.stderr, *frames)


def test_an_on_boot_that_crashes_brings_its_stack(module: Module) -> None:
    stack_ends_with(refusal(module(CRASH + HANDLER), on_boot="mine:crash"), 'mine.py", line 3 in crash')


def test_what_is_registered_for_the_end_and_crashes_is_told_by_check(module: Module) -> None:
    checked = check(module(f"import atexit\n{CRASH}atexit.register(crash)\n{HANDLER}"))
    assert checked.returncode == 78
    assert "what the import has registered for the end ended its process" in checked.stderr
    stack_ends_with(checked.stderr, 'mine.py", line 4 in crash')


def test_a_reload_whose_import_crashes_is_refused_with_its_stack(prefork_server: Start, module: Module) -> None:
    folder = module(HANDLER)
    server = prefork_server("mine:loop", folder=folder, workers=1)
    (folder / "mine.py").write_text(f"{CRASH}crash()\n")
    answer = server.command("reload")
    assert not answer["ok"]
    stack_ends_with(answer["reason"], 'mine.py", line 3 in crash', 'mine.py", line 4 in <module>')
    with server.connect() as sock:
        assert sock.recv(64) == b"hello"


def test_a_child_of_the_import_that_crashes_is_no_concern_of_ours(module: Module) -> None:
    forks = "import os\nif os.fork() == 0:\n    crash()\nos.wait()\n"
    checked = check(module(CRASH + forks + HANDLER))
    assert checked.returncode == 0, checked.stderr
    assert "Fatal" not in checked.stdout + checked.stderr


def test_faulthandler_is_left_to_an_import_that_uses_it(module: Module, tmp_path: Path) -> None:
    mine = tmp_path / "crashes"
    said = refusal(module(f"import faulthandler\nfile = open({str(mine)!r}, 'w')\nfaulthandler.enable(file)\n{CRASH}crash()\n"))
    assert "Fatal Python error" not in said
    assert "Fatal Python error: Segmentation fault" in mine.read_text()


def test_a_namespace_package_is_called_that(module: Module) -> None:
    folder = module("")
    os.mkdir(folder / "space")
    said = f"space is a namespace package (folders without __init__.py: {folder / 'space'}), which has no 'loop'"
    assert said in refusal(folder, "space:loop")
    assert said in check(folder, target="space:loop").stderr
    assert "sys:loop: a built-in module has no 'loop'" in check(folder, target="sys:loop").stderr


def test_max_memory_below_what_the_import_takes_is_refused_with_both_figures(prefork_server: Start, module: Module) -> None:
    folder = module(LARGE + HANDLER)
    assert "max_memory = 50.0M: after the import of mine:loop a worker has" in refusal(folder, max_memory="50M")
    checked = check(folder, "--max-memory=50M")
    assert (checked.returncode, "max_memory = 50.0M: " in checked.stderr) == (78, True)
    assert check(folder, "--max-memory=120M").returncode == 0
    (folder / "mine.py").write_text(HANDLER)
    server = prefork_server("mine:loop", folder=folder, workers=1, max_memory="50M")
    (folder / "mine.py").write_text(LARGE + HANDLER)
    answer = server.command("reload")
    assert not answer["ok"]
    assert "max_memory = 50.0M: " in answer["reason"]


def test_a_worker_that_is_as_large_as_may_be_after_the_import_serves_on(prefork_server: Start, module: Module) -> None:
    """What is refused is what a worker that has served exceeds: a little more than the figure that is told is enough."""
    folder = module("import os, ssl, asyncio\ndef loop(sock):\n    sock.sendall(b'%d' % os.getpid())\n")
    said = refusal(folder, max_memory="1M")
    least = float(said.partition("a worker has ")[2].partition("M ")[0])
    server = prefork_server("mine:loop", folder=folder, workers=1, max_workers=1, max_memory=str(int((least + 1) * 1048576)))
    served = set()
    for _ in range(5):
        with server.connect() as sock:
            served.add(sock.recv(64))
    assert len(served) == 1
    assert server.wait_for_totals(ok=5)["exited"] == 0


def test_workers_that_their_first_connection_makes_too_large_are_told_ever_more_seldom(
    prefork_server: Start, module: Module
) -> None:
    folder = module("kept = []\ndef loop(sock):\n    kept.append(b'x' * (40 << 20))\n    sock.sendall(b'hello')\n")
    server = prefork_server("mine:loop", folder=folder, workers=1, max_workers=1, max_memory="50M")
    for number in range(1, 7):
        with server.connect() as sock:
            assert sock.recv(64) == b"hello"
        watch.until("it has left", lambda number=number: server.status()["totals"]["exited"] == number)  # type: ignore[misc]
    assert 1 <= server.log().count("more than max_memory = 52428800: it is recycled") <= 5
