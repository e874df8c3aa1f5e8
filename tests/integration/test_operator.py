"""What operators do at a terminal, and what they find."""

import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from prefork.testing import Server, StartError, connect, serve
from tests import watch
from tests.conftest import HANDLERS
from tests.integration.test_control import run

Start = Callable[..., Server]


def test_a_daemon_that_is_stopping_can_be_looked_at_and_hurried(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=1)
    with server.connect() as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        os.kill(server.pid, signal.SIGTERM)
        watch.logged(server, "no longer listening")
        status = server.status()
        assert (status["state"], status["totals"]["serving"], status["listeners"][0]["queue"]) == ("stopping", 1, None)
        done = run("stop", "--quick", "--control", server.control)
        assert done.stdout == "stopped: 1 connection accepted, 1 cut\n", done.stderr
    assert server.stop() == 0


def test_two_interrupts_at_once_are_one(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=1)
    with server.connect() as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        os.kill(server.pid, signal.SIGINT)
        watch.logged(server, "stopping (SIGINT)")
        os.kill(server.pid, signal.SIGINT)
        sock.sendall(b"y")
        assert sock.recv(1) == b"y"
    assert server.stop() == 0
    assert "0 cut" in server.log()


def test_only_the_master_hears_the_terminal(tmp_path: Path) -> None:
    """Ctrl-C is sent to all of the foreground's process group: who serves a connection is none of it."""
    path = str(tmp_path / "control")
    pid, terminal = pty.fork()
    if pid == 0:
        options = ["--module=echo:loop", "--bind=127.0.0.1:0", "--workers=1", f"--control={path}"]
        os.execv(sys.executable, [sys.executable, "-m", "prefork", "serve", *options])
    status = None
    try:
        watch.until("it listens", lambda: os.path.exists(path))
        watch.until("it runs", lambda: '"running"' in run("status", "--json", "--control", path).stdout)
        family = [child.pid for child in watch.family(pid)]
        assert [os.getsid(child) for child in family] == family, (
            "who is in none of its sessions can't be stopped for reading from it"
        )
        shown = os.read(terminal, 4096)
        (port,) = re.findall(rb"127\.0\.0\.1:(\d+)", shown)[:1]
        with connect(("127.0.0.1", int(port))) as sock:
            sock.sendall(b"x")
            assert sock.recv(1) == b"x"
            os.write(terminal, b"\x03")
            watch.until("it stops", lambda: b"no longer listening" in os.read(terminal, 4096))
            sock.sendall(b"y")
            assert sock.recv(1) == b"y"
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
    finally:
        os.close(terminal)
        if status is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def test_a_background_job_writes_its_log_to_a_terminal_that_forbids_it(tmp_path: Path) -> None:
    path = str(tmp_path / "control")
    command = [sys.executable, "-m", "prefork", "serve", "--module=echo:loop", "--bind=127.0.0.1:0", f"--control={path}"]
    leader = (
        "import os, signal, subprocess, sys\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "daemon = subprocess.Popen(sys.argv[1:], process_group=0)\n"
        "sys.exit(daemon.wait())\n"
    )
    pid, terminal = pty.fork()
    if pid == 0:
        attributes = termios.tcgetattr(1)
        attributes[3] |= termios.TOSTOP
        termios.tcsetattr(1, termios.TCSANOW, attributes)
        os.execv(sys.executable, [sys.executable, "-c", leader, *command])
    try:
        watch.until("it listens", lambda: os.path.exists(path))
        daemon = next(child.pid for child in watch.family(pid) if child.cmdline()[0].startswith("prefork: master"))
        watch.until("it runs", lambda: '"running"' in run("status", "--json", "--control", path).stdout)
        assert b"serving echo:loop" in os.read(terminal, 4096)
        os.kill(daemon, signal.SIGTERM)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
    finally:
        os.close(terminal)


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_closed_standard_descriptors_are_dev_null_and_nothing_of_ours(tmp_path: Path, closed: tuple[int, ...]) -> None:
    path = str(tmp_path / "control")
    redirects = " ".join(f"{fd}{'<' if fd == 0 else '>'}&-" for fd in closed)
    command = f'exec "$0" -m prefork serve --module=echo:loop --bind=127.0.0.1:0 --workers=1 --control={path} {redirects}'
    with subprocess.Popen(["sh", "-c", command, sys.executable], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as daemon:
        watch.until("it listens", lambda: os.path.exists(path))
        server = Server(None, daemon.pid, path, tmp_path / "log", daemon)
        worker = watch.settled(server, 1)["workers"][0]["pid"]
        for pid in (daemon.pid, worker):
            assert [watch.descriptors(pid)[fd] for fd in closed] == ["/dev/null"] * len(closed)
        daemon.terminate()
        assert daemon.wait(watch.DEADLINE) == 0


def test_a_dead_master_is_no_internal_error() -> None:
    with serve("echo:loop", workers=2) as server:
        pids = [child.pid for child in watch.family(server.pid)]
        server.process.kill()
        server.process.wait()
        watch.until("all have gone", lambda: all(map(watch.is_gone, pids)))
        assert "report it" not in server.log()


def test_a_socket_that_a_killed_daemon_left_is_no_instance(prefork_server: Start, tmp_path: Path) -> None:
    place = {"RUNTIME_DIRECTORY": str(tmp_path)}
    with serve("echo:loop", name="dead", control=str(tmp_path / "dead.sock")) as dead:
        dead.process.kill()
        dead.process.wait()
    prefork_server("echo:loop", name="live", control=str(tmp_path / "live.sock"))
    assert (tmp_path / "dead.sock").exists()
    done = run("status", "dead", **place)
    assert done.returncode == 1
    assert "no instance 'dead' is running; running: " in done.stderr


def test_a_scale_that_the_ceiling_delays_says_so_at_once(prefork_server: Start) -> None:
    server = prefork_server("tiny:who", folder=HANDLERS, workers=1, max_workers=2)
    with server.connect() as one, server.connect() as two:
        assert one.recv(64)
        assert two.recv(64)
        watch.logged(server, "max_workers = 2 reached")
        with watch.soon("scale at the ceiling"):
            done = run("scale", "2", "--control", server.control)
        assert done.returncode == 0
        assert "max_workers is reached" in done.stdout


def test_a_mistyped_variable_is_named_with_the_nearest(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", environment={"PREFORK_WOKERS": "3"})
    assert "PREFORK_WOKERS is no option: did you mean PREFORK_WORKERS?" in server.log()


def test_several_addresses_in_the_environment_are_separated_by_commas(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", bind=[], workers=1, environment={"PREFORK_BIND": "127.0.0.1:0,[::1]:0"})
    assert len(server.status()["listeners"]) == 2


def test_output_that_can_not_be_written_is_told_in_a_line(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=1)
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "prefork", "status", "--control", server.control]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("prefork: No space left on device: see the room on the disk")
    assert done.stderr.count("\n") == 1


def test_a_removed_working_directory_is_told_in_a_line(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    command = f'cd {folder} && rmdir {folder} && exec "$0" -m prefork serve --module echo:loop --control off'
    settings = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(["sh", "-c", command, sys.executable], capture_output=True, text=True, check=False, env=settings)
    assert done.returncode == 78
    assert done.stderr == "prefork: the working directory was removed: start prefork in one that exists\n"


def test_a_server_for_tests_says_what_it_can_not_do() -> None:
    with pytest.raises(ValueError, match="control='off'"), serve("echo:loop", control="off"):
        pass
    with pytest.raises(ValueError, match="at the top of a module"), serve(lambda sock: sock.close()):
        pass
    before = time.monotonic()
    with pytest.raises(StartError), serve("echo:loop", bind="7000"):
        pass
    assert time.monotonic() - before < watch.DEADLINE


def test_the_pid_file_is_the_masters_for_as_long_as_it_lives(prefork_server: Start, tmp_path: Path) -> None:
    path = tmp_path / "pid"
    server = prefork_server("echo:loop", workers=1, pid_file=str(path))
    assert path.read_text() == f"{server.pid}\n"
    assert server.command("reload")["ok"]
    with (
        pytest.raises(StartError, match=f"the daemon with pid {server.pid} is running and holds it") as caught,
        serve("echo:loop", pid_file=str(path)),
    ):
        pass
    assert caught.value.exit_status == 69
    assert path.read_text() == f"{server.pid}\n"
    server.process.kill()
    server.process.wait()
    assert path.exists()
    with serve("echo:loop", workers=1, pid_file=str(path)) as successor:
        assert path.read_text() == f"{successor.pid}\n"
    assert not path.exists()


def test_modules_in_the_working_directory_are_the_handlers_and_not_the_masters(tmp_path: Path) -> None:
    for name in ("json", "click", "selectors", "tomllib", "wave"):
        (tmp_path / f"{name}.py").write_text("1 / 0\n")
    (tmp_path / "mine.py").write_text("import wave\n")
    command = [sys.executable, "-m", "prefork", "check", "--module", "mine:loop"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 78, done.stderr
    assert "wave.py" in done.stderr
    assert "ZeroDivisionError" in done.stderr
    with pytest.raises(StartError, match="ZeroDivisionError"), serve("mine:loop", folder=tmp_path):
        pass
