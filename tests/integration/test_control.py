"""The control socket: what the commands do, who may give them, and what bad clients can't do."""

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from prefork.errors import RefusedError
from prefork.ops import control, instances
from prefork.printable import counted
from prefork.testing import Server, StartError, serve
from tests import watch
from tests.conftest import HANDLERS, Gate
from tests.load import Load

Start = Callable[..., Server]


def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """The real command line."""
    command = [sys.executable, "-m", "prefork", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env={**os.environ, **environment})


def talk(server: Server, data: bytes) -> bytes:
    """Raw bytes to the control socket, and all that comes back."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(server.control)
        try:
            sock.sendall(data)
            got = b""
            while more := sock.recv(65536):
                got += more
        except (BrokenPipeError, ConnectionResetError):
            return b""
    return got


def test_status_has_the_documented_keys(prefork_server: Start) -> None:
    server = prefork_server("tiny:who", folder=HANDLERS, workers=2, name="keys")
    with server.connect() as sock:
        assert sock.recv(64)
        watch.settled(server, 2)
        done = run("status", "--json", "--control", server.control)
    assert done.returncode == 0, done.stderr
    status: dict[str, Any] = json.loads(done.stdout)
    assert set(status) == {
        *("name", "module", "version", "pid", "state", "started_at", "uptime", "generation", "reload", "backoff", "max_workers"),
        *(
            "saturated_seconds",
            "saturated_since",
            "stalled_seconds",
            "stalled_since",
            "ceiling_since",
            "listeners",
            "totals",
            "duration",
            "workers",
            "overdue",
            "deaths",
        ),
    }
    assert (status["name"], status["module"], status["pid"], status["state"]) == ("keys", "tiny:who", server.pid, "running")
    assert set(status["listeners"][0]) == {"address", "queue", "queue_limit", "workers"}
    assert status["listeners"][0]["workers"] == {"target": 2, "starting": 0, "idle": 2, "busy": 1, "retiring": 0, "paused": 0}
    assert set(status["totals"]) == {"accepted", "serving", "ok", "error", "killed", "rejected", "forked", "exited"}
    assert set(status["duration"]) == {"p50", "p90", "p99"}
    keys = {"pid", "slot", "listener", "generation", "state", "since", "connections", "peer", "rss", "cpu"}
    assert all(set(worker) == keys for worker in status["workers"])
    busy = next(worker for worker in status["workers"] if worker["state"] == "busy")
    assert busy["rss"] > 1_000_000
    assert abs(busy["since"] - status["started_at"]) < 20


def test_the_identity_of_the_totals_holds_at_every_reading(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=4)
    last = 0
    with Load(server.address, clients=4) as load:
        for _ in range(100):
            totals = server.status()["totals"]
            assert watch.identity_holds(totals), totals
            assert totals["accepted"] >= last
            last = totals["accepted"]
    assert not load.failures
    watch.until("all is counted", lambda: server.status()["totals"]["ok"] == load.connections)


def test_the_table_is_for_people(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=2)
    with server.connect() as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
    done = run("status", "--control", server.control)
    assert done.returncode == 0
    for text in ("echo:loop", f"pid {server.pid}", "1 accepted", "LISTENER", f"127.0.0.1:{server.address[1]}", "0/2048", "IDLE"):
        assert text in done.stdout


def test_reload_waits_and_prints_the_traceback_when_refused(prefork_server: Start, module: Callable[[str], Path]) -> None:
    server = prefork_server("mine:loop", folder=module("def loop(sock):\n    pass\n"), workers=2)
    assert run("reload", "--control", server.control).stdout == "reloaded: generation 2 serves\n"
    module("def loop(sock):\n    pass\n1 / 0\n")
    done = run("reload", "--control", server.control)
    assert done.returncode == 1
    assert "Traceback (most recent call last):" in done.stderr
    assert 'mine.py", line 3' in done.stderr
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


@pytest.mark.parametrize(("wanted", "workers"), [("5", 5), ("+3", 5), ("-1", 1)])
def test_scale_waits_until_it_is_so(prefork_server: Start, wanted: str, workers: int) -> None:
    server = prefork_server("echo:loop", workers=2)
    done = run("scale", wanted, "--control", server.control)
    said = f"scaled: {counted(workers, 'acceptor', 'acceptors')} for each address\n"
    assert (done.returncode, done.stdout) == (0, said), done.stderr
    assert server.status()["listeners"][0]["workers"] == {
        "target": workers,
        "starting": 0,
        "idle": workers,
        "busy": 0,
        "retiring": 0,
        "paused": 0,
    }


@pytest.mark.parametrize(("wanted", "reason"), [("0", "must be 1 to 4"), ("5", "must be 1 to 4"), ("many", "must be N, +K or -K")])
def test_scale_refuses_what_can_not_be(prefork_server: Start, wanted: str, reason: str) -> None:
    server = prefork_server("echo:loop", workers=2, max_workers=4)
    done = run("scale", wanted, "--control", server.control)
    assert done.returncode == 1
    assert reason in done.stderr
    watch.settled(server, 2)


def test_stop_waits_until_the_daemon_has_gone(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=2)
    done = run("stop", "--control", server.control)
    assert done.stdout == "stopped: 0 connections accepted, 0 cut\n", done.stderr
    assert watch.is_gone(server.pid)
    assert not os.path.exists(server.control)
    assert server.stop() == 0


@pytest.mark.parametrize("how", ["--quick", "--timeout=0.1"])
def test_stop_can_be_hurried(prefork_server: Start, how: str) -> None:
    server = prefork_server("echo:loop", workers=2)
    with server.connect() as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        with watch.soon("a hurried stop"):
            assert "1 connection accepted, 1 cut" in run("stop", how, "--control", server.control).stdout


def test_an_instance_is_found_by_name_and_the_only_one_without(prefork_server: Start, tmp_path: Path) -> None:
    place = {"RUNTIME_DIRECTORY": str(tmp_path)}
    prefork_server("echo:loop", name="one", control=str(tmp_path / "one.sock"))
    found = json.loads(run("status", "one", "--json", **place).stdout)
    assert found["name"] == "one"
    prefork_server("echo:loop", name="two", control=str(tmp_path / "two.sock"))
    which = run("status", **place)
    assert which.returncode == 1
    assert "which instance? running: " in which.stderr
    nosuch = run("status", "three", **place)
    assert nosuch.returncode == 1
    assert "no instance 'three' is running; running: " in nosuch.stderr


def test_the_socket_is_ours_alone_and_in_the_runtime_directory(prefork_server: Start, tmp_path: Path) -> None:
    with serve("echo:loop", control=str(tmp_path / "c.sock")) as server:
        status = os.stat(server.control)
        assert stat.S_IMODE(status.st_mode) == 0o1600, "cleaners spare it"
    command = [sys.executable, "-m", "prefork", "serve", "--module=echo:loop", "--bind=127.0.0.1:0", "--name=placed"]
    with subprocess.Popen(command, env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}, stderr=subprocess.DEVNULL) as daemon:
        path = tmp_path / "prefork" / "placed.sock"
        watch.until("the socket is there", path.exists)
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        daemon.terminate()
    assert not path.exists()


def test_a_second_instance_of_a_name_is_refused(prefork_server: Start, tmp_path: Path) -> None:
    prefork_server("echo:loop", control=str(tmp_path / "c.sock"), name="twin")
    with (
        pytest.raises(StartError, match="an instance named twin is running") as caught,
        serve("echo:loop", control=str(tmp_path / "c.sock"), name="twin"),
    ):
        pass
    assert caught.value.exit_status == 69


@pytest.mark.parametrize("place", ["missing", "link", "file"])
def test_without_a_control_socket_the_daemon_says_so_once_and_serves(tmp_path: Path, place: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    if place == "file":
        (tmp_path / "prefork").mkdir(mode=0o700)
        (tmp_path / "prefork" / "echo.sock").write_text("not a socket")
    if place == "link":
        (tmp_path / "prefork").symlink_to("elsewhere")
    directory = str(tmp_path / "no" / "such") if place == "missing" else str(tmp_path)
    command = [sys.executable, "-m", "prefork", "serve", "--module=echo:loop", "--bind=127.0.0.1:0"]
    variable = "RUNTIME_DIRECTORY" if place == "missing" else "XDG_RUNTIME_DIR"
    environment = {key: value for key, value in os.environ.items() if key != "RUNTIME_DIRECTORY"} | {variable: directory}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as daemon:
        assert daemon.stderr is not None
        lines = [daemon.stderr.readline(), daemon.stderr.readline()]
        daemon.terminate()
    assert sum("no control socket, serving on without" in line for line in lines) == 1
    assert any("serving echo:loop" in line for line in lines)
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"garbage\n", "one line of JSON"),
        (b"[]\n", "one line of JSON"),
        (b'{"command": 3}\n', "one line of JSON"),
        (b'{"command": "nosuch"}\n', "unknown command"),
        (b'{"command": "stop", "timeout": "soon"}\n', "must be seconds"),
        (b'{"command": "scale"}\n', "must be N"),
        (b"[" * 4000 + b"\n", "one line of JSON"),
        (b"x" * 5000, "at most 4096 bytes"),
    ],
)
def test_a_bad_request_is_answered_with_what_is_wrong(prefork_server: Start, data: bytes, reason: str) -> None:
    server = prefork_server("echo:loop", workers=1)
    answer = talk(server, data)
    # A request that is cut off may end in a reset before the answer was read.
    assert reason in json.loads(answer)["reason"] if answer else len(data) > 4096
    assert server.status()["state"] == "running"


def test_a_hundred_megabytes_are_not_taken_in(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=1)
    before = watch.pss_kib(server.pid)
    for _ in range(4):
        talk(server, b"x" * 25_000_000)
    assert server.status()["state"] == "running"
    assert watch.pss_kib(server.pid) < before + 4096


@pytest.mark.slow
def test_a_thousand_clients_that_say_nothing_do_not_keep_it_from_serving(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=1)
    before = len(watch.descriptors(server.pid))
    with ExitStack() as stack:
        for number in range(1000):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(server.control)  # blocking: a Unix socket's full queue is EAGAIN at once otherwise
            try:
                if number % 2:
                    sock.sendall(b'{"command": ')
            except BrokenPipeError:
                continue  # turned away, there are too many
        # One more is being turned away at any time.
        assert len(watch.descriptors(server.pid)) <= before + control.CLIENTS + 1
        with server.connect() as client:
            client.sendall(b"hello")
            assert client.recv(5) == b"hello"
    watch.until("the daemon has dropped them", lambda: len(watch.descriptors(server.pid)) == before)
    assert server.status()["state"] == "running"


@pytest.mark.parametrize("unread", [True, False])
def test_a_command_that_was_let_go_unheard_is_said_again(tmp_path: Path, unread: bool) -> None:
    """In a crowd a daemon lets go of who seems to be silent, perhaps just when the command arrives, or just before."""
    path = str(tmp_path / "control.sock")

    def crowded() -> None:
        first, _ = listener.accept()
        if unread:
            assert watch.readable(first, watch.DEADLINE)
        else:
            first.shutdown(socket.SHUT_RD)
        first.close()
        second, _ = listener.accept()
        with second:
            second.sendall(b'{"ok": %s}' % (b"true" if second.recv(4096) == b'{"command": "stop"}\n' else b"false") + b"\n")

    with socket.socket(socket.AF_UNIX) as listener, ThreadPoolExecutor() as pool:
        listener.bind(path)
        listener.listen()
        listener.settimeout(watch.DEADLINE)
        daemon = pool.submit(crowded)
        assert instances.ask(path, "stop", watch.DEADLINE) == ({"ok": True}, [])
        daemon.result()


@contextmanager
def fake(path: Path, say: Callable[[socket.socket], None]) -> Iterator[str]:
    """What listens there and is no daemon: ``say`` is called with each client, in a process of its own, until that has gone."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        pid = os.fork()
        if pid == 0:
            try:
                while True:
                    client, _ = listener.accept()
                    with client, suppress(OSError):
                        client.recv(4096)
                        say(client)
            finally:
                os._exit(0)
    try:
        yield str(path)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def talk_for_ever(client: socket.socket) -> None:
    """As fast as it is heard."""
    while True:
        client.sendall(b" " * 65536)


