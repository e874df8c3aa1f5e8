"""Addresses: sockets that others have opened, Unix sockets with owners, and what a reload does with those that change."""

import fcntl
import grp
import os
import pwd
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from prefork.testing import Server, StartError, connect, serve
from tests import watch
from tests.conftest import HANDLERS
from tests.load import Load

Start = Callable[..., Server]
SERVE = ["-m", "prefork", "serve", "--module=tiny:who", "--workers=1", "--log-level=debug"]
# What systemd does between fork and exec: the sockets are 3, 4, ..., and the variables name this very process.
PASS_ON = """
import fcntl, os, sys
passed, names, pid, arguments = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:]
fds = [int(fd) for fd in passed.split(",")]
kept = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in fds]
for place, fd in enumerate(kept):
    os.dup2(fd, 3 + place)
os.environ.update(LISTEN_FDS=str(len(fds)), LISTEN_PID=pid or str(os.getpid()))
if names:
    os.environ["LISTEN_FDNAMES"] = names
os.execv(sys.executable, [sys.executable, *arguments])
"""


def listening(family: int = socket.AF_INET, address: object = ("127.0.0.1", 0)) -> socket.socket:
    sock = socket.socket(family)
    sock.bind(address)  # type: ignore[arg-type]
    sock.listen(16)
    return sock


def answers(address: object) -> bool:
    with connect(address) as sock:
        return int(sock.recv(64)) > 0


@contextmanager
def started(tmp_path: Path, command: list[str], fds: tuple[int, ...]) -> Iterator[Server]:
    """A daemon that was started with these descriptors."""
    control, log = str(tmp_path / "control"), tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *command, f"--control={control}"], cwd=HANDLERS, pass_fds=fds, stdout=file, stderr=file
        )
    server = Server(None, process.pid, control, log, process)
    try:
        watch.until("it serves or has ended", lambda: " serving " in server.log() or process.poll() is not None)
        yield server
    finally:
        server.stop()


def test_a_child_from_before_that_has_ended_is_no_zombie(tmp_path: Path) -> None:
    become = (
        "import os, sys\n"
        "if not (pid := os.fork()): os._exit(0)\n"
        "os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)\n"  # its signal comes before there is a daemon
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n"
    )
    with started(tmp_path, ["-c", become, *SERVE, "--bind=127.0.0.1:0"], ()) as server:
        assert server.status()["state"] == "running"
        assert all(child.status() != psutil.STATUS_ZOMBIE for child in psutil.Process(server.pid).children())


@contextmanager
def activated(
    tmp_path: Path, sockets: dict[str, socket.socket], *options: str, pid: str = "", names: str | None = None
) -> Iterator[Server]:
    fds = tuple(sock.fileno() for sock in sockets.values())
    told = ":".join(sockets) if names is None else names
    command = ["-c", PASS_ON, ",".join(map(str, fds)), told, pid, *SERVE, *options]
    with started(tmp_path, command, fds) as server:
        yield server


def test_an_inherited_socket_is_served_and_left_to_its_owner(tmp_path: Path) -> None:
    with listening() as ours:
        address = ours.getsockname()
        with started(tmp_path, [*SERVE, f"--bind=fd:{ours.fileno()}"], (ours.fileno(),)) as server:
            assert server.status()["listeners"][0]["address"] == "{}:{}".format(*address)
            assert answers(address)
            os.kill(server.pid, signal.SIGHUP)
            watch.logged(server, "generation 2 serves")
            assert answers(address)
            with connect(address) as held:
                assert held.recv(64)
                os.kill(server.pid, signal.SIGTERM)
                watch.logged(server, "no longer listening")
                # The daemon has let go of it; the queue goes on, for whoever comes next.
                with connect(address) as waiting:
                    held.close()
                    assert server.process.wait(watch.DEADLINE) == 0
                    accepted, _ = ours.accept()
                    with accepted:
                        accepted.sendall(b"the next one")
                        assert waiting.recv(64) == b"the next one"


