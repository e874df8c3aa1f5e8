"""What code and operators have done to daemons like this one: each ends in an error, a replaced process, or nothing."""

import fcntl
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from prefork.system.signals import PARENT_DIED
from prefork.testing import Server, StartError, connect, serve
from tests import watch
from tests.conftest import HANDLERS
from tests.faults.machine import small_disk
from tests.handlers.ending import RESET

Start = Callable[..., Server]
Module = Callable[[str], Path]

ALARM = """
import signal

def boom(signo, frame):
    raise TimeoutError

def loop(sock):
    data = sock.recv(100)
    sock.sendall(data)
    if data == b"tick":
        signal.signal(signal.SIGALRM, boom)
        signal.setitimer(signal.ITIMER_REAL, .0002, .0002)
"""


def test_an_alarm_that_rings_anywhere_in_a_worker_stays_in_that_worker(prefork_server: Start, module: Module) -> None:
    server = prefork_server("mine:loop", folder=module(ALARM), workers=4, spare_timeout=1)
    for _ in range(300):
        with server.connect() as sock:
            try:
                sock.sendall(b"tick")
                sock.recv(100)
            except ConnectionResetError:
                continue  # its own worker's alarm
    watch.settled(server, 4)
    with server.connect() as sock:
        sock.sendall(b"hello")
        assert sock.recv(100) == b"hello"


def test_an_attribute_error_at_import_is_told_with_its_traceback(module: Module) -> None:
    with (
        pytest.raises(StartError, match=r"module 'os' has no attribute 'nope'") as caught,
        serve("mine:loop", folder=module("import os\nos.nope\n")),
    ):
        pass
    assert caught.value.exit_status == 78
    assert "report it" not in str(caught.value)


def test_a_generator_is_no_handler(module: Module) -> None:
    with (
        pytest.raises(StartError, match="a handler is a plain function"),
        serve("mine:loop", folder=module("def loop(sock):\n    yield\n")),
    ):
        pass


def test_what_the_import_registered_for_the_end_is_not_run_by_each_worker(prefork_server: Start, module: Module) -> None:
    folder = module(
        "import atexit, os\n"
        "open('there', 'w').close()\n"
        "atexit.register(os.unlink, 'there')\n"
        "def loop(sock):\n    sock.sendall(str(os.path.exists('there')).encode())\n"
    )
    server = prefork_server("mine:loop", folder=folder, workers=3)
    assert server.command("scale", workers=1)["ok"]
    with server.connect() as sock:
        assert sock.recv(64) == b"True"


@pytest.mark.slow
def test_workers_that_end_before_they_serve_anybody_are_forked_ever_more_seldom(prefork_server: Start, module: Module) -> None:
    # Something else stands where the listener was.
    folder = module(
        "import os\n"
        "def start():\n"
        "    for fd in range(3, 20):\n"
        "        if os.path.exists(f'/proc/self/fd/{fd}') and os.readlink(f'/proc/self/fd/{fd}').startswith('socket:'):\n"
        "            os.dup2(1, fd)\n"
        "def loop(sock):\n    pass\n"
    )
    server = prefork_server("mine:loop", folder=folder, workers=2, on_worker_start="mine:start")
    log = watch.logged(server, "3 in a row, next try in 3.4 s")
    assert "ended before it served anybody: exit status 70" in log
    status = server.status()
    assert status["totals"]["forked"] < 20
    assert status["backoff"]["reason"].startswith("a worker ended before it served anybody")


def test_a_stopped_fork_server_is_replaced_even_when_nobody_needs_a_fork(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=2)
    os.kill(watch.fork_server(server), signal.SIGSTOP)
    watch.logged(server, "does not answer: it is killed")
    watch.logged(server, "generation 2 serves")
    watch.settled(server, 2)


