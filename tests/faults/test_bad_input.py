"""Bad input of every kind, each against the real daemon: a clear error or an isolated connection, and afterwards all is as before.

`ITEMS`, at the end, is the list, each with the tests that show it. What one connection, one client or one command did must not be
seen by the next: `unharmed` looks for what is left over.
"""

import importlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from prefork.ops import control, instances
from prefork.testing import Server, connect, serve
from tests import watch
from tests.conftest import HANDLERS, Gate
from tests.integration.test_control import run, talk

Start = Callable[..., Server]
Module = Callable[[str], Path]

GOOD = "def loop(sock):\n    sock.sendall(b'good')\n"
# What an import that never returns may take: long enough for the others of the table on a busy machine.
BOOT = 3.0


def shape(server: Server) -> tuple[Counter[str], int, int]:
    """Its processes by role, zombies by that name, and how many descriptors master and fork server have open."""
    roles: Counter[str] = Counter()
    for process in watch.family(server.pid):
        try:
            title = (process.cmdline() or ["zombie"])[0]
        except psutil.ZombieProcess:
            title = "zombie"
        except psutil.NoSuchProcess:
            continue
        roles[re.sub(r" gen \d+| worker \d+", lambda found: found[0].rstrip("0123456789"), title)] += 1
    return roles, len(watch.descriptors(server.pid)), len(watch.descriptors(watch.fork_server(server)))


@contextmanager
def unharmed(server: Server) -> Iterator[None]:
    """The block does something bad; then there are as many acceptors, processes and descriptors as before, and no lost count."""
    idle = watch.until("the target is known", lambda: server.status()["listeners"][0]["workers"]["target"])
    watch.settled(server, idle)
    before = shape(server)
    yield
    watch.settled(server, idle)
    watch.until("nobody is served any more", lambda: server.status()["totals"]["serving"] == 0)
    try:
        watch.until("all is as before", lambda: shape(server) == before)
    except AssertionError as error:
        raise AssertionError(f"{error}: {before}, now {shape(server)}\n{server.log()}") from None
    status = server.status()
    assert watch.identity_holds(status["totals"]), status["totals"]
    assert (status["state"], status["backoff"]) == ("running", None)
    assert "report it" not in server.log()


def exit_code(*arguments: str, folder: Path = HANDLERS, before: tuple[str, ...] = ()) -> tuple[int, str]:
    """How ``prefork serve`` ends that can't serve, and what it says."""
    command = [*before, sys.executable, "-m", "prefork", "serve", "--bind=127.0.0.1:0", "--control=off", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=folder, errors="replace")
    return done.returncode, done.stderr


# -- the import

IMPORTS = {
    "does not exist": (None, "no module 'mine'"),
    "has no such attribute": ("def other(sock): pass\n", "mine.py has no 'loop'"),
    "raises": ("raise RuntimeError('broken')\n", "RuntimeError: broken"),
    "calls sys.exit": ("import sys\nsys.exit(0)\n", "SystemExit: 0"),
    "starts threads": (
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True, name='mine').start()\n" + GOOD,
        "the import or on_boot started threads (mine)",
    ),
    "never returns": ("import time\ntime.sleep(600)\n", f"the import has not ended after boot_timeout = {BOOT:g} s"),
}


@pytest.mark.parametrize("item", IMPORTS)
def test_an_import_that_does_not_work_ends_the_start(tmp_path: Path, item: str) -> None:
    source, message = IMPORTS[item]
    if source is not None:
        (tmp_path / "mine.py").write_text(source)
    status, text = exit_code("--module=mine:loop", f"--boot-timeout={BOOT}", folder=tmp_path)
    assert status == 78, text
    assert message in text
    assert "report it" not in text
    assert not re.search(r'File ".*/prefork/', text), "frames of ours help nobody"