def test_a_killed_master_leaves_an_inherited_socket_alone(tmp_path: Path) -> None:
    with listening() as ours, started(tmp_path, [*SERVE, f"--bind=fd:{ours.fileno()}"], (ours.fileno(),)) as server:
        pids = [child.pid for child in watch.family(server.pid)]
        server.process.kill()
        server.process.wait()
        watch.until("all have gone", lambda: all(map(watch.is_gone, pids)), 5.0)
        with connect(ours.getsockname()), ours.accept()[0]:
            pass
        os.unlink(server.control)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nothing", r"fd:99: no descriptor 99 was open when prefork started"),
        ("file", "is no socket"),
        ("unbound", r"is not a listening stream socket \(TCP or Unix\)"),
        ("datagram", r"is not a listening stream socket \(TCP or Unix\)"),
    ],
)
def test_a_descriptor_that_is_no_listener_is_told(tmp_path: Path, what: str, message: str) -> None:
    if what in ("file", "nothing"):
        fd = os.open("/dev/null", os.O_RDONLY)
    else:
        fd = socket.socket(socket.AF_INET, socket.SOCK_STREAM if what == "unbound" else socket.SOCK_DGRAM).detach()
    named = 99 if what == "nothing" else fd
    try:
        with started(tmp_path, [*SERVE, f"--bind=fd:{named}"], (fd,)) as server:
            assert server.process.wait(watch.DEADLINE) == 69
            assert re.search(message, server.log()), server.log()
    finally:
        os.close(fd)


def test_a_descriptor_of_prefork_itself_can_not_be_named_by_a_reload(prefork_server: Start, tmp_path: Path) -> None:
    file = tmp_path / "prefork.toml"
    file.write_text("bind = ['127.0.0.1:0']")
    server = prefork_server("echo:loop", bind=[], arguments=("--config", str(file)))
    listening = next(fd for fd, what in watch.descriptors(server.pid).items() if what.startswith("socket:") and fd > 2)
    file.write_text(f"bind = ['127.0.0.1:0', 'fd:{listening}']")
    answer = server.command("reload")
    assert not answer["ok"]
    assert "was open when prefork started" in answer["reason"]


