"""`prefork.testing`, as people use it for their own handlers."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from prefork.testing import StartError, serve
from tests import watch


def shout(sock: socket.socket) -> None:
    """A handler in a test module."""
    sock.sendall(sock.recv(64).upper())


def test_a_function_is_served_as_it_stands() -> None:
    with serve(shout, workers=2) as server:
        with server.connect() as sock:
            sock.sendall(b"hello")
            assert sock.recv(64) == b"HELLO"
        assert server.status()["listeners"][0]["workers"]["target"] == 2
        assert server.command("reload") == {"ok": True, "generation": 2, "suspended": False}
    assert server.process.returncode == 0


def test_a_daemon_that_does_not_start_says_why() -> None:
    with pytest.raises(StartError, match="no module 'nosuch'") as caught, serve("nosuch:loop"):
        pass
    assert caught.value.exit_status == 78


def test_the_daemon_ends_with_the_block_even_when_the_test_fails() -> None:
    with pytest.raises(ZeroDivisionError), serve(shout) as server:
        raise ZeroDivisionError
    assert server.process.returncode == 0


STARTER = """
import os, sys, threading
from prefork.testing import serve

if {from_a_thread}:
    opened = []
    thread = threading.Thread(target=lambda: opened.append((cm := serve({target!r}, workers=1), cm.__enter__())))
    thread.start()
    thread.join()
    server = opened[0][1]
else:
    cm = serve({target!r}, workers=1)
    server = cm.__enter__()
child = os.fork()  # without an exec: it has all our descriptors
if child == 0:
    sys.stdin.read()
    os._exit(0)
if {upgrade}:
    number = server.command("upgrade")["upgrade"]
    assert server.command("outcome", upgrade=number)["ok"]
print(server.pid, child, server.log_path, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(("from_a_thread", "upgrade"), [(True, False), (False, True)])
def test_the_daemon_ends_with_the_process_that_has_started_it(tmp_path: Path, from_a_thread: bool, upgrade: bool) -> None:
    source = STARTER.format(target="echo:loop", from_a_thread=from_a_thread, upgrade=upgrade)
    settings = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=settings
    ) as starter:
        assert starter.stdout is not None
        pid, child, log = starter.stdout.readline().split()
        assert psutil.pid_exists(int(pid)), "the thread that has started it may end"
        starter.kill()
        starter.wait()
        try:
            watch.until("the daemon has ended", lambda: watch.is_gone(int(pid)))
        except AssertionError:
            os.kill(int(pid), signal.SIGKILL)
            raise
        assert not watch.is_gone(int(child)), "it is not the child's end that was waited for"
        assert "0 connections accepted, 0 cut" in Path(log).read_text(), "in order, as by SIGTERM"


def test_a_wrong_keyword_is_told_as_python_does() -> None:
    with pytest.raises(TypeError, match=r"^serve\(\) got an unexpected keyword argument 'wokers'. Did you mean 'workers'\?$"):
        serve("echo:loop", wokers=2).__enter__()
    with pytest.raises(TypeError, match=r"^serve\(\) got an unexpected keyword argument 'xyzzy'$"), serve("echo:loop", xyzzy=2):
        pass


def test_totals_are_waited_for() -> None:
    with serve("echo:loop", workers=2) as server:
        with server.connect() as held:
            assert server.wait_for_totals(serving=1)["accepted"] == 1
            with pytest.raises(TimeoutError, match=r"after 0 s the totals are \{'accepted': 1, .*, not \{'serving': 0, 'ok': 1\}"):
                server.wait_for_totals(timeout=0, ok=1)
            held.sendall(b"x")
            assert held.recv(1) == b"x"
        assert server.wait_for_totals(ok=1)["serving"] == 0
        with pytest.raises(TypeError, match=r"wait_for_totals\(\) got an unexpected keyword argument 'okay'"):
            server.wait_for_totals(okay=1)


INI = "[pytest]\npythonpath = src lib\n"
ELSEWHERE = """
from prefork.testing import serve

def test_both(prefork_server):
    with serve("found.handlers:loop", workers=1) as server, server.connect() as sock:
        assert sock.recv(64) == b"src and other"
    with prefork_server("found.handlers:loop").connect() as sock:
        assert sock.recv(64) == b"src and other"
"""


def test_modules_are_found_where_pytest_is_told_to_look_for_them(tmp_path: Path) -> None:
    for folder, name, text in (
        ("src/found", "__init__.py", ""),
        ("src/found", "handlers.py", "import other\ndef loop(sock):\n    sock.sendall(b'src and ' + other.WORD)\n"),
        ("lib", "other.py", "WORD = b'other'\n"),
        ("other", "other.py", "WORD = b'another'\n"),
        ("tests", "test_it.py", ELSEWHERE),
    ):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / name).write_text(text)
    (tmp_path / "pytest.ini").write_text(INI)
    settings = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    settings["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "other"), str(Path(__file__).parents[2])])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", "tests"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=settings)
    assert done.returncode == 0, done.stdout + done.stderr