def test_an_answer_that_never_ends_is_given_up(tmp_path: Path) -> None:
    with fake(tmp_path / "fake", talk_for_ever) as path:
        done = run("status", "--control", path)
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr == f"prefork: {path}: an answer of more than {instances.ANSWER_LIMIT} bytes: what listens there is no daemon\n"
    )


def test_an_answer_that_dribbles_and_one_that_never_begins_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dribble(client: socket.socket) -> None:
        while True:
            client.sendall(b" ")
            watch.readable(client, 0.01)

    monkeypatch.setattr(instances, "ANSWER_TIME", 0.2)
    with fake(tmp_path / "fake", dribble) as path, pytest.raises(RefusedError, match=r"no answer within 0\.2 s"):
        instances.ask(path, "reload", watch.DEADLINE)

    def wait(client: socket.socket) -> None:
        assert client.recv(1) == b"", "it has gone"

    with fake(tmp_path / "silent", wait) as path, pytest.raises(RefusedError, match=r"no answer within 0\.3 s"):
        instances.ask(path, "reload", 0.3)


def test_one_that_asks_to_be_asked_again_is_asked_for_no_longer(tmp_path: Path) -> None:
    def again(client: socket.socket) -> None:
        time.sleep(0.2)
        client.sendall(b'{"ok": false, "again": true}\n')

    with fake(tmp_path / "fake", again) as path, pytest.raises(RefusedError, match=r"no answer within 0\.3 s"):
        instances.ask(path, "status", 0.3)


