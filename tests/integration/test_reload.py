"""Reload: new code and configuration without losing anybody; a bad one changes nothing and says why."""

import os
import shutil
import signal
import socket
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from prefork.testing import Server, StartError, connect, serve
from tests import watch
from tests.conftest import HANDLERS, Gate
from tests.load import Load

Start = Callable[..., Server]
Module = Callable[[str], Path]

SAYS = "def loop(sock):\n    sock.sendall(b{!r})\n"


def says(server: Server) -> bytes:
    with server.connect() as sock:
        return sock.recv(64)


def hup(server: Server, generation: int) -> None:
    """Reload by signal, and wait until that generation serves alone."""
    os.kill(server.pid, signal.SIGHUP)
    watch.logged(server, f"generation {generation} serves")
    watch.until(
        "nobody accepts with old code",
        lambda: all(w["generation"] == generation for w in watch.workers(server, "idle", "retiring")),
    )


def test_a_reload_serves_new_code_at_once_even_of_the_same_size_in_the_same_second(prefork_server: Start, module: Module) -> None:
    server = prefork_server("mine:loop", folder=module(SAYS.format("one")), workers=2)
    for generation, word in enumerate(("two", "six", "ten", "one"), 2):
        module(SAYS.format(word))
        hup(server, generation)
        assert says(server) == word.encode()


def test_a_refused_reload_that_drops_an_address_has_not_touched_it(prefork_server: Start, module: Module) -> None:
    folder = module("def loop(sock):\n    sock.sendall(sock.recv(64))\n")
    stays, goes, file = watch.free_port(), watch.free_port(), folder / "prefork.toml"
    file.write_text(f"bind = ['127.0.0.1:{stays}', '127.0.0.1:{goes}']")
    server = prefork_server("mine:loop", folder=folder, bind=[], workers=1, arguments=("--config", str(file)))
    file.write_text(f"bind = ['127.0.0.1:{stays}']")
    module("import time\ntime.sleep(0.3)\n1 / 0\n")
    with Load(("127.0.0.1", goes), clients=1, rate=200) as load:
        assert not server.command("reload")["ok"]
        before = load.connections
        watch.until("it is served as before", lambda: load.connections > before + 10)
    assert (load.failures, load.refused) == ([], 0)


def test_an_old_connection_ends_in_peace_while_new_code_serves(prefork_server: Start) -> None:
    server = prefork_server("tiny:about", folder=HANDLERS, workers=2)
    with server.connect() as old:
        assert b'"generation": 1' in old.recv(4096)
        old.sendall(b"?")
        assert old.recv(64) == b"false\n"
        hup(server, 2)
        watch.until("the old fork server has left", lambda: len(_fork_servers(server)) == 1)
        old.sendall(b"?")
        assert old.recv(64) == b"true\n"
        with server.connect() as new:
            assert b'"generation": 2' in new.recv(4096)
        watch.until("the old one is all that is served", lambda: server.status()["totals"]["serving"] == 1)
    watch.family_of(server.pid, 3, "the old worker has gone")
    assert server.status()["totals"]["ok"] == 2


def _fork_servers(server: Server) -> set[int]:
    return {child.pid for child in psutil.Process(server.pid).children()} - {w["pid"] for w in watch.workers(server)}


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("def loop(sock) return\n", "SyntaxError"),
        ("loop = 3\n", "int is not callable"),
        ("import os\nos._exit(0)\n", "the fork server died while it booted: exit status 0"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n", "signal 11 (SIGSEGV)"),
        (
            "import os\nos.register_at_fork(after_in_child=lambda: os._exit(3))\ndef loop(sock): pass\n",
            "died before it was ready: exit status 3",
        ),
    ],
)
def test_a_bad_reload_changes_nothing_and_says_why(prefork_server: Start, module: Module, source: str, reason: str) -> None:
    server = prefork_server("mine:loop", folder=module(SAYS.format("old")), workers=2, boot_timeout=2)
    before = {w["pid"] for w in watch.settled(server, 2)["workers"]}
    module(source)
    answer = server.command("reload")
    assert not answer["ok"]
    assert reason in answer["reason"]
    assert "refused, generation 1 keeps serving" in server.log()
    status = watch.settled(server, 2)
    assert (status["generation"], status["state"]) == (1, "running")
    assert status["reload"]["result"] == "refused"
    assert reason in status["reload"]["reason"]
    assert {w["pid"] for w in status["workers"]} == before
    watch.family_of(server.pid, 3, "what was tried has gone")
    assert says(server) == b"old"
    module(SAYS.format("new"))
    assert server.command("reload")["ok"]
    assert says(server) == b"new"


