"""The hooks: where they run, in what order, and what happens when they fail."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefork.testing import Server, StartError, serve
from tests import watch

Start = Callable[..., Server]
Module = Callable[[str], Path]

ALL: dict[str, Any] = {"on_boot": "mine:boot", "on_worker_start": "mine:start", "on_worker_exit": "mine:leave"}
HANDLER = "def loop(sock):\n    sock.sendall(str(os.getpid()).encode())\n    sock.recv(1)\n"
TELLING = f"""
import atexit, os

def tell(what):
    with open("told", "a") as file:
        file.write(f"{{what}} {{os.getpid()}} {{os.getppid()}}\\n")

def boot():
    tell("boot")

def start():
    tell("start")
    atexit.register(tell, "atexit")

def leave():
    tell("leave")

{HANDLER}
"""


def told(folder: Path) -> list[list[str]]:
    """What the hooks have written: what, pid, parent's pid."""
    return [line.split() for line in (folder / "told").read_text().splitlines()]


def pid(server: Server) -> int:
    with server.connect() as sock:
        return int(sock.recv(64))


def test_each_hook_runs_once_in_its_process_and_in_order(prefork_server: Start, module: Module) -> None:
    folder = module(TELLING)
    server = prefork_server("mine:loop", folder=folder, workers=2, **ALL)
    boss = str(watch.fork_server(server))
    workers = {str(worker["pid"]) for worker in watch.settled(server, 2)["workers"]}
    lines = told(folder)
    assert lines[0] == ["boot", boss, str(server.pid)]
    assert {tuple(line) for line in lines[1:]} == {("start", worker, boss) for worker in workers}
    assert pid(server) > 0
    assert server.stop() == 0
    lines = told(folder)
    assert [line[0] for line in lines].count("boot") == 1
    for worker in workers:
        assert [what for what, who, _ in lines if who == worker] == ["start", "leave", "atexit"]


def test_a_retired_worker_calls_on_worker_exit_and_a_killed_one_does_not(prefork_server: Start, module: Module) -> None:
    folder = module(TELLING)
    server = prefork_server("mine:loop", folder=folder, workers=2, **ALL)
    killed, retired = [worker["pid"] for worker in watch.settled(server, 2)["workers"]]
    with server.connect() as sock:
        busy = int(sock.recv(64))
        os.kill(busy, signal.SIGKILL)
        watch.until("it has gone", lambda: watch.is_gone(busy))
    other = retired if busy == killed else killed
    os.kill(other, signal.SIGTERM)
    watch.until("it has gone", lambda: watch.is_gone(other))
    watch.settled(server, 2)
    leavers = [who for what, who, _ in told(folder) if what == "leave"]
    assert leavers == [str(other)]


def test_a_worker_that_accept_fails_for_calls_on_worker_exit(prefork_server: Start, module: Module) -> None:
    source = TELLING + "\ndef loop(sock):\n    os.closerange(3, 256)\n"
    folder = module(source)
    server = prefork_server("mine:loop", folder=folder, workers=1, max_workers=1, **ALL)
    broken = watch.settled(server, 1)["workers"][0]["pid"]
    server.connect().close()
    watch.logged(server, "accept failed: OSError")
    watch.until("it has gone", lambda: watch.is_gone(broken))
    assert [what for what, who, _ in told(folder) if who == str(broken)] == ["start", "leave", "atexit"]


def test_on_boot_may_change_signals_and_nothing_of_it_stays(prefork_server: Start, module: Module) -> None:
    source = f"""
import os, signal, socket

def boot():
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    os.kill(os.getpid(), signal.SIGALRM)
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    signal.set_wakeup_fd(-1)
    socket.setdefaulttimeout(0.01)

{HANDLER}
"""
    server = prefork_server("mine:loop", folder=module(source), workers=1, on_boot="mine:boot")
    with server.connect() as sock:
        held = int(sock.recv(64))
        os.kill(held, signal.SIGKILL)
        # Only a fork server that hears SIGCHLD and reaps can know how it died.
        death = watch.until("its death is known", lambda: server.status()["deaths"])[0]
    assert (death["pid"], death["cause"]) == (held, "signal 9 (SIGKILL)")
    idle = watch.settled(server, 1)["workers"][0]["pid"]
    assert server.command("reload")["ok"]
    watch.until("it has left", lambda: watch.is_gone(idle), 5.0)


def test_on_worker_start_may_change_signals_and_the_worker_still_leaves(prefork_server: Start, module: Module) -> None:
    source = f"""
import os, signal

def start():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())

{HANDLER}
"""
    server = prefork_server("mine:loop", folder=module(source), workers=1, on_worker_start="mine:start")
    idle = watch.settled(server, 1)["workers"][0]["pid"]
    os.kill(idle, signal.SIGTERM)
    watch.until("it has left", lambda: watch.is_gone(idle), 5.0)