@pytest.mark.parametrize("signo", [signal.SIGTERM, signal.SIGQUIT])
def test_a_stop_does_not_wait_for_a_stopped_fork_server(prefork_server: Start, signo: int) -> None:
    server = prefork_server("echo:loop", workers=2)
    stopped = watch.fork_server(server)
    with server.connect() as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        os.kill(stopped, signal.SIGSTOP)
        watch.until("it is stopped", lambda: psutil.Process(stopped).status() == psutil.STATUS_STOPPED)
        if signo == signal.SIGTERM:
            sock.close()
        with watch.soon("the stop"):
            assert server.stop(signo) == 0
    assert watch.is_gone(stopped)


def test_deadlines_of_months_are_fine(prefork_server: Start) -> None:
    server = prefork_server("tiny:who", folder=HANDLERS, workers=1, spare_timeout="9000h", boot_timeout=9e8)
    with ExitStack() as stack:
        for _ in range(3):
            assert stack.enter_context(server.connect()).recv(64)
            watch.settled(server, 1)
    watch.settled(server, 4)
    assert "internal error" not in server.log()


def test_a_configuration_that_is_a_pipe_is_refused_and_not_waited_for(prefork_server: Start, tmp_path: Path) -> None:
    file = tmp_path / "echo.toml"
    file.write_text("workers = 1\n")
    server = prefork_server("echo:loop", arguments=("--config", str(file)))
    file.unlink()
    os.mkfifo(file)
    assert "not a regular file" in server.command("reload")["reason"]
    file.unlink()
    file.write_text("workers = " + "9" * 5000)
    assert "not TOML" in server.command("reload")["reason"]
    assert server.status()["state"] == "running"


def test_a_log_pipe_that_nobody_reads_does_not_stop_the_master(tmp_path: Path) -> None:
    path = str(tmp_path / "control")
    command = [sys.executable, "-m", "prefork", "serve", "--module=echo:loop", "--bind=127.0.0.1:0", f"--control={path}"]
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    with subprocess.Popen([*command, "--workers=1"], stderr=write) as daemon:
        os.close(write)
        watch.until("it listens", lambda: os.path.exists(path))
        server = Server(None, daemon.pid, path, tmp_path / "log", daemon)
        watch.until("it runs", lambda: server.status()["state"] == "running")
        for number in range(100):
            assert server.command("scale", workers=2 - number % 2)["ok"]
        assert server.status()["state"] == "running"
        heard = os.read(read, 65536)
        assert server.command("scale", workers=2)["ok"]
        assert b" could not be written" in os.read(read, 65536)
        daemon.terminate()
    os.close(read)
    assert heard.count(b"\n") < 100


def test_a_control_socket_without_descriptors_to_spare_waits(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=1)
    used = len(watch.descriptors(server.pid))
    limits = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (used + 2, limits[1]))
    with ExitStack() as stack:
        for _ in range(8):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(server.control)
        watch.logged(server, "control client refused: Too many open files")
        refused = psutil.Process(server.pid).cpu_times()
        with server.connect() as client:
            client.sendall(b"hello")
            assert client.recv(5) == b"hello"
    assert server.status()["state"] == "running"
    assert psutil.Process(server.pid).cpu_times().user - refused.user < 1.0


def test_a_reload_without_descriptors_to_spare_is_refused_and_leaks_none(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=1)
    used = len(watch.descriptors(server.pid))
    limits = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
    for spare in (1, 3, 5, 7):
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (used + spare, limits[1]))
        os.kill(server.pid, signal.SIGHUP)
        watch.logged(server, "Too many open files", times=(spare + 1) // 2)
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, limits)
        watch.until("nothing has leaked", lambda: len(watch.descriptors(server.pid)) == used)
    assert server.command("reload")["ok"]


def test_two_free_ports_stay_two_over_a_reload(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=1, bind=["127.0.0.1:0", "127.0.0.1:0"])
    before = [listener["address"] for listener in server.status()["listeners"]]
    assert server.command("reload")["ok"]
    assert [listener["address"] for listener in server.status()["listeners"]] == before
    for address in before:
        host, _, port = address.rpartition(":")
        with connect((host, int(port))) as sock:
            sock.sendall(b"hello")
            assert sock.recv(5) == b"hello"