HALF_READY = """
import os, time
first = os.pipe()
os.write(first[1], b"x")
os.set_blocking(first[0], False)

def started():
    try:
        os.read(first[0], 1)
    except BlockingIOError:
        time.sleep(60)

os.register_at_fork(after_in_child=started)

def loop(sock):
    sock.sendall(b"new")
"""


def test_new_code_serves_nobody_before_all_its_workers_are_ready(prefork_server: Start, module: Module) -> None:
    server = prefork_server("mine:loop", folder=module(SAYS.format("old")), workers=2, boot_timeout=2, spare_timeout=0.5)
    module(HALF_READY)
    os.kill(server.pid, signal.SIGHUP)
    heard = set()
    while "refused" not in server.log():
        heard.add(says(server))
    assert heard == {b"old"}
    assert "its workers are not ready after boot_timeout = 2 s" in server.log()
    watch.family_of(server.pid, 3, "what was tried has gone")


def test_a_file_with_an_invalid_value_is_refused_and_a_mended_one_taken(prefork_server: Start, tmp_path: Path) -> None:
    file = tmp_path / "echo.toml"
    file.write_text('module = "echo:loop"\nworkers = 2\n')
    server = prefork_server("", arguments=("--config", str(file)))
    for broken, reason in (
        ("workers = 0\n", "workers = 0 in"),
        ("workers = \n", "not TOML"),
        ('name = "b"\n', "name = 'b' was '' at the start: that needs a restart"),
    ):
        file.write_text('module = "echo:loop"\n' + broken)
        answer = server.command("reload")
        assert not answer["ok"]
        assert reason in answer["reason"]
        watch.settled(server, 2)
    file.unlink()
    assert "can't read the configuration" in server.command("reload")["reason"]
    file.write_text('module = "echo:loop"\nworkers = 3\n')
    assert server.command("reload")["ok"]
    watch.settled(server, 3)


def test_reloads_under_load_that_add_and_remove_an_address_lose_nobody(prefork_server: Start, tmp_path: Path) -> None:
    file = tmp_path / "echo.toml"
    second = watch.free_port()
    one = 'bind = ["127.0.0.1:0"]\nworkers = 2\nspare_timeout = 1\n'
    two = f'bind = ["127.0.0.1:0", "127.0.0.1:{second}"]\nworkers = 2\nspare_timeout = 1\n'
    file.write_text(one)
    server = prefork_server("echo:loop", bind=[], arguments=("--config", str(file)))
    with Load(server.address, clients=2) as load:
        for turn in range(5):
            file.write_text(two)
            assert server.command("reload")["ok"]
            with connect(("127.0.0.1", second)) as sock:
                sock.sendall(b"hello")
                assert sock.recv(5) == b"hello"
                file.write_text(one)
                assert server.command("reload")["ok"]
                watch.logged(server, "no longer listening", times=turn + 1)
                sock.sendall(b"again")
                assert sock.recv(5) == b"again"
            with pytest.raises(ConnectionRefusedError):
                connect(("127.0.0.1", second))
    assert not load.failures
    assert load.refused == 0
    watch.settled(server, 2)


def test_an_added_address_that_is_taken_refuses_the_reload(prefork_server: Start, tmp_path: Path) -> None:
    file = tmp_path / "echo.toml"
    file.write_text('bind = ["127.0.0.1:0"]\nworkers = 2\n')
    server = prefork_server("echo:loop", bind=[], arguments=("--config", str(file)))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        file.write_text(f'bind = ["127.0.0.1:0", "127.0.0.1:{taken.getsockname()[1]}"]\nworkers = 2\n')
        assert "is in use" in server.command("reload")["reason"]
    watch.settled(server, 2)