@pytest.mark.parametrize("item", IMPORTS)
def test_an_import_that_does_not_work_refuses_a_reload(prefork_server: Start, module: Module, item: str) -> None:
    source, message = IMPORTS[item]
    server = prefork_server("mine:loop", folder=module(GOOD), workers=2, boot_timeout=BOOT)
    pids = [worker["pid"] for worker in watch.settled(server, 2)["workers"]]
    with unharmed(server):
        if source is None:
            (module(GOOD) / "mine.py").unlink()
        else:
            module(source)
        answer = server.command("reload")
        assert not answer["ok"]
        assert message in answer["reason"]
        with server.connect() as sock:
            assert sock.recv(64) == b"good"
    assert [worker["pid"] for worker in server.status()["workers"]] == pids
    assert server.status()["reload"]["result"] == "refused"


LOUD = "import os\nif os.path.exists('loud'):\n    for _ in range(1024):\n        print('x' * 1023)\n" + GOOD


def test_an_import_that_prints_a_megabyte_is_heard_and_serves(prefork_server: Start, module: Module) -> None:
    folder = module(LOUD)
    (folder / "loud").touch()
    server = prefork_server("mine:loop", folder=folder, workers=2)
    with unharmed(server):
        assert server.log().count("x") >= 1024 * 1023
        assert server.command("reload")["ok"]
        with server.connect() as sock:
            assert sock.recv(64) == b"good"
    assert server.log().count("x") >= 2 * 1024 * 1023


def test_an_import_that_prints_a_megabyte_to_nobody_does_not_stop_the_master(module: Module, tmp_path: Path) -> None:
    folder, path = module(LOUD), str(tmp_path / "control")
    command = [sys.executable, "-m", "prefork", "serve", "--module=mine:loop", "--bind=127.0.0.1:0", f"--control={path}"]
    read, write = os.pipe()
    with subprocess.Popen([*command, "--workers=2", "--boot-timeout=1"], stdout=write, stderr=write, cwd=folder) as daemon:
        os.close(write)
        watch.until("it listens", lambda: os.path.exists(path))
        server = Server(None, daemon.pid, path, tmp_path / "log", daemon)
        host, _, port = watch.settled(server, 2)["listeners"][0]["address"].rpartition(":")
        (folder / "loud").touch()
        os.kill(daemon.pid, signal.SIGHUP)
        watch.until("it has an outcome", lambda: server.status()["reload"])
        with connect((host, int(port))) as sock:
            assert sock.recv(64) == b"good"
        watch.settled(server, 2)
        daemon.terminate()
        assert daemon.wait(watch.DEADLINE) == 0
    os.close(read)


# -- the handler

# What it does, how its connection is counted, and whether its worker serves on.
DEEDS = {
    "raises": ("error", True),
    "exits": ("error", True),
    "leaves at once": ("killed", False),
    "forks": ("ok", True),
    "leaves a thread": ("ok", True),
    "closes its socket": ("ok", True),
    "closes its descriptor": ("ok", True),
    "closes every descriptor": ("ok", False),
    "blocks sigterm": ("ok", True),
    "replaces sigterm": ("ok", True),
    "changes the working directory": ("ok", True),
    "changes it and raises": ("error", True),
    "sets the default timeout": ("ok", True),
}


def tell(server: Server, deed: str, address: Any = None) -> dict[str, Any]:
    """Have the handler do it; what it answers, or nothing."""
    with connect(address or server.address) as sock:
        sock.sendall(deed.encode())
        got = b""
        try:
            while data := sock.recv(4096):
                got += data
        except ConnectionResetError:
            return {}
    return json.loads(got) if got else {}


@pytest.mark.parametrize("deed", DEEDS)
def test_what_a_handler_does_is_not_seen_by_the_next_connection(prefork_server: Start, deed: str) -> None:
    outcome, survives = DEEDS[deed]
    server = prefork_server("bad:loop", folder=HANDLERS, workers=1, max_workers=1)
    before = tell(server, "look")
    with unharmed(server):
        tell(server, deed)
        after = tell(server, "look")
        assert after["state"] == before["state"]
        assert (after["pid"] == before["pid"]) is survives
        wanted = Counter({"ok": 2}) + Counter({outcome: 1})
        watch.until("all are counted", lambda: _outcomes(server) == wanted)
        # The worker leaves as soon as it is asked to, and nothing of it stays.
        assert server.command("reload")["ok"]
        watch.until("it has left", lambda: watch.is_gone(after["pid"]), 5.0)
    if survives and outcome == "ok":
        assert " ERROR " not in server.log()