def test_children_of_hooks_that_come_back_do_not_serve(prefork_server: Start, module: Module) -> None:
    source = f"""
import os

def fork():
    if pid := os.fork():
        os.waitpid(pid, 0)

boot = start = leave = fork
{HANDLER}
"""
    server = prefork_server("mine:loop", folder=module(source), workers=2, **ALL)
    assert len(watch.settled(server, 2)["workers"]) == 2
    assert len(watch.family(server.pid)) == 3
    assert server.stop() == 0
    assert "internal error" not in server.log()


RAISING = ["raise RuntimeError('as told')", "raise SystemExit(0)", "raise KeyboardInterrupt"]


@pytest.mark.parametrize("statement", RAISING)
@pytest.mark.parametrize("option", ["on_boot", "on_worker_start"])
def test_a_hook_that_raises_ends_the_start_with_its_traceback(module: Module, option: str, statement: str) -> None:
    folder = module(f"import os\ndef hook():\n    {statement}\n\n{HANDLER}")
    hook: dict[str, Any] = {option: "mine:hook"}
    with pytest.raises(StartError) as caught, serve("mine:loop", folder=folder, workers=3, **hook):
        pass
    assert caught.value.exit_status == 78
    shown = str(caught.value)
    assert f"{option} = mine:hook raised" in shown
    assert f"in hook\n    {statement}" in shown
    assert "handler.py" not in shown


@pytest.mark.parametrize("option", ["on_boot", "on_worker_start"])
def test_a_reload_with_a_hook_that_raises_is_refused_with_its_traceback(prefork_server: Start, module: Module, option: str) -> None:
    hook: dict[str, Any] = {option: "mine:hook"}
    good = f"import os\ndef hook():\n    pass\n\n{HANDLER}"
    folder = module(good)
    server = prefork_server("mine:loop", folder=folder, workers=2, **hook)
    before = {worker["pid"] for worker in watch.settled(server, 2)["workers"]}
    module(good.replace("pass", "raise RuntimeError('broken now')"))
    answer = server.command("reload")
    assert not answer["ok"]
    assert f"{option} = mine:hook raised\nTraceback" in answer["reason"]
    assert answer["reason"].endswith("RuntimeError: broken now")
    assert {worker["pid"] for worker in watch.settled(server, 2)["workers"]} == before
    module(good)
    assert server.command("reload")["ok"]


def test_a_worker_that_can_not_start_later_is_logged_with_its_traceback_and_tried_again(
    prefork_server: Start, module: Module
) -> None:
    source = f"""
import os

def start():
    if os.path.exists("broken"):
        raise RuntimeError("not this time " + "x" * 9000 + " and the end")

{HANDLER}
"""
    folder = module(source)
    server = prefork_server("mine:loop", folder=folder, workers=1, on_worker_start="mine:start")
    first = watch.settled(server, 1)["workers"][0]["pid"]
    (folder / "broken").touch()
    os.kill(first, signal.SIGKILL)
    log = watch.logged(server, "died before it was ready: exit status 78")
    log = watch.logged(server, "and the end")
    assert "on_worker_start = mine:start raised" in log
    assert "[... cut ...]" in log
    (folder / "broken").unlink()
    watch.settled(server, 1)
    assert pid(server) != first


def test_a_worker_whose_start_hangs_is_killed_after_boot_timeout(module: Module) -> None:
    source = f"import os, time\ndef start():\n    time.sleep(60)\n\n{HANDLER}"
    with (
        pytest.raises(StartError, match=r"boot_timeout = 0\.5 s; prefork check --hooks tells where it hangs") as caught,
        serve("mine:loop", folder=module(source), on_worker_start="mine:start", boot_timeout=0.5),
    ):
        pass
    assert caught.value.exit_status == 78


def test_an_on_boot_that_hangs_ends_the_start(module: Module) -> None:
    source = f"import os, time\ndef boot():\n    time.sleep(60)\n\n{HANDLER}"
    with (
        pytest.raises(
            StartError, match=r"on_boot has not ended after boot_timeout = 0\.5 s; prefork check --hooks tells"
        ) as caught,
        serve("mine:loop", folder=module(source), on_boot="mine:boot", boot_timeout=0.5),
    ):
        pass
    assert caught.value.exit_status == 78


@pytest.mark.parametrize("statement", RAISING)
def test_an_exit_hook_that_raises_is_logged_and_the_rest_goes_on(prefork_server: Start, module: Module, statement: str) -> None:
    source = TELLING.replace('tell("leave")', statement)
    folder = module(source)
    server = prefork_server("mine:loop", folder=folder, workers=1, **ALL)
    worker = watch.settled(server, 1)["workers"][0]["pid"]
    assert server.stop() == 0
    log = server.log()
    assert "ending this worker: on_worker_exit = mine:leave raised\n" in log
    assert f"in leave\n        {statement}" in log
    assert [what for what, who, _ in told(folder) if who == str(worker)] == ["start", "atexit"]
    assert "died" not in log