def test_drain_timeout_ends_old_connections_and_none_does_not(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=1, drain_timeout=0.3)
    with server.connect() as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        begun = time.monotonic()
        hup(server, 2)
        assert sock.recv(1) == b""
        assert time.monotonic() - begun > 0.25
    watch.until("it is counted", lambda: server.status()["totals"]["killed"] == 1)
    assert server.status()["deaths"][0]["cause"] == "signal 9 (SIGKILL)"


def test_a_reload_at_the_ceiling_gets_through(prefork_server: Start) -> None:
    server = prefork_server("tiny:who", folder=HANDLERS, workers=2, max_workers=2)
    with server.connect() as one, server.connect() as two:
        assert one.recv(64)
        assert two.recv(64)
        hup(server, 2)
        with server.connect() as new:
            assert new.recv(64)


def test_a_reload_asked_for_during_a_reload_follows_it_once(prefork_server: Start, gate: Gate) -> None:
    server = prefork_server("gated:loop", folder=HANDLERS, workers=1, environment=gate.environment)
    with gate.closed():
        os.kill(server.pid, signal.SIGHUP)
        watch.until("it reloads", lambda: server.status()["state"] == "reloading")
        for _ in range(3):
            os.kill(server.pid, signal.SIGHUP)
            watch.logged(server, "another one follows it")
    watch.logged(server, "generation 3 serves")
    assert server.command("reload")["generation"] == 4


def test_a_folder_that_is_switched_by_name_is_followed(prefork_server: Start, tmp_path: Path) -> None:
    for word in ("old", "new"):
        (tmp_path / word).mkdir()
        (tmp_path / word / "mine.py").write_text(SAYS.format(word))
    current = tmp_path / "current"
    current.symlink_to("old")
    server = prefork_server("mine:loop", folder=current, environment={"PWD": str(current)}, workers=1)
    assert says(server) == b"old"
    current.unlink()
    current.symlink_to("new")
    hup(server, 2)
    assert says(server) == b"new"


def _folder(place: Path, files: dict[str, str]) -> None:
    """A folder with these files, in the place of what was there; its time stamp is always the same."""
    _remove(place)
    place.mkdir()
    for name, text in files.items():
        (place / name).write_text(text)
    os.utime(place, (1, 1))


def _archive(place: Path, files: dict[str, str]) -> None:
    _remove(place)
    with zipfile.ZipFile(place, "w") as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name), text)
    os.utime(place, (1, 1))


def _remove(place: Path, _files: object = None) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)


@pytest.mark.parametrize("after", [_folder, _archive])
@pytest.mark.parametrize("before", [_remove, _folder, _archive])
def test_a_reload_finds_on_the_path_what_a_fresh_start_would_find(
    prefork_server: Start, tmp_path: Path, before: Callable[..., None], after: Callable[..., None]
) -> None:
    place = tmp_path / "place"
    before(place, {"first.py": "WORD = b'first'\n" + "#" * 1000})
    (tmp_path / "mine.py").write_text("def loop(sock):\n    pass\n")
    # The master has looked there for its own modules: for whatever stands behind it on the path.
    server = prefork_server("mine:loop", folder=tmp_path, environment=before_ours(place), workers=1)
    after(place, {"first.py": "WORD = b'new'\n", "second.py": "from first import WORD\n"})
    (tmp_path / "mine.py").write_text("from second import WORD\ndef loop(sock):\n    sock.sendall(WORD)\n")
    assert server.command("reload")["ok"], server.log()
    assert says(server) == b"new"


def _wait_until_gone(pids: list[int]) -> None:
    watch.until("the old workers have gone", lambda: all(map(watch.is_gone, pids)))


def test_idle_workers_leave_when_new_code_serves(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=8)
    old = [w["pid"] for w in watch.settled(server, 8)["workers"]]
    for _ in range(5):
        assert server.command("reload")["ok"]
        _wait_until_gone(old)
        old = [w["pid"] for w in watch.workers(server)]