def test_activated_sockets_are_used_when_no_bind_is_given(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with listening() as tcp, listening(socket.AF_UNIX, path) as unix:
        with activated(tmp_path, {"web": tcp, "local": unix}) as server:
            shown = [listener["address"] for listener in server.status()["listeners"]]
            assert shown == [f"127.0.0.1:{tcp.getsockname()[1]}", f"unix:{path}"]
            assert answers(tcp.getsockname())
            assert answers(path)
            assert server.command("reload")["ok"]
            assert answers(path)
        assert server.process.wait() == 0
        assert os.path.exists(path), "it is systemd's"


def test_activated_sockets_are_named_and_several_may_have_one_name(tmp_path: Path) -> None:
    with (
        listening() as one,
        listening() as two,
        listening() as other,
        # A .socket unit with two ListenStream= gives both its own name.
        activated(tmp_path, {"a": one, "b": two, "c": other}, "--bind=systemd:web", names="web:web:other") as server,
    ):
        assert len(server.status()["listeners"]) == 2
        assert answers(one.getsockname())
        assert answers(two.getsockname())
        assert "sockets of the service manager are not used, bind names others: other" in server.log()


def test_a_passed_socket_is_used_by_its_address_and_stays_the_same_over_a_reload(tmp_path: Path) -> None:
    path, config = str(tmp_path / "socket"), tmp_path / "prefork.toml"
    with listening() as tcp, listening(socket.AF_UNIX, path) as unix:
        address = "{}:{}".format(*tcp.getsockname())
        binds = [f"['{address}', 'unix:{path}']", f"['systemd:local', '{address}']", ""]
        config.write_text(f"bind = {binds[0]}")
        with activated(tmp_path, {"web": tcp, "local": unix}, f"--config={config}") as server:
            for bind in (*binds, binds[0]):
                config.write_text(f"bind = {bind}" if bind else "")
                assert server.command("reload")["ok"]
                assert sorted(each["address"] for each in server.status()["listeners"]) == sorted([address, f"unix:{path}"])
                assert answers(tcp.getsockname())
                assert answers(path)
            assert "listening on" not in server.log(), "nothing was opened"
        assert os.path.exists(path), "it is systemd's"


def test_a_reload_that_would_leave_a_passed_socket_to_nobody_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "prefork.toml"
    config.write_text("")
    with (
        listening() as web,
        listening() as more,
        activated(tmp_path, {"web": web, "more": more}, f"--config={config}") as server,
    ):
        first = "{}:{}".format(*web.getsockname())
        for times, signo in enumerate((signal.SIGHUP, signal.SIGUSR2), 1):
            config.write_text("bind = ['systemd:more', '127.0.0.1:0']")
            os.kill(server.pid, signo)
            told = f"bind = systemd:more, 127.0.0.1:0 leaves out {first}, which was passed by the .socket unit of"
            watch.logged(server, told, times)
            assert answers(web.getsockname())
        assert server.log().count("refused, generation 1 keeps serving") == 2
        assert "becomes what" not in server.log(), "the upgrade's check knew"
        assert "no longer listening" not in server.log()
        config.write_text(f"bind = ['systemd:more', '{first}', '127.0.0.1:0']")
        assert server.command("reload")["ok"]
        assert len(server.status()["listeners"]) == 3
        assert answers(web.getsockname())


@pytest.mark.parametrize("when", ["start", "reload"])
def test_an_address_that_a_passed_socket_is_in_the_way_of_is_told_with_the_unit(tmp_path: Path, when: str) -> None:
    config = tmp_path / "prefork.toml"
    with listening() as sock:
        port = sock.getsockname()[1]
        config.write_text(f"bind = ':{port}'" if when == "start" else "")
        with activated(tmp_path, {"web": sock}, f"--config={config}") as server:
            if when == "reload":
                config.write_text(f"bind = ':{port}'")
                assert not server.command("reload")["ok"]
            else:
                assert server.process.wait(watch.DEADLINE) == 78
            told = f"bind = :{port} can't be bound: 127.0.0.1:{port} was passed by the .socket unit of this service, which holds it"
            assert f"{told}: give that address, or systemd:web, or no bind" in server.log()


def test_a_passed_socket_for_both_families_is_used_by_its_address(tmp_path: Path) -> None:
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as both:
        port = both.getsockname()[1]
        with activated(tmp_path, {"web": both}, f"--bind=:{port}") as server:
            assert [each["address"] for each in server.status()["listeners"]] == [f":{port}"]
            assert answers(("127.0.0.1", port))
            os.kill(server.pid, signal.SIGUSR2)
            watch.logged(server, "generation 2 serves")
            assert answers(("::1", port))


def test_a_name_that_was_not_passed_is_told_with_those_that_were(tmp_path: Path) -> None:
    with listening() as sock, activated(tmp_path, {"web": sock}, "--bind=systemd:wbe") as server:
        assert server.process.wait(watch.DEADLINE) == 78
        assert "bind = systemd:wbe: the service manager has passed no socket of that name; it has passed web" in server.log()


def test_sockets_that_were_meant_for_another_process_are_not_ours(tmp_path: Path) -> None:
    port = watch.free_port()
    with listening() as sock, activated(tmp_path, {"web": sock}, f"--bind=127.0.0.1:{port}", pid="1") as server:
        assert [listener["address"] for listener in server.status()["listeners"]] == [f"127.0.0.1:{port}"]
        assert "not used" not in server.log()


def test_more_activated_sockets_than_the_ceiling_allows_are_told(tmp_path: Path) -> None:
    with listening() as one, listening() as two, activated(tmp_path, {"a": one, "b": two}, "--max-workers=1") as server:
        assert server.process.wait(watch.DEADLINE) == 78
        assert "max_workers = 1 (on the command line (--max-workers)) is less than workers = 1 " in server.log()


def test_a_restart_on_an_activated_socket_loses_nobody(tmp_path: Path) -> None:
    with listening() as sock:
        sock.listen(512)
        # A client waits while a daemon stops and another one starts: no bound for that is this test's.
        with Load(sock.getsockname(), clients=4, timeout=6 * watch.DEADLINE) as load:
            for _ in range(5):
                before = load.connections
                with activated(tmp_path, {"web": sock}, "--module=echo:loop", "--workers=4"):
                    watch.until("clients are served", lambda before=before: load.connections > before + 20)  # type: ignore[misc]
            # The last clients wait for a daemon, too.
            with activated(tmp_path, {"web": sock}, "--module=echo:loop"):
                load.stop()
    assert (load.failures, load.refused) == ([], 0)


def owner(path: str) -> tuple[str, str, int]:
    status = os.stat(path)
    return pwd.getpwuid(status.st_uid).pw_name, grp.getgrgid(status.st_gid).gr_name, status.st_mode & 0o777


def test_a_unix_socket_has_the_owners_that_were_asked_for_and_a_reload_changes_them(prefork_server: Start, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a socket to somebody else")
    path, file = str(tmp_path / "socket"), tmp_path / "prefork.toml"
    file.write_text(f"bind = ['unix:{path}?mode=0660&user=nobody&group=daemon']")
    server = prefork_server("echo:loop", bind=[], workers=1, arguments=("--config", str(file)))
    assert owner(path) == ("nobody", "daemon", 0o660)
    inode = os.stat(path).st_ino
    file.write_text(f"bind = ['unix:{path}?mode=0640&user=daemon&group=1']")
    assert server.command("reload")["ok"]
    assert owner(path) == ("daemon", "daemon", 0o640)
    assert os.stat(path).st_ino == inode, "it is the same socket"
    file.write_text(f"bind = ['unix:{path}?mode=0640']")
    assert server.command("reload")["ok"]
    assert owner(path) == ("root", "root", 0o640)
    file.write_text(f"bind = ['unix:{path}?mode=0640&user=daemon&group=1']")
    assert server.command("reload")["ok"]
    file.write_text(f"bind = ['unix:{path}?user=nosuchuser', 'unix:{path}2?user=nosuchuser']")
    answer = server.command("reload")
    assert not answer["ok"]
    assert "user 'nosuchuser' does not exist on this machine" in answer["reason"]
    assert not os.path.exists(path + "2")
    file.write_text(f"bind = ['unix:{path}?mode=0666&user=nosuchuser']")
    answer = server.command("reload")
    assert (answer["ok"], owner(path)) == (False, ("daemon", "daemon", 0o640)), "one that stays is looked up before the commit, too"


def test_a_path_that_commands_would_take_for_an_instances_is_refused(prefork_server: Start, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    file, environment = tmp_path / "prefork.toml", {"RUNTIME_DIRECTORY": str(tmp_path)}
    file.write_text(f"bind = ['unix:{tmp_path}/web']")
    arguments = ("--config", str(file))
    server = prefork_server("echo:loop", bind=[], workers=1, arguments=arguments, environment=environment)
    file.write_text(f"bind = ['unix:{tmp_path}/link/web.sock']")
    reason = f"unix:{tmp_path}/link/web.sock: what ends with .sock in that directory is an instance's: name it otherwise"
    assert server.command("reload")["reason"] == reason
    line = [sys.executable, "-P", "-m", "prefork", "check", "--module=echo:loop", *arguments]
    done = subprocess.run(line, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (69, f"prefork: {reason}\n")
    file.write_text(f"bind = ['unix:{tmp_path}/link/other']")
    assert server.command("reload")["ok"]


def test_a_path_is_added_although_the_working_directory_was_removed(prefork_server: Start, tmp_path: Path) -> None:
    (tmp_path / "start").mkdir()
    file = tmp_path / "prefork.toml"
    file.write_text("bind = ['127.0.0.1:0']")
    server = prefork_server("echo:loop", folder=tmp_path / "start", bind=[], workers=1, arguments=("--config", str(file)))
    (tmp_path / "start").rmdir()
    file.write_text(f"bind = ['127.0.0.1:0', 'unix:{tmp_path}/path.sock']")
    assert server.command("reload")["ok"]


def test_an_owner_that_does_not_exist_is_told_at_the_start(tmp_path: Path) -> None:
    with (
        pytest.raises(StartError, match="group 'nosuchgroup' does not exist") as caught,
        serve("echo:loop", bind=f"unix:{tmp_path}/socket?group=nosuchgroup"),
    ):
        pass
    assert caught.value.exit_status == 78
    assert list(tmp_path.iterdir()) == []


def test_no_lock_that_others_can_take_keeps_a_killed_daemon_from_starting_again(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"bind": f"unix:{tmp_path}/socket", "control": f"{tmp_path}/control", "pid_file": f"{tmp_path}/pid"}
    with ExitStack() as stack:
        with serve("echo:loop", workers=1, **settings) as killed:
            # What any user may do with a folder and a file that they can read.
            for name in (".", "pid", "pid"):
                fd = os.open(tmp_path / name, os.O_RDONLY)
                stack.callback(os.close, fd)
                fcntl.flock(fd, fcntl.LOCK_SH)
            with pytest.raises(OSError, match="temporarily unavailable"):
                fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # not as long as the daemon lives
            killed.process.kill()
            killed.process.wait()
        watch.until("a lock of a reader", lambda: _locks(fd))
        with serve("echo:loop", workers=1, **settings) as server, server.connect() as sock:
            sock.sendall(b"hello")
            assert sock.recv(10) == b"hello"
            assert (tmp_path / "pid").read_text() == f"{server.pid}\n"
    assert list(tmp_path.iterdir()) == []


def _locks(fd: int) -> bool:
    """Whether we have a read lock on the file now."""
    try:
        fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


OPTIONS_OF_TCP = """
import socket
def loop(sock):
    nodelay = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    keepalive = sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    sock.sendall(b"%d%d" % (nodelay != 0, keepalive != 0))
"""


def test_nodelay_and_keepalive_are_those_of_the_configuration(
    prefork_server: Start, module: Callable[[str], Path], tmp_path: Path
) -> None:
    file = tmp_path / "prefork.toml"
    file.write_text("")
    server = prefork_server("mine:loop", folder=module(OPTIONS_OF_TCP), workers=1, arguments=("--config", str(file)))

    def asked() -> bytes:
        with server.connect() as sock:
            return sock.recv(2)

    assert asked() == b"10"
    file.write_text("nodelay = false\nkeepalive = true\n")
    assert server.command("reload")["ok"]
    assert asked() == b"01"