@pytest.mark.parametrize(
    ("option", "source", "message"),
    [
        ("on_boot", "", r"on_boot = mine:hook: .*mine\.py has no 'hook'"),
        ("on_worker_exit", "", r"on_worker_exit = mine:hook: .*mine\.py has no 'hook'"),
        ("on_worker_start", "hook = 3", "on_worker_start = mine:hook: int is not callable; a hook is a function without arguments"),
        ("on_worker_start", "def hook(db): pass", r"on_worker_start = mine:hook\(db\): a hook is called without arguments"),
        ("on_worker_exit", "async def hook(): pass", "on_worker_exit = mine:hook: calling it only makes a coroutine"),
    ],
)
def test_a_hook_that_can_not_be_called_ends_the_start(module: Module, option: str, source: str, message: str) -> None:
    hook: dict[str, Any] = {option: "mine:hook"}
    with (
        pytest.raises(StartError, match=message) as caught,
        serve("mine:loop", folder=module(f"import os\n{source}\n\n{HANDLER}"), **hook),
    ):
        pass
    assert caught.value.exit_status == 78


def test_a_hook_of_a_module_that_does_not_exist_is_named_with_its_option(module: Module) -> None:
    with (
        pytest.raises(StartError, match="on_boot = nosuch:hook: no module 'nosuch'"),
        serve("mine:loop", folder=module(f"import os\n{HANDLER}"), on_boot="nosuch:hook"),
    ):
        pass


def test_threads_that_on_boot_started_are_refused_and_those_of_on_worker_start_are_not(
    prefork_server: Start, module: Module
) -> None:
    source = f"""
import os, threading

def hook():
    threading.Thread(target=threading.Event().wait, name="ticker", daemon=True).start()

{HANDLER}
"""
    folder = module(source)
    with (
        pytest.raises(StartError, match=r"the import or on_boot started threads \(ticker\)"),
        serve("mine:loop", folder=folder, on_boot="mine:hook"),
    ):
        pass
    assert pid(prefork_server("mine:loop", folder=folder, on_worker_start="mine:hook")) > 0


DATABASE = """
import json, os, sqlite3

def connect():
    global db
    db = sqlite3.connect("hits.db", isolation_level=None)
    db.execute("CREATE TABLE IF NOT EXISTS hits (pid INTEGER)")

def disconnect():
    db.close()

def loop(sock):
    db.execute("INSERT INTO hits VALUES (?)", (os.getpid(),))
    sock.sendall(json.dumps([os.getpid(), db.execute("SELECT count(*) FROM hits").fetchone()[0]]).encode())
    sock.recv(1)
"""


def test_a_database_connection_for_each_worker_survives_reloads_and_killed_workers(prefork_server: Start, module: Module) -> None:
    hooks = {"on_worker_start": "mine:connect", "on_worker_exit": "mine:disconnect"}
    server = prefork_server("mine:loop", folder=module(DATABASE), workers=2, spare_timeout=1, **hooks)
    pids: list[int] = []

    def hit() -> int:
        with server.connect() as sock:
            pid, count = json.loads(sock.recv(64))
            pids.append(pid)
            assert count == len(pids)
        return int(pid)

    for _ in range(4):
        hit()
    for _ in range(3):
        assert server.command("reload")["ok"]
        hit()
        hit()
    killed = hit()
    os.kill(killed, signal.SIGKILL)
    watch.until("it has gone", lambda: watch.is_gone(killed))
    watch.settled(server, 2)
    for _ in range(4):
        assert hit() != killed
    assert len(set(pids)) >= 5
    assert "raised" not in server.log()


def test_a_database_connection_for_each_worker_survives_recycling(prefork_server: Start, module: Module) -> None:
    hooks = {"on_worker_start": "mine:connect", "on_worker_exit": "mine:disconnect"}
    server = prefork_server("mine:loop", folder=module(DATABASE), workers=2, spare_timeout=1, max_connections=2, **hooks)
    pids: set[int] = set()
    hits = 0

    def hit() -> bool:
        nonlocal hits
        hits += 1
        with server.connect() as sock:
            pid, count = json.loads(sock.recv(64))
        pids.add(pid)
        assert count == hits
        return len(pids) >= 6

    watch.until("workers have come and gone", hit)
    watch.settled(server, 2)
    assert "raised" not in server.log()


def test_a_child_that_the_import_forked_and_that_raises_does_not_speak_for_the_fork_server(
    prefork_server: Start, module: Module
) -> None:
    source = f"import os\nif os.fork() == 0:\n    raise RuntimeError('in a child')\nos.wait()\n{HANDLER}"
    assert pid(prefork_server("mine:loop", folder=module(source), workers=1)) > 0