HELD = """
import fcntl, os
from prefork.examples.echo import loop

def wait():
    with open("gate") as gate:  # it is in our folder
        fcntl.flock(gate, fcntl.LOCK_SH)

def start():
    {started}
    done("started")

def done(what):
    os.close(os.open(f"{{what}} {{os.getpid()}}", os.O_CREAT))

{imported}
done("imported")
"""


def _named(server: Server, names: list[str]) -> list[psutil.Process] | None:
    """The daemon's processes of these names, once all are there."""
    ends = tuple(f" {name}" for name in names)
    found = [child for child in watch.family(server.pid) if (child.cmdline() or [""])[0].endswith(ends)]
    return found if len(found) == len(names) else None


@pytest.mark.parametrize(
    ("imported", "started", "comes", "done"),
    [("wait()", "pass", ["gen 2"], "imported"), ("", "wait()", ["gen 2 worker 0", "gen 2 worker 1"], "started")],
)
def test_a_master_that_was_stopped_hears_what_has_come_before_it_finds_a_reload_late(
    prefork_server: Start, module: Module, gate: Gate, imported: str, started: str, comes: list[str], done: str
) -> None:
    timeout = 2.0
    folder = module(HELD.format(imported=imported, started=started))
    server = prefork_server("mine:loop", folder=folder, workers=2, boot_timeout=timeout, on_worker_start="mine:start")
    with gate.closed():
        os.kill(server.pid, signal.SIGHUP)
        newcomers = watch.until(f"{comes} are there", lambda: _named(server, comes))
        os.kill(server.pid, signal.SIGSTOP)
        watch.until("the master has stopped", lambda: psutil.Process(server.pid).status() == psutil.STATUS_STOPPED)
        late = time.monotonic() + timeout
    # The gate is open, and what the master waits for comes while it is stopped. Who has done that and sleeps has told of it.
    watch.until(f"they have {done}", lambda: all((folder / f"{done} {child.pid}").exists() for child in newcomers))
    watch.until("they have told", lambda: all(child.status() == psutil.STATUS_SLEEPING for child in watch.family(server.pid)))
    watch.until("boot_timeout is over", lambda: time.monotonic() > late)
    os.kill(server.pid, signal.SIGCONT)
    watch.until("the reload has ended", lambda: (server.status()["reload"] or {}).get("result"))
    reload = server.status()["reload"]
    assert reload["result"] == "ok", reload["reason"]


def before_ours(folder: Path) -> dict[str, str]:
    """An environment in which a folder's modules are found before all that is installed."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))}


def test_a_reload_looks_through_no_processes_for_who_holds_an_address(prefork_server: Start, tmp_path: Path) -> None:
    (tmp_path / "psutil.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    taken, path, file = watch.free_port(), tmp_path / "path", tmp_path / "prefork.toml"
    file.write_text("bind = ['127.0.0.1:0']")
    arguments = ("--config", str(file))
    server = prefork_server("echo:loop", bind=[], workers=1, arguments=arguments, environment=before_ours(tmp_path))
    with socket.create_server(("127.0.0.1", taken)), socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        file.write_text(f"bind = ['127.0.0.1:{taken}']")
        reason = f"127.0.0.1:{taken} is in use: `ss -ltnp sport = :{taken}` tells by which process"
        assert server.command("reload")["reason"] == reason
        us = Path(f"/proc/{os.getpid()}/comm").read_text().rstrip("\n")
        file.write_text(f"bind = ['unix:{path}']")
        assert server.command("reload")["reason"] == f"unix:{path} is in use by {us} (pid {os.getpid()})"


def test_a_start_says_that_an_address_is_in_use_when_psutil_was_removed(tmp_path: Path) -> None:
    (tmp_path / "psutil.py").write_text("raise ImportError\n")
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(StartError, match=r"is in use\n$") as caught,
        serve("echo:loop", bind=f"127.0.0.1:{taken.getsockname()[1]}", environment=before_ours(tmp_path)),
    ):
        pass
    assert caught.value.exit_status == 69
