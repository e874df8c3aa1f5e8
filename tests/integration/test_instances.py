"""Whom a command believes: what listens at a control socket's path may be anybody's."""

import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from prefork.errors import RefusedError
from prefork.net.unix import open_unix
from prefork.ops import instances
from prefork.testing import Server
from tests import watch
from tests.integration.test_control import run

Start = Callable[..., Server]
# Neither has to exist.
MALLORY, ALICE = 65534, 65533
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become other users to try it")


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder like /tmp: everybody can write to it, nobody can remove what is somebody else's."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


def forked(uid: int, what: Callable[[], str]) -> tuple[int, int]:
    """A process of that user that does this, and a descriptor to read what it returns."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        said = "it did not become that user"
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            said = what()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        finally:
            os.write(write, said.encode())
            os._exit(0)
    os.close(write)
    return pid, read


def as_user(uid: int, what: Callable[[], str]) -> str:
    """What this returns when that user does it."""
    pid, read = forked(uid, what)
    with os.fdopen(read) as said:
        text = said.read()
    os.waitpid(pid, 0)
    return text


@contextmanager
def impostor(path: Path, uid: int = MALLORY) -> Iterator[Callable[[], str]]:
    """A process of another user that listens there and takes one connection; gives what it was told."""

    def listen() -> str:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(path))
            path.chmod(0o666)
            sock.listen()
            while True:
                connection, _ = sock.accept()
                with connection:
                    if told := connection.recv(4096):
                        return told.decode()

    pid, read = forked(uid, listen)

    def told() -> str:
        with os.fdopen(os.dup(read)) as said:
            return said.read()

    try:
        watch.until("it listens", lambda: path.exists() and stat.S_IMODE(path.stat().st_mode) == 0o666)
        yield told
    finally:
        with socket.socket(socket.AF_UNIX) as last:
            if not last.connect_ex(str(path)):
                last.sendall(b"nothing was asked")
        os.waitpid(pid, 0)
        os.close(read)


def test_root_does_not_ask_what_another_user_has_put_into_a_shared_folder(shared: Path) -> None:
    path = shared / "echo.sock"
    with impostor(path) as told:
        done = run("stop", "--control", str(path))
        assert done.returncode == 1
        assert f"{path}: user nobody (pid " in done.stderr
        assert "others could have put it there" in done.stderr
        listed = run("stop", "echo", RUNTIME_DIRECTORY=str(shared))
        assert "no instance 'echo' is running" in listed.stderr
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(str(path))
            last.sendall(b"nothing was asked")
        assert told() == "nothing was asked"


def test_root_asks_another_users_daemon_where_only_that_user_can_have_put_it(shared: Path) -> None:
    own = shared / "own"
    own.mkdir(0o755)
    os.chown(own, MALLORY, MALLORY)
    with impostor(own / "echo.sock") as told:
        link = shared / "link.sock"
        link.symlink_to(own / "echo.sock")
        os.chown(link, MALLORY, MALLORY, follow_symlinks=False)
        (shared / "folder").symlink_to(own)
        os.chown(shared / "folder", ALICE, ALICE, follow_symlinks=False)
        for path in (link, shared / "folder" / "echo.sock"):
            with pytest.raises(RefusedError, match="it is a link"):
                instances.ask(str(path), "stop", 10.0)
        os.chown(own, ALICE, ALICE)
        with pytest.raises(RefusedError, match="others could have put it there"):
            instances.ask(str(own / "echo.sock"), "stop", 10.0)
        os.chown(own, MALLORY, MALLORY)
        os.chown(shared / "folder", 0, 0, follow_symlinks=False)
        with pytest.raises(RefusedError, match="without an answer"):
            instances.ask(str(shared / "folder" / "echo.sock"), "stop", 10.0)
        assert told() == '{"command": "stop"}\n'


def test_a_user_asks_neither_another_user_nor_through_anybodys_link(shared: Path) -> None:
    own = shared / "own"
    own.mkdir(0o755)
    os.chown(own, MALLORY, MALLORY)
    (shared / "link.sock").symlink_to(own / "echo.sock")

    def ask(path: Path) -> Callable[[], str]:
        return lambda: str(instances.ask(str(path), "status", 10.0))

    with impostor(own / "echo.sock") as told:
        for path in (own / "echo.sock", shared / "link.sock"):
            said = as_user(ALICE, ask(path))
            assert said.startswith(f"RefusedError: {path}: ")
            # Where fs.protected_symlinks is set, the kernel itself does not follow another user's link.
            assert "a daemon hears only its own user and root" in said
        assert "without an answer" in as_user(MALLORY, ask(own / "echo.sock")), "its own user does ask it"
        assert told() == '{"command": "status"}\n'


@pytest.mark.parametrize("mode", [0o600, 0o666])
def test_a_user_is_told_that_roots_daemon_hears_only_root(prefork_server: Start, shared: Path, mode: int) -> None:
    server = prefork_server("echo:loop", workers=1, control=str(shared / "c.sock"))
    os.chmod(server.control, mode)
    said = as_user(ALICE, lambda: str(instances.ask(server.control, "stop", 10.0)))
    assert said.startswith(f"RefusedError: {server.control}: ")
    assert "a daemon hears only its own user and root" in said
    assert server.status()["state"] == "running"


@pytest.mark.parametrize("to", ["a live socket", "a file", "nothing"])
def test_a_daemon_does_not_follow_a_link_at_its_control_path(shared: Path, to: str) -> None:
    target = shared / "target"
    with socket.socket(socket.AF_UNIX) as other:
        if to == "a live socket":
            other.bind(str(target))
            other.listen()
        if to == "a file":
            target.write_text("precious")
        path = shared / "echo.sock"
        path.symlink_to(target)
        log = log_of_a_daemon(path)
        assert "no control socket, serving on without" in log
        assert "not a socket is in the way" in log
        assert path.is_symlink()
        assert target.exists() == (to != "nothing")
        if to == "a file":
            assert target.read_text() == "precious"


def log_of_a_daemon(path: Path) -> str:
    """The log of a daemon with this control path, which is stopped once it serves."""
    command = [sys.executable, "-m", "prefork", "serve", "--module=echo:loop", "--bind=127.0.0.1:0", f"--control={path}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as daemon:
        assert daemon.stderr is not None
        log = ""
        while "serving echo:loop" not in log:
            line = daemon.stderr.readline()
            assert line, log
            log += line
        daemon.terminate()
    return log


def test_a_socket_of_another_user_at_the_path_is_not_replaced(shared: Path) -> None:
    path = shared / "echo.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    os.chown(path, MALLORY, MALLORY)
    inode = path.stat().st_ino
    said = as_user(ALICE, lambda: str(open_unix(str(path), 0o600, 1)))
    assert said.startswith("PermissionError: ")
    assert [entry.name for entry in shared.iterdir()] == ["echo.sock"], "nothing of ours is left"
    assert path.stat().st_ino == inode


def test_a_runtime_directory_of_another_user_is_not_used(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shared / "prefork").mkdir(0o755)
    os.chown(shared / "prefork", MALLORY, MALLORY)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(shared))
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    with pytest.raises(PermissionError, match=f"{shared}/prefork must be a directory of user 0"):
        instances.default_path("echo")