def _outcomes(server: Server) -> Counter[str]:
    return +Counter(
        {key: value for key, value in server.status()["totals"].items() if key in ("ok", "error", "killed", "rejected")}
    )


def test_who_waits_while_a_worker_closes_every_descriptor_is_served_by_the_next(prefork_server: Start) -> None:
    server = prefork_server("bad:loop", folder=HANDLERS, workers=1, max_workers=1)
    with unharmed(server):
        for _ in range(5):
            with server.connect() as bad, server.connect() as waiting:
                waiting.sendall(b"look")
                bad.sendall(b"closes every descriptor")
                assert b"blocking" in waiting.recv(4096)
    assert server.status()["totals"]["ok"] == 10


@pytest.fixture
def stray() -> Iterator[list[int]]:
    """Processes that are to be killed at the end: nobody else does."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        if not watch.is_gone(pid):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_children_that_a_handler_leaves_keep_neither_port_nor_daemon(stray: list[int], tmp_path: Path, kind: str) -> None:
    path = f"{tmp_path}/socket"
    bind = f"127.0.0.1:{watch.free_port()}" if kind == "tcp" else f"unix:{path}"
    with serve("bad:loop", folder=HANDLERS, workers=1, bind=bind) as server:
        stray += tell(server, "leaves children")["told"]
        forked, started, _ = stray
        for pid in (forked, started):
            assert not any(c.status == "LISTEN" for c in psutil.Process(pid).net_connections("all"))
            kept = {what for what in watch.descriptors(pid).values() if what.startswith(("socket:", "pipe:"))}
            assert not kept & set(watch.descriptors(server.pid).values()), "a listener, the doorbell or the control socket"
        with watch.soon("a stop"):
            assert server.stop() == 0
        assert not any(map(watch.is_gone, stray)), "nobody ends what is a handler's own"
        assert not os.path.exists(server.control)
        assert kind == "tcp" or not os.path.exists(path)
        with serve("bad:loop", folder=HANDLERS, workers=1, bind=bind) as successor:
            assert tell(successor, "look")["pid"] in [worker["pid"] for worker in watch.workers(successor)]


def test_children_that_a_handler_leaves_are_no_zombies_once_their_worker_has_gone(prefork_server: Start, stray: list[int]) -> None:
    server = prefork_server("bad:loop", folder=HANDLERS, workers=1, max_workers=1)
    with unharmed(server):
        stray += tell(server, "leaves children")["told"]
        assert server.command("reload")["ok"]
        watch.until("they are the master's", lambda: all(psutil.Process(pid).ppid() == server.pid for pid in stray))
        for pid in stray:
            os.kill(pid, signal.SIGKILL)


# -- the client


def says_nothing(sock: socket.socket) -> None:
    """It is connected, and that is all."""


def resets_at_once(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def half_closes(sock: socket.socket) -> None:
    sock.sendall(b"hello")
    sock.shutdown(socket.SHUT_WR)
    assert sock.recv(5) == b"hello"
    assert sock.recv(5) == b""


CLIENTS = [says_nothing, resets_at_once, half_closes]


@pytest.mark.parametrize("bad", CLIENTS)
def test_a_bad_client_is_nobody_elses_trouble(prefork_server: Start, bad: Callable[[socket.socket], None]) -> None:
    server = prefork_server("echo:loop", workers=2, spare_timeout=1)
    clients = 20
    with unharmed(server), ExitStack() as stack:
        for _ in range(clients):
            bad(stack.enter_context(server.connect()))
        with server.connect() as good:
            good.sendall(b"hello")
            assert good.recv(5) == b"hello"
        if bad is says_nothing:
            watch.settled(server, 2)
    assert _outcomes(server) == Counter({"ok": clients + 1})
    assert " ERROR " not in server.log()


# -- the address

ADDRESSES = {
    "is not local": (
        "192.0.2.1:7000",
        69,
        "192.0.2.1:7000: this machine has no such address; 0.0.0.0 or :7000 listens on all it has",
    ),
    "has too long a path": ("unix:/" + "x" * 200, 78, "a Unix socket's path has at most 102 bytes"),
    "is in a missing directory": ("unix:/no/such/folder/socket", 69, "the directory /no/such/folder does not exist"),
}


@pytest.mark.parametrize("item", ADDRESSES)
def test_an_address_that_can_not_be_bound_ends_the_start(item: str) -> None:
    address, wanted, message = ADDRESSES[item]
    status, text = exit_code("--module=echo:loop", f"--bind={address}")
    assert (status, message in text) == (wanted, True), text


@pytest.mark.parametrize("item", ADDRESSES)
def test_an_address_that_can_not_be_bound_refuses_a_reload(prefork_server: Start, tmp_path: Path, item: str) -> None:
    address, _, message = ADDRESSES[item]
    file = tmp_path / "echo.toml"
    file.write_text('bind = ["127.0.0.1:0"]\n')
    server = prefork_server("bad:loop", folder=HANDLERS, bind=[], workers=2, spare_timeout=1, arguments=("--config", str(file)))
    with unharmed(server):
        # One that could be opened comes before it, and must be closed again.
        file.write_text(f'bind = ["127.0.0.1:0", "[::1]:0", "{address}"]\n')
        assert message in server.command("reload")["reason"]
        assert tell(server, "look")


def test_a_privileged_port_ends_the_start_and_refuses_a_reload(tmp_path: Path) -> None:
    if int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) <= 1:
        pytest.skip("this machine lets everybody bind low ports (net.ipv4.ip_unprivileged_port_start)")
    unprivileged = ("setpriv", "--bounding-set=-net_bind_service") if os.geteuid() == 0 else ()
    status, text = exit_code("--module=echo:loop", "--bind=127.0.0.1:1", before=unprivileged)
    assert (status, "CAP_NET_BIND_SERVICE" in text) == (77, True), text
    file, path = tmp_path / "echo.toml", str(tmp_path / "control")
    file.write_text('bind = ["127.0.0.1:0"]\n')
    command = [*unprivileged, sys.executable, "-m", "prefork", "serve", "--module=echo:loop", "--workers=2"]
    with (tmp_path / "log").open("wb") as log_file:
        daemon = subprocess.Popen([*command, f"--config={file}", f"--control={path}"], stderr=log_file)
    server = Server(None, daemon.pid, path, tmp_path / "log", daemon)
    watch.until("it listens", lambda: os.path.exists(path))
    watch.until("it runs", lambda: server.status()["state"] == "running")
    with unharmed(server):
        file.write_text('bind = ["127.0.0.1:0", "127.0.0.1:1"]\n')
        assert "CAP_NET_BIND_SERVICE" in server.command("reload")["reason"]
    assert server.stop() == 0


# -- the configuration file


def is_missing(file: Path) -> str:
    file.unlink(missing_ok=True)
    return f"{file}: can't read the configuration: No such file or directory"


def is_a_directory(file: Path) -> str:
    file.unlink(missing_ok=True)
    file.mkdir()
    return f"{file}: can't read the configuration: not a regular file"


def is_not_toml(file: Path) -> str:
    file.write_text("workers: 2\n")
    return f"{file}: not TOML: "


def is_not_utf8(file: Path) -> str:
    file.write_bytes("workers = 2  # für alle\n".encode("latin-1"))
    return f"{file}: not UTF-8 (byte 16); TOML is UTF-8 text"


def is_10_mb_long(file: Path) -> str:
    file.write_text("# x\n" * 2_500_000)
    return f"{file}: larger than 1000000 bytes; a configuration is a few lines of TOML"


FILES = [is_missing, is_a_directory, is_not_toml, is_not_utf8, is_10_mb_long]


@pytest.mark.parametrize("spoil", FILES)
def test_a_configuration_file_that_is_none_ends_the_start(tmp_path: Path, spoil: Callable[[Path], str]) -> None:
    message = spoil(tmp_path / "echo.toml")
    status, text = exit_code("--module=echo:loop", f"--config={tmp_path}/echo.toml")
    assert (status, message in text, len(text.splitlines())) == (78, True, 1), text


@pytest.mark.parametrize("spoil", FILES)
def test_a_configuration_file_that_is_none_refuses_a_reload(
    prefork_server: Start, tmp_path: Path, spoil: Callable[[Path], str]
) -> None:
    file = tmp_path / "echo.toml"
    file.write_text("workers = 2\n")
    server = prefork_server("bad:loop", folder=HANDLERS, spare_timeout=1, arguments=("--config", str(file)))
    with unharmed(server):
        message = spoil(file)
        with watch.soon("a refusal"):
            assert message in server.command("reload")["reason"]
        assert tell(server, "look")


# -- the control socket


@pytest.mark.parametrize(
    ("sent", "times"), [(b"garbage\n", 1), (bytes(range(256)), 1), (b'{"command": "nosuch"}\n', 1), (b"x", 100_000_000)]
)
def test_requests_that_are_none_leave_nothing_behind(prefork_server: Start, sent: bytes, times: int) -> None:
    server = prefork_server("bad:loop", folder=HANDLERS, workers=2, spare_timeout=1)
    before = watch.pss_kib(server.pid)
    with unharmed(server):
        for _ in range(3):
            talk(server, sent * times)
            assert tell(server, "look")
    assert watch.pss_kib(server.pid) < before + 4096


def test_half_a_line_is_waited_for_and_keeps_nobody(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=2)
    with unharmed(server), socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(watch.DEADLINE)
        sock.connect(server.control)
        sock.sendall(b'{"command": "sta')
        assert server.command("scale", workers=2)["ok"]
        # Half a line is none; the other half makes it one, as long as the daemon's patience with it is not over.
        sock.sendall(b'tus"}\n')
        data, descriptors, _, _ = socket.recv_fds(sock, 65536, instances.DESCRIPTORS_LIMIT)
        for fd in descriptors:
            os.close(fd)
        assert b'"ok": true' in data


@pytest.mark.slow
def test_a_thousand_silent_control_clients_keep_no_command_out(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=2)
    with unharmed(server), ExitStack() as stack:
        for number in range(1000):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(server.control)
            try:
                sock.sendall(b'{"command": ' if number % 2 else b"")
            except BrokenPipeError:
                continue  # it has been let go already
            if number % 100 == 99:
                done = run("scale", "+0", "--control", server.control)
                assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_control_clients_that_never_stop_coming_keep_no_command_out(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=2)
    ended = threading.Event()

    def flood() -> None:
        with ExitStack() as stack:
            for number in range(20_000):
                if ended.is_set():
                    return
                if number % 500 == 0:
                    stack.close()
                sock = stack.enter_context(socket.socket(socket.AF_UNIX))
                sock.connect(server.control)

    with unharmed(server):
        crowd = threading.Thread(target=flood)
        crowd.start()
        try:
            for _ in range(20):
                assert server.command("scale", workers=2)["ok"]
        finally:
            ended.set()
            crowd.join()


def test_control_clients_that_all_wait_keep_neither_status_nor_stop_out(prefork_server: Start, gate: Gate) -> None:
    server = prefork_server("gated:loop", folder=HANDLERS, workers=2, environment=gate.environment)
    waiting = []
    with unharmed(server), ExitStack() as stack:
        with gate.closed():
            for _ in range(control.WAITING):
                sock = stack.enter_context(socket.socket(socket.AF_UNIX))
                sock.connect(server.control)
                sock.settimeout(watch.DEADLINE)
                sock.sendall(b'{"command": "reload"}\n')
                waiting.append(sock)
            late = server.command("reload")
            assert (late["ok"], late["reason"]) == (False, f"{control.WAITING} commands are waiting for their outcome already")
            assert server.status()["state"] == "reloading"
        for sock in waiting:
            assert json.loads(sock.makefile("rb").read())["ok"]
        assert server.command("reload")["ok"]
    assert server.command("stop")["ok"]


def test_a_control_path_that_is_a_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    path, elsewhere = tmp_path / "control", tmp_path / "elsewhere"
    elsewhere.write_text("somebody's")
    path.symlink_to(elsewhere)
    text = _serves_without(path)
    assert (
        f"no control socket, serving on without status, reload and stop: {path}: something that is not a socket is in the way"
        in text
    )
    assert path.is_symlink()
    assert elsewhere.read_text() == "somebody's"


def _serves_without(path: Path | None, before: tuple[str, ...] = (), environment: Mapping[str, str] | None = None) -> str:
    """The log of a daemon that is asked to stop as soon as it serves."""
    where = [f"--control={path}"] if path is not None else []
    command = [*before, sys.executable, "-m", "prefork", "serve", "--module=echo:loop", "--bind=127.0.0.1:0", "--workers=1", *where]
    settings = {key: value for key, value in os.environ.items() if key != "RUNTIME_DIRECTORY"} | dict(environment or {})
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd="/", env=settings) as daemon:
        assert daemon.stderr is not None
        lines = [daemon.stderr.readline()]
        while lines[-1] and " serving echo:loop" not in lines[-1]:
            lines.append(daemon.stderr.readline())
        daemon.terminate()
        rest = daemon.communicate()[1]
        assert daemon.returncode == 0, lines
    return "".join(lines) + rest


@pytest.mark.parametrize("mode", [0o1777, 0o755])
def test_a_control_path_of_somebody_else_is_left_to_them(tmp_path: Path, mode: int) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user to try it")
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    for folder in [tmp_path, *tmp_path.parents]:
        if folder.stat().st_uid == 0 and folder != Path("/") and not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)
    if subprocess.run([*nobody, sys.executable, "-c", "import prefork"], capture_output=True, check=False, cwd="/").returncode:
        pytest.skip("another user can't run this interpreter")
    path = tmp_path / "place" / "control"
    path.parent.mkdir()
    path.parent.chmod(mode)
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(str(path))
        path.chmod(0o600)
        before = path.lstat()
        assert f"no control socket, serving on without status, reload and stop: {path}" in _serves_without(path, nobody)
        assert os.path.samestat(path.lstat(), before)
        assert list(path.parent.iterdir()) == [path]


def test_a_runtime_directory_of_somebody_else_is_not_used(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory away")
    theirs = tmp_path / "prefork"
    theirs.mkdir(mode=0o700)
    os.chown(theirs, 65534, 65534)
    text = _serves_without(None, environment={"XDG_RUNTIME_DIR": str(tmp_path)})
    assert (
        f"serving on without status, reload and stop: {theirs} must be a directory of user 0 that nobody else can write to" in text
    )
    assert list(theirs.iterdir()) == []


# -- the list

HERE, CONTROL, WORKER, ABUSE = "faults.test_bad_input", "integration.test_control", "integration.test_worker", "faults.test_abuse"
_START, _RELOAD = "test_an_import_that_does_not_work_ends_the_start", "test_an_import_that_does_not_work_refuses_a_reload"
_DEED = "test_what_a_handler_does_is_not_seen_by_the_next_connection"
_ADDRESS = "test_an_address_that_can_not_be_bound_ends_the_start", "test_an_address_that_can_not_be_bound_refuses_a_reload"
_FILE = "test_a_configuration_file_that_is_none_ends_the_start", "test_a_configuration_file_that_is_none_refuses_a_reload"
_CLIENT = "test_a_bad_client_is_nobody_elses_trouble"

# Bad input: where it is tested, by which tests, and as which parameter of theirs.
ITEMS: dict[str, list[tuple[str, str, str | None]]] = {
    **{f"a module that {item}": [(HERE, _START, item), (HERE, _RELOAD, item)] for item in IMPORTS},
    "a module that prints a megabyte at import": [
        (HERE, "test_an_import_that_prints_a_megabyte_is_heard_and_serves", None),
        (HERE, "test_an_import_that_prints_a_megabyte_to_nobody_does_not_stop_the_master", None),
    ],
    **{f"a handler that {deed}": [(HERE, _DEED, deed)] for deed in DEEDS},
    "a handler that raises, and what is logged": [
        (WORKER, "test_a_handler_that_raises_costs_only_its_connection", "raise"),
        (WORKER, "test_tracebacks_are_bounded", None),
    ],
    "a handler that ends its process, and what is told of it": [
        (WORKER, "test_a_worker_that_ends_itself_is_replaced_and_its_connection_counted_as_killed", None)
    ],
    "a handler that leaves children behind": [
        (HERE, "test_children_that_a_handler_leaves_keep_neither_port_nor_daemon", "tcp"),
        (HERE, "test_children_that_a_handler_leaves_are_no_zombies_once_their_worker_has_gone", None),
    ],
    "a handler that closes every descriptor while somebody waits": [
        (HERE, "test_who_waits_while_a_worker_closes_every_descriptor_is_served_by_the_next", None)
    ],
    "a handler that leaves an alarm behind": [(ABUSE, "test_an_alarm_that_rings_anywhere_in_a_worker_stays_in_that_worker", None)],
    "a default timeout, and a connection that lasts longer": [
        (WORKER, "test_a_default_timeout_left_behind_does_not_reach_the_next_connection", None)
    ],
    **{f"a client that {bad.__name__.replace('_', ' ')}": [(HERE, _CLIENT, bad.__name__)] for bad in CLIENTS},
    **{f"an address that {item}": [(HERE, test, item) for test in _ADDRESS] for item in ADDRESSES},
    "a privileged port": [(HERE, "test_a_privileged_port_ends_the_start_and_refuses_a_reload", None)],
    **{f"a file that {spoil.__name__.replace('_', ' ')}": [(HERE, test, spoil.__name__) for test in _FILE] for spoil in FILES},
    "a configuration file that is a pipe": [(ABUSE, "test_a_configuration_that_is_a_pipe_is_refused_and_not_waited_for", None)],
    "garbage on the control socket": [
        (CONTROL, "test_a_bad_request_is_answered_with_what_is_wrong", None),
        (HERE, "test_requests_that_are_none_leave_nothing_behind", None),
    ],
    "half a line on the control socket": [(HERE, "test_half_a_line_is_waited_for_and_keeps_nobody", None)],
    "100 MB on the control socket": [
        (CONTROL, "test_a_hundred_megabytes_are_not_taken_in", None),
        (HERE, "test_requests_that_are_none_leave_nothing_behind", None),
    ],
    "a thousand control clients at once": [
        (CONTROL, "test_a_thousand_clients_that_say_nothing_do_not_keep_it_from_serving", None),
        (HERE, "test_a_thousand_silent_control_clients_keep_no_command_out", None),
        (HERE, "test_control_clients_that_never_stop_coming_keep_no_command_out", None),
        (HERE, "test_control_clients_that_all_wait_keep_neither_status_nor_stop_out", None),
    ],
    "a control path that is a symbolic link": [
        (HERE, "test_a_control_path_that_is_a_symbolic_link_is_not_followed", None),
        (CONTROL, "test_without_a_control_socket_the_daemon_says_so_once_and_serves", "link"),
    ],
    "a control path of somebody else": [
        (HERE, "test_a_control_path_of_somebody_else_is_left_to_them", None),
        (HERE, "test_a_runtime_directory_of_somebody_else_is_not_used", None),
    ],
}


@pytest.mark.parametrize("item", ITEMS)
def test_each_item_has_its_tests(item: str) -> None:
    for module_name, test, parameter in ITEMS[item]:
        found = getattr(importlib.import_module(f"tests.{module_name}"), test)
        marks = [mark for mark in getattr(found, "pytestmark", []) if mark.name == "parametrize"]
        values = [getattr(value, "__name__", value) for mark in marks for value in mark.args[1]]
        assert parameter is None or parameter in values, f"{test} has {values}"