@pytest.mark.parametrize(
    "answer",
    [
        b"\n",
        b"nothing\n",
        b"[]\n",
        b"[" * 100_000 + b"\n",
        b'{"ok": true}\n',
        b'{"ok": true, "ended": {}, "histogram": [], "boards": [{"high": [1000000000000, -1000000000000]}]}\n',
    ],
    ids=["an empty line", "no JSON", "no object", "too deep", "no status", "too many slots"],
)
@pytest.mark.parametrize("command", ["status", "reload", "stop"])
def test_an_answer_that_is_no_daemons_is_told_in_a_line(tmp_path: Path, answer: bytes, command: str) -> None:
    with fake(tmp_path / "fake", lambda client: client.sendall(answer)) as path:
        done = run(command, "--control", path)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch("prefork: .* (is no daemon|or none).*\n", done.stderr), done.stderr


def test_a_client_that_leaves_while_it_waits_is_forgotten(prefork_server: Start, gate: Gate) -> None:
    server = prefork_server("gated:loop", folder=HANDLERS, workers=1, environment=gate.environment)
    before = len(watch.descriptors(server.pid))
    with gate.closed(), socket.socket(socket.AF_UNIX) as sock:
        sock.connect(server.control)
        sock.sendall(b'{"command": "reload"}\n')
        watch.until("the reload is under way", lambda: server.status()["state"] == "reloading")
    watch.logged(server, "generation 2 serves")
    watch.until("nothing of it is left", lambda: len(watch.descriptors(server.pid)) == before)


def test_another_user_is_refused(prefork_server: Start, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user to try it")
    server = prefork_server("echo:loop", workers=1, control=str(tmp_path / "c.sock"))
    os.chmod(server.control, 0o666)
    for folder in [tmp_path, *tmp_path.parents]:
        if folder.stat().st_uid == 0 and folder != Path("/") and not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setgid(65534)
        os.setuid(65534)
        os.write(write, talk(server, b'{"command": "stop"}\n') or b"nothing")
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(write)
    with os.fdopen(read, "rb") as answer:
        assert answer.read() == b"nothing"
    assert "user 65534 is neither root nor this daemon's" in server.log()
    assert server.status()["state"] == "running"
