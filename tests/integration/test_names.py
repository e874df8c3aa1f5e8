"""Names that are swept away while a daemon runs: its control socket, its lock, its pid file, the path of a `unix:` listener."""

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefork.ops import instances
from prefork.testing import Server, StartError, connect, serve
from tests import watch
from tests.conftest import HANDLERS
from tests.integration.test_control import run
from tests.load import Load

Start = Callable[..., Server]
Module = Callable[[str], Path]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder that only we can write to."""
    folder = tmp_path / "own"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder like /tmp."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


def second(control: Path, **environment: str) -> str:
    """Why another instance with that control socket does not start."""
    with pytest.raises(StartError) as caught, serve("echo:loop", control=str(control), workers=1, environment=environment):
        pass
    assert caught.value.exit_status == 69
    return str(caught.value)


def reload(server: Server, generation: int) -> None:
    """Have it reload by a signal: no command finds it."""
    os.kill(server.pid, signal.SIGHUP)
    watch.logged(server, f"generation {generation} serves ")


def test_the_lock_is_ours_alone_and_goes_with_the_daemon(own: Path) -> None:
    with serve("echo:loop", control=str(own / "c"), workers=1) as server:
        lock = own / "c.lock"
        assert lock.read_text() == f"{server.pid}\n"
        assert stat.S_IMODE(lock.stat().st_mode) == 0o1600
        assert f"the daemon with pid {server.pid} is running and holds it" in second(own / "c")
    assert not list(own.iterdir())


@pytest.mark.parametrize("place", ["own", "shared"])
def test_a_second_instance_does_not_start_though_the_control_socket_was_swept_away(own: Path, shared: Path, place: str) -> None:
    control = (own if place == "own" else shared) / "c"
    environment = {"RUNTIME_DIRECTORY": str(own)}
    with serve("echo:loop", control=str(control), workers=1, name="twin", environment=environment) as server:
        control.unlink()
        told = second(control, **environment)
        assert f"the daemon with pid {server.pid} is running" in told
        assert not any(entry.name.endswith(".lock") for entry in shared.iterdir()), "others can write there"
    assert not list(own.iterdir())


def test_a_lock_that_others_could_take_is_not_made(own: Path, shared: Path) -> None:
    with serve("echo:loop", control=str(shared / "c"), workers=1, environment={"RUNTIME_DIRECTORY": str(shared)}) as server:
        watch.logged(server, f"there is no place for a lock: others can write to {shared}")
        assert server.command("reload")["ok"]
        assert os.listdir(shared) == ["c"]
        assert "is in use" in second(shared / "c", RUNTIME_DIRECTORY=str(shared))


@pytest.mark.parametrize("lock", [fcntl.LOCK_SH, fcntl.LOCK_EX])
def test_a_lock_that_takes_no_right_to_write_keeps_nobody_from_starting(own: Path, lock: int) -> None:
    (own / "c.lock").write_text("1\n")
    with (own / "c.lock").open() as file:
        fcntl.flock(file, lock)
        with serve("echo:loop", control=str(own / "c"), workers=1):
            pass


def test_without_a_control_socket_there_is_no_lock(own: Path) -> None:
    command = [sys.executable, "-m", "prefork", "serve", "--module=echo:loop", "--bind=127.0.0.1:0", "--control=off"]
    environment = {**os.environ, "RUNTIME_DIRECTORY": str(own)}
    with contextlib.ExitStack() as stack:
        for number in range(2):
            log = stack.enter_context((own.parent / f"log{number}").open("w+"))
            daemon = stack.enter_context(subprocess.Popen(command, env=environment, stderr=log))
            stack.callback(daemon.terminate)
            path = Path(log.name)
            watch.until("it serves", lambda path=path: " serving " in path.read_text())  # type: ignore[misc]
        assert not list(own.iterdir())


def test_a_killed_daemon_whose_worker_still_serves_is_no_obstacle(own: Path) -> None:
    with serve("echo:loop", control=str(own / "c"), workers=1) as server, server.connect() as held:
        server.process.kill()
        server.process.wait()
        with serve("echo:loop", control=str(own / "c"), workers=1) as successor:
            assert (own / "c.lock").read_text() == f"{successor.pid}\n"
            held.sendall(b"still here")
            assert held.recv(64) == b"still here"


@pytest.mark.parametrize("how", ["reload", "upgrade"])
def test_what_was_swept_away_is_there_again(own: Path, tmp_path: Path, how: str) -> None:
    environment = {"RUNTIME_DIRECTORY": str(own)}
    control, pid_file = own / "c", tmp_path / "pid"
    with serve("echo:loop", control=str(control), pid_file=str(pid_file), workers=1, environment=environment) as server:
        for path in (control, own / "c.lock", pid_file):
            path.unlink()
        os.kill(server.pid, signal.SIGHUP if how == "reload" else signal.SIGUSR2)
        watch.logged(server, "generation 2 serves ")
        for path in (control, own / "c.lock", pid_file):
            assert f"{path} was removed while the daemon runs: it is there again" in server.log()
        assert server.status()["generation"] == 2
        assert pid_file.read_text() == (own / "c.lock").read_text() == f"{server.pid}\n"
        assert f"pid {server.pid} is running" in second(control)
    assert not list(own.iterdir())
    assert not pid_file.exists()


def test_an_upgrade_keeps_the_lock(own: Path) -> None:
    with serve("echo:loop", control=str(own / "c"), workers=1) as server:
        inode = (own / "c.lock").stat().st_ino
        os.kill(server.pid, signal.SIGUSR2)
        watch.logged(server, "generation 2 serves ")
        assert (own / "c.lock").stat().st_ino == inode
        (own / "c").unlink()
        assert f"pid {server.pid} is running" in second(own / "c")


def test_the_whole_runtime_directory_is_made_again(own: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "RUNTIME_DIRECTORY"}
    environment["XDG_RUNTIME_DIR"] = str(own)
    command = [sys.executable, "-m", "prefork", "serve", "--module=echo:loop", "--bind=127.0.0.1:0", "--workers=1"]
    path, log = own / "prefork" / "echo.sock", own.parent / "log"
    with log.open("w") as file, subprocess.Popen(command, env=environment, stderr=file) as daemon:
        server = Server(None, daemon.pid, str(path), log, daemon)
        try:
            watch.logged(server, " serving ")
            shutil.rmtree(own / "prefork")
            reload(server, 2)
            assert server.status()["pid"] == daemon.pid
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            assert sorted(os.listdir(path.parent)) == ["echo.sock", "echo.sock.lock"]
            assert run("stop", "echo", RUNTIME_DIRECTORY=str(path.parent)).returncode == 0
        finally:
            daemon.terminate()


@pytest.mark.parametrize("how", ["reload", "upgrade"])
def test_a_name_that_can_not_be_brought_back_is_a_refusal(own: Path, tmp_path: Path, how: str) -> None:
    with serve("echo:loop", control=str(own / "c"), workers=1) as server:
        own.rename(tmp_path / "elsewhere")
        os.kill(server.pid, signal.SIGHUP if how == "reload" else signal.SIGUSR2)
        watch.logged(server, f"refused, generation 1 keeps serving: {own}/ was removed while this daemon runs")
        (tmp_path / "elsewhere").rename(own)
        assert server.command("reload")["ok"], "it is the same again"
        assert server.status()["generation"] == 2


def test_what_another_program_has_put_there_is_left_alone(own: Path) -> None:
    with serve("echo:loop", control=str(own / "c"), workers=1) as server:
        (own / "c").unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(own / "c"))
            other.listen()
            os.kill(server.pid, signal.SIGHUP)
            watch.logged(server, f"refused, generation 1 keeps serving: unix:{own}/c is in use by ")
            inode = (own / "c").stat().st_ino
        assert (own / "c").stat().st_ino == inode
        (own / "c").unlink()
        reload(server, 2)
        assert server.status()["generation"] == 2


def test_two_that_run_since_a_sweep_know_of_each_other(own: Path) -> None:
    """The whole folder was removed, and another instance started before the first one has reloaded."""
    with serve("echo:loop", control=str(own / "c"), workers=1) as first:
        for name in ("c", "c.lock"):
            (own / name).unlink()
        with serve("echo:loop", control=str(own / "c"), workers=1) as other:
            os.kill(first.pid, signal.SIGHUP)
            watch.logged(first, f"the daemon with pid {other.pid} is running and holds it")
            assert other.status()["pid"] == other.pid
        reload(first, 2)
        assert first.status()["pid"] == first.pid


# -- the path of a listener


@pytest.mark.parametrize("how", ["reload", "upgrade"])
def test_a_listener_has_its_path_again_and_the_old_socket_is_served_empty(own: Path, how: str) -> None:
    path = own / "s"
    with serve("echo:loop", bind=f"unix:{path}?mode=0660", workers=2) as server:
        held = connect(str(path))
        with held:
            held.sendall(b"1")
            assert held.recv(1) == b"1"
            assert server.command("suspend")["ok"]
            with connect(str(path)) as waiting:  # in the queue of the old socket
                waiting.sendall(b"2")
                path.unlink()
                assert server.command(how)["ok"]
                watch.logged(server, f"listening on unix:{path}", 1)
                assert server.command("resume")["ok"]
                assert path.stat().st_mode & 0o777 == 0o660
                with connect(str(path)) as fresh:
                    fresh.sendall(b"3")
                    assert fresh.recv(1) == b"3"
                assert waiting.recv(1) == b"2"
                held.sendall(b"4")
                assert held.recv(1) == b"4"
        watch.until("one address", lambda: len(server.status()["listeners"]) == 1)
        assert "no longer listening" not in server.log(), "it is listened on"
        assert server.wait_for_totals(ok=3)["accepted"] == 3
    assert not path.exists()


def test_a_path_that_comes_back_under_load_loses_nobody(own: Path, prefork_server: Start) -> None:
    path = own / "s"
    server = prefork_server("echo:loop", bind=["127.0.0.1:0", f"unix:{path}"], workers=4)
    with Load(server.address, clients=4) as load:
        for _ in range(3):
            path.unlink()
            assert server.command("reload")["ok"]
            with connect(str(path)) as sock:
                sock.sendall(b"x")
                assert sock.recv(1) == b"x"
            watch.until("the old socket is closed", lambda: listening_in(own) == 1)
    assert not load.failures


def listening_in(folder: Path) -> int:
    """Listening sockets that were bound there (proc(5)), whatever has become of their paths."""
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    return sum(row[-1].startswith(f"{folder}/") and row[3] == "00010000" for row in rows)


@pytest.mark.parametrize("kind", ["file", "daemon", "folder"])
def test_a_path_that_can_not_come_back_is_a_refusal_and_serves_those_inside(own: Path, kind: str, tmp_path: Path) -> None:
    path = own / "s"
    with serve("echo:loop", bind=["127.0.0.1:0", f"unix:{path}"], workers=1) as server, connect(str(path)) as held:
        path.unlink()
        with contextlib.ExitStack() as stack:
            if kind == "file":
                path.write_text("mine")
                reason = "something that is not a socket is in the way"
            elif kind == "daemon":
                other = stack.enter_context(socket.socket(socket.AF_UNIX))
                other.bind(str(path))
                other.listen()
                reason = "is in use"
            else:
                own.rename(tmp_path / "elsewhere")
                reason = f"the directory {own} does not exist"
            answer: dict[str, Any] = server.command("reload")
            assert not answer["ok"]
            assert reason in answer["reason"]
            held.sendall(b"x")
            assert held.recv(1) == b"x"


def test_a_reload_that_is_refused_leaves_no_path(own: Path, module: Module) -> None:
    path = own / "s"
    folder = module("def loop(sock): pass")
    with serve("mine:loop", folder=folder, bind=f"unix:{path}", workers=1) as server:
        path.unlink()
        module("1 / 0")
        assert not server.command("reload")["ok"]
        assert not path.exists()
        module("def loop(sock): pass")
        assert server.command("reload")["ok"]
        assert path.exists()


def test_a_roll_back_says_that_the_path_is_missing_still(own: Path, module: Module) -> None:
    path = own / "s"
    folder = module("def loop(sock): sock.sendall(b'1')")
    with serve("mine:loop", folder=folder, bind=f"unix:{path}", workers=1, canary=60) as server:
        path.unlink()
        module("import os\ndef loop(sock): os._exit(1)")
        os.kill(server.pid, signal.SIGHUP)
        watch.logged(server, "is on trial")
        with connect(str(path)) as sock:
            watch.cut(sock)
        watch.logged(server, "taken back")
        assert f"the path of unix:{path} was removed while the daemon runs" in server.log()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a socket away")
def test_it_is_its_users_again(own: Path) -> None:
    path = own / "s"
    with serve("echo:loop", bind=f"unix:{path}?user=nobody", workers=1) as server:
        path.unlink()
        assert server.command("reload")["ok"]
        assert path.stat().st_uid == 65534


def test_the_path_of_a_socket_that_is_anothers_is_theirs(own: Path) -> None:
    path = own / "s"
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(str(path))
        theirs.listen()
        command = [sys.executable, "-m", "prefork", "serve", "--module=tiny:who", "--workers=1", f"--bind=fd:{theirs.fileno()}"]
        with watch.running(command, HANDLERS, own, fds=(theirs.fileno(),)) as server:
            path.unlink()
            assert server.command("reload")["ok"]
            assert not path.exists()


def test_a_lock_is_looked_for_where_it_was_made(own: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(own))
    assert instances.lock_path(f"{own}/c") == f"{own}/c.lock"
    (own.parent / "link").symlink_to(shared)
    first, second = instances.lock_path(f"{shared}/c"), instances.lock_path(f"{own.parent}/link/c")
    assert first == second
    assert os.path.dirname(first) == str(own)
    with pytest.raises(OSError, match="No such file"):
        instances.lock_path(f"{own}/no/c")