def test_a_reload_takes_backlog_mode_and_log_level(prefork_server: Start, tmp_path: Path) -> None:
    file = tmp_path / "echo.toml"
    path = tmp_path / "socket"
    file.write_text(f'bind = ["127.0.0.1:0", "unix:{path}"]\nbacklog = 64\nworkers = 1\n')
    server = prefork_server("ending:checked", folder=HANDLERS, bind=[], arguments=("--config", str(file)))
    file.write_text(f'bind = ["127.0.0.1:0", "unix:{path}?mode=0666"]\nbacklog = 128\nlog_level = "debug"\nworkers = 1\n')
    assert server.command("reload")["ok"]
    assert server.status()["listeners"][0]["queue_limit"] == 128
    assert path.stat().st_mode & 0o777 == 0o666
    with server.connect() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    watch.logged(server, "ended the connection: [Errno 107]")


def test_what_was_scaled_survives_a_dead_fork_server_but_not_a_reload(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=2, spare_timeout=1)
    assert server.command("scale", workers=4)["ok"]
    os.kill(watch.fork_server(server), signal.SIGKILL)
    watch.logged(server, "generation 2 serves")
    assert watch.settled(server, 4)["reload"] is None, "nobody has asked for one"
    assert server.command("reload")["ok"]
    assert watch.settled(server, 2)["reload"]["result"] == "ok"


def test_a_stop_can_be_hurried_afterwards_and_ends_a_farewell_too(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=1)
    with server.connect() as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        os.kill(server.pid, signal.SIGTERM)
        watch.logged(server, "stopping")
        with watch.soon("a stop that was hurried"):
            assert server.command("stop", timeout=0.2)["killed"] == 1
    assert server.stop() == 0


def test_a_worker_that_does_not_end_its_cleaning_up_is_cut_at_drain_timeout(prefork_server: Start, module: Module) -> None:
    folder = module("import atexit, time\ndef loop(sock):\n    atexit.register(time.sleep, 600)\n    sock.sendall(b'x')\n")
    server = prefork_server("mine:loop", folder=folder, workers=1, drain_timeout=0.5)
    with server.connect() as sock:
        assert sock.recv(1) == b"x"
    os.kill(server.pid, signal.SIGHUP)
    watch.logged(server, "its time to finish is over")
    watch.family_of(server.pid, 2, "it has gone")
    assert server.status()["totals"]["killed"] == 0


def test_a_signal_that_says_a_living_parent_is_dead_is_not_believed(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=2, spare_timeout=1)
    before = watch.settled(server, 2)["workers"]
    for child in watch.family(server.pid):
        os.kill(child.pid, PARENT_DIED)
    for _ in range(10):
        with server.connect() as sock:
            sock.sendall(b"hello")
            assert sock.recv(100) == b"hello"
    assert server.command("scale", workers="3")["ok"]  # by the same fork server
    after = watch.settled(server, 3)["workers"]
    assert {worker["pid"] for worker in before} < {worker["pid"] for worker in after}
    assert server.status()["generation"] == 1


def test_a_hook_that_does_not_end_is_cut_at_graceful_timeout(prefork_server: Start, module: Module) -> None:
    folder = module("import time\nfrom prefork.examples.echo import loop\ndef leave():\n    time.sleep(600)\n")
    server = prefork_server("mine:loop", folder=folder, workers=2, graceful_timeout=0.5, on_worker_exit="mine:leave")
    with watch.soon("a stop whose workers don't leave"):
        assert server.stop() == 0
    assert "stopped: 0 connections accepted, 0 cut" in server.log()


def test_a_mode_that_can_not_be_changed_is_told_and_the_address_is_served_on(prefork_server: Start, tmp_path: Path) -> None:
    with small_disk() as disk:
        path, file = disk / "socket", tmp_path / "prefork.toml"
        file.write_text(f"bind = ['unix:{path}?mode=0600']\nworkers = 1")
        server = prefork_server("echo:loop", bind=[], arguments=("--config", str(file)))
        holder, _, folder = str(disk).removeprefix("/proc/").partition("/root")
        subprocess.run(["nsenter", "-t", holder, "-m", "mount", "-o", "remount,ro", folder], check=True)
        file.write_text(f"bind = ['unix:{path}?mode=0660']\nworkers = 2")
        assert server.command("reload")["ok"]
        assert f"unix:{path} stays as it was: [Errno 30] Read-only file system" in server.log()
        assert path.stat().st_mode & 0o777 == 0o600
        watch.settled(server, 2)
        with connect(str(path)) as sock:
            sock.sendall(b"hello")
            assert sock.recv(100) == b"hello"
        os.kill(watch.fork_server(server), signal.SIGKILL)
        watch.logged(server, "generation 3 serves")
        subprocess.run(["nsenter", "-t", holder, "-m", "mount", "-o", "remount,rw", folder], check=True)
        assert server.command("reload")["ok"]
        assert path.stat().st_mode & 0o777 == 0o660, "it was not forgotten"


def test_a_vanished_directory_of_a_socket_does_not_disturb_the_stop(prefork_server: Start, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    server = prefork_server("echo:loop", workers=1, bind=f"unix:{folder}/socket")
    (folder / "socket").unlink()
    folder.rmdir()
    folder.write_text("a file")
    assert server.stop() == 0
    assert "stopped: 0 connections accepted" in server.log()


def test_connections_of_a_worker_that_nobody_knew_are_counted(prefork_server: Start, module: Module) -> None:
    folder = module(
        "import os, time\n"
        "def slowly():\n    if os.path.exists('slow'):\n        time.sleep(1.0)\n"
        "os.register_at_fork(after_in_parent=slowly)\n"
        "def loop(sock):\n"
        "    while data := sock.recv(64):\n"
        "        if data == b'end':\n            os._exit(0)\n"
        "        sock.sendall(data)\n"
    )
    server = prefork_server("mine:loop", folder=folder, workers=1)
    (folder / "slow").touch()
    with server.connect() as held:
        held.sendall(b"x")
        assert held.recv(1) == b"x"
        # The replacement exists, and its fork server sleeps before it can say so.
        for _ in range(5):
            with server.connect() as sock:
                sock.sendall(b"y")
                assert sock.recv(1) == b"y"
        with server.connect() as sock:
            sock.sendall(b"end")
            assert sock.recv(1) == b""
        os.kill(watch.fork_server(server), signal.SIGKILL)
        (folder / "slow").unlink()
        watch.logged(server, "generation 2 serves")
    watch.until("the killed one is counted", lambda: server.status()["totals"]["killed"] == 1)
    totals = server.status()["totals"]
    assert watch.identity_holds(totals)
    assert (totals["accepted"], totals["ok"], totals["serving"]) == (7, 6, 0)


@pytest.mark.slow
def test_a_fork_server_that_floods_its_channel_with_nonsense_is_replaced(prefork_server: Start, module: Module) -> None:
    source = (
        "import os, socket\n"
        "def loop(sock):\n    pass\n"
        "if os.path.exists('flood') and os.fork() == 0:\n"
        "    for fd in range(3, 30):\n"
        "        try:\n"
        "            channel = socket.socket(fileno=os.dup(fd))\n"
        "            if channel.type == socket.SOCK_SEQPACKET:\n"
        "                channel.setblocking(True)\n"
        "                while True:\n"
        "                    channel.send(os.urandom(40))\n"
        "        except OSError:\n"
        "            continue\n"
        "    os._exit(0)\n"
    )
    folder = module(source)
    server = prefork_server("mine:loop", folder=folder, workers=1)
    (folder / "flood").touch()
    os.kill(server.pid, signal.SIGHUP)
    watch.logged(server, "made no sense and w")
    (folder / "flood").unlink()
    watch.until("a reload is done", lambda: server.command("reload")["ok"])
    watch.settled(server, 1)
    assert "internal error" not in server.log()
