"""What is registered for the end: a worker finishes what it has made, and what the import registered runs once, after the last."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from prefork.testing import Server, StartError, serve
from tests import watch

Start = Callable[..., Server]
Module = Callable[[str], Path]

# Each registers something with a library that does so once for the process.
IMPORTS = {
    "nothing": "",
    "a finalizer": "import tempfile; KEPT = tempfile.TemporaryDirectory(dir='.')",
    "multiprocessing": "import multiprocessing; LOCK = multiprocessing.Lock()",
    "executors": "import concurrent.futures.process, concurrent.futures.thread",
    "all": "import concurrent.futures.process, multiprocessing, tempfile; KEPT = tempfile.TemporaryDirectory(dir='.')\n"
    "LOCK = multiprocessing.get_context('spawn').Lock()",
}
MAKING = """
import os

def make():
    global directory, named, archive, text, packed, records
    import gzip, logging, logging.handlers, tempfile, zipfile
    directory = tempfile.TemporaryDirectory(dir="made")
    named = tempfile.NamedTemporaryFile(dir="made")
    text = open("kept/text", "w")
    text.write("written")
    packed = gzip.open("kept/text.gz", "wt")
    packed.write("packed")
    archive = zipfile.ZipFile("kept/archive.zip", "w")
    archive.writestr("member", "archived")
    records = logging.handlers.MemoryHandler(100, target=logging.FileHandler("kept/log"))
    logging.getLogger("mine").addHandler(records)
    logging.getLogger("mine").warning("logged")

def loop(sock):
    global process, executor
    import multiprocessing, concurrent.futures, time
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True)
    process.start()
    executor = concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("fork"))
    sock.sendall(f"{process.pid} {executor.submit(os.getpid).result()}".encode())
"""
ONCE = """
import atexit, os

@atexit.register
def end():
    with open("ended", "a") as file:
        file.write(f"{os.getpid()}\\n")

def loop(sock):
    sock.sendall(b"x")
    sock.recv(1)
"""


def ended(folder: Path) -> list[int]:
    """The processes that have run what the import registered."""
    try:
        return [int(line) for line in (folder / "ended").read_text().split()]
    except FileNotFoundError:
        return []


def check(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "prefork", "check", "--module=mine:loop", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("what", IMPORTS)
def test_a_worker_finishes_what_it_has_made_whatever_was_imported(prefork_server: Start, module: Module, what: str) -> None:
    folder = module(f"{IMPORTS[what]}\n{MAKING}")
    (folder / "made").mkdir()
    (folder / "kept").mkdir()
    server = prefork_server("mine:loop", folder=folder, workers=1, spare_timeout=1, on_worker_start="mine:make")
    with server.connect() as sock:
        children = [int(pid) for pid in sock.recv(64).split()]
    assert len(list((folder / "made").iterdir())) >= 2
    assert server.stop() == 0
    assert list((folder / "made").iterdir()) == []
    assert [pid for pid in children if not watch.is_gone(pid)] == []
    assert (folder / "kept" / "text").read_text() == "written"
    assert set((folder / "kept" / "log").read_text().splitlines()) == {"logged"}
    script = "import gzip, zipfile; print(gzip.open('kept/text.gz').read(), zipfile.ZipFile('kept/archive.zip').read('member'))"
    read = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=True)
    assert read.stdout == "b'packed' b'archived'\n"
    assert "raised" not in server.log()


def test_what_import_and_workers_write_to_one_open_file_is_written_once(prefork_server: Start, module: Module) -> None:
    folder = module(
        "import logging, logging.handlers, os\n"
        "file = open('file', 'a')\n"
        "file.write('import\\n')\n"
        "handler = logging.handlers.MemoryHandler(100, target=logging.FileHandler('log'))\n"
        "logging.getLogger('mine').addHandler(handler)\n"
        "def loop(sock):\n"
        "    file.write('worker\\n')\n"
        "    logging.getLogger('mine').warning('worker')\n"
        "    sock.sendall(b'x')\n"
    )
    server = prefork_server("mine:loop", folder=folder, workers=3)
    with server.connect() as sock:
        assert sock.recv(1) == b"x"
    assert server.stop() == 0
    assert (folder / "file").read_text() == "import\nworker\n"
    assert (folder / "log").read_text() == "worker\n"


def test_nothing_is_removed_that_other_workers_use(prefork_server: Start, module: Module) -> None:
    folder = module(
        "import os, tempfile\n"
        "made = tempfile.TemporaryDirectory(dir='.', prefix='made-')\n"
        "named = tempfile.NamedTemporaryFile(dir='.', prefix='made-')\n"
        "def start():\n    global own\n    own = tempfile.TemporaryDirectory(dir='.', prefix='own-')\n"
        "def loop(sock):\n    sock.sendall(f'{os.path.exists(made.name)} {os.path.exists(named.name)}'.encode())\n"
    )
    server = prefork_server("mine:loop", folder=folder, workers=3, on_worker_start="mine:start")
    assert server.command("scale", workers=1)["ok"]
    watch.settled(server, 1)
    with server.connect() as sock:
        assert sock.recv(64) == b"True True"
    assert server.stop() == 0
    assert [path.name for path in folder.iterdir() if path.name.startswith(("made-", "own-"))] == []


def test_children_that_are_no_daemons_and_work_of_an_executor_are_waited_for(prefork_server: Start, module: Module) -> None:
    folder = module(
        "import concurrent.futures, multiprocessing, pathlib, time\n"
        "context = multiprocessing.get_context('fork')\n"
        "def work(name):\n    pathlib.Path('begun-' + name).touch()\n    time.sleep(0.5)\n    pathlib.Path(name).touch()\n"
        "def loop(sock):\n"
        "    context.Process(target=work, args=('one',)).start()\n"
        "    concurrent.futures.ProcessPoolExecutor(1, context).submit(work, 'two')\n"
    )
    server = prefork_server("mine:loop", folder=folder, workers=1)
    with server.connect() as sock:
        assert sock.recv(1) == b""
    watch.until("both have begun", lambda: (folder / "begun-one").exists() and (folder / "begun-two").exists())
    assert server.stop() == 0
    assert (folder / "one").exists()
    assert (folder / "two").exists()


def test_threads_that_a_handler_left_behind_are_not_waited_for(prefork_server: Start, module: Module) -> None:
    folder = module(
        "import concurrent.futures, logging, threading, time\n"
        "handler = logging.FileHandler('log')\n"
        "logging.getLogger('mine').addHandler(handler)\n"
        "def hold():\n    with handler.lock:\n        time.sleep(600)\n"
        "def loop(sock):\n"
        "    concurrent.futures.ThreadPoolExecutor().submit(time.sleep, 600)\n"
        "    threading.Thread(target=hold).start()\n"
        "    sock.sendall(b'x')\n"
    )
    server = prefork_server("mine:loop", folder=folder, workers=1, graceful_timeout=60)
    with server.connect() as sock:
        assert sock.recv(1) == b"x"
    with watch.soon("a stop with threads left behind"):
        assert server.stop() == 0


def test_what_the_import_registered_runs_once_after_the_last_worker_of_its_generation(
    prefork_server: Start, module: Module
) -> None:
    folder = module(ONCE)
    server = prefork_server("mine:loop", folder=folder, workers=2)
    first = watch.fork_server(server)
    assert "generation 1 has registered for its end: atexit mine.end" in server.log()
    with server.connect() as held:
        assert held.recv(1) == b"x"
        assert server.command("scale", workers=1)["ok"]
        assert server.command("reload")["ok"]
        second = watch.fork_server(server)
        watch.until("only the held one is left", lambda: len(watch.family(first)) == 1)
        assert ended(folder) == []
    watch.until("it has ended", lambda: watch.is_gone(first))
    assert ended(folder) == [first]
    assert server.stop() == 0
    assert ended(folder) == [first, second]
    assert "has ended (" not in server.log()


def test_a_fork_server_whose_import_registered_nothing_leaves_before_its_last_worker(prefork_server: Start, module: Module) -> None:
    source = "import logging, multiprocessing, weakref, concurrent.futures.process\nLOCK = multiprocessing.Lock()\n"
    folder = module(source + ONCE.replace("@atexit.register", ""))
    server = prefork_server("mine:loop", folder=folder, workers=2)
    first = watch.fork_server(server)
    with server.connect() as held:
        assert held.recv(1) == b"x"
        assert server.command("reload")["ok"]
        watch.until("it has left", lambda: watch.is_gone(first))
        assert len(watch.workers(server, "busy")) == 1
    assert "registered" not in server.log()


def test_it_runs_after_an_upgrade_too(prefork_server: Start, module: Module) -> None:
    folder = module(ONCE)
    server = prefork_server("mine:loop", folder=folder, workers=1)
    first = watch.fork_server(server)
    with server.connect() as held:
        assert held.recv(1) == b"x"
        asked = server.command("upgrade")
        assert server.command("outcome", upgrade=asked["upgrade"])["ok"]
        watch.until("only the held one is left", lambda: len(watch.family(first)) == 1)
        # The check of the new program has imported it, too.
        [trial] = ended(folder)
        assert trial != first
    watch.until("it has ended", lambda: watch.is_gone(first))
    assert ended(folder) == [trial, first]


def test_what_is_not_run_because_the_fork_server_was_killed_is_told(prefork_server: Start, module: Module) -> None:
    folder = module(ONCE)
    server = prefork_server("mine:loop", folder=folder, workers=1)
    first = watch.fork_server(server)
    os.kill(first, signal.SIGKILL)
    watch.logged(server, "the fork server of generation 1 has ended (signal 9 (SIGKILL)): what its import has registered")
    watch.until("another one serves", lambda: server.status()["generation"] == 2)
    assert ended(folder) == []


def test_what_does_not_end_is_killed_after_boot_timeout(prefork_server: Start, module: Module) -> None:
    folder = module("import atexit, time\natexit.register(time.sleep, 600)\ndef loop(sock):\n    pass\n")
    server = prefork_server("mine:loop", folder=folder, workers=1, boot_timeout=0.5)
    assert server.command("reload")["ok"]
    watch.logged(server, "the fork server of generation 1 does not answer: it is killed")
    watch.logged(server, "the fork server of generation 1 has ended (signal 9 (SIGKILL)): what its import has registered")


def test_what_raises_is_told_and_the_rest_runs(prefork_server: Start, module: Module) -> None:
    folder = module(ONCE + "import threading\ndef bad():\n    raise SystemExit('no')\nthreading._register_atexit(bad)\n")
    server = prefork_server("mine:loop", folder=folder, workers=1)
    first = watch.fork_server(server)
    assert server.stop() == 0
    assert ended(folder) == [first]
    assert "at the end of generation 1: threading raised" in server.log()


@pytest.mark.slow
def test_a_stop_waits_for_it_beyond_graceful_timeout(prefork_server: Start, module: Module) -> None:
    folder = module(ONCE.replace("def end():", "def end():\n    import time; time.sleep(1.5)"))
    server = prefork_server("mine:loop", folder=folder, workers=1, graceful_timeout=0.1)
    first = watch.fork_server(server)
    assert server.stop() == 0
    assert ended(folder) == [first]


@pytest.mark.slow
def test_a_quick_stop_does_not_wait_for_what_does_not_end(prefork_server: Start, module: Module) -> None:
    folder = module(ONCE.replace("def end():", "def end():\n    import time; time.sleep(600)"))
    server = prefork_server("mine:loop", folder=folder, workers=1)
    with watch.soon("a quick stop"):
        assert server.stop(signal.SIGQUIT) == 0
    assert "what its import has registered for the end was not run" in server.log()


BREAKS = {
    "import": ("raise RuntimeError('broken')", {}),
    "on_boot": ("", {"on_boot": "mine:hook"}),
    "on_worker_start": ("", {"on_worker_start": "mine:hook"}),
}


@pytest.mark.parametrize("where", BREAKS)
def test_a_refused_reload_runs_what_its_import_registered(prefork_server: Start, module: Module, where: str) -> None:
    statement, hooks = BREAKS[where]
    folder = module(ONCE + "def hook():\n    pass\n")
    server = prefork_server("mine:loop", folder=folder, workers=1, **hooks)
    first = watch.fork_server(server)
    module(f"{ONCE}\ndef hook():\n    raise RuntimeError('broken')\n{statement}\n")
    assert "broken" in server.command("reload")["reason"]
    watch.until("it has run", lambda: ended(folder))
    assert first not in ended(folder)
    watch.family_of(server.pid, 2, "the refused generation has gone")
    assert len(ended(folder)) == 1


def test_a_start_that_fails_runs_it(module: Module) -> None:
    folder = module(ONCE + "raise RuntimeError('broken')\n")
    with pytest.raises(StartError, match="broken"), serve("mine:loop", folder=folder):
        pass
    assert len(ended(folder)) == 1


def test_a_fork_server_without_a_master_runs_it(prefork_server: Start, module: Module) -> None:
    folder = module(ONCE)
    server = prefork_server("mine:loop", folder=folder, workers=1)
    first = watch.fork_server(server)
    with server.connect() as held:
        assert held.recv(1) == b"x"
        os.kill(server.pid, signal.SIGKILL)
        server.process.wait() if server.process is not None else None
        assert ended(folder) == []
    watch.until("it has ended", lambda: watch.is_gone(first))
    assert ended(folder) == [first]


def test_processes_that_the_import_started_end_with_their_generation(prefork_server: Start, module: Module) -> None:
    folder = module(
        "import multiprocessing, subprocess, time\n"
        "one = subprocess.Popen(['sleep', '600'])\n"
        "two = multiprocessing.get_context('fork').Process(target=time.sleep, args=(600,), daemon=True)\n"
        "two.start()\n"
        "three = multiprocessing.get_context('fork').Process(target=time.sleep, args=(600,))\n"
        "three.start()\n"
        "def loop(sock):\n    sock.sendall(f'{one.pid} {two.pid} {three.pid}'.encode())\n"
    )
    server = prefork_server("mine:loop", folder=folder, workers=3)
    with server.connect() as sock:
        pids = [int(pid) for pid in sock.recv(64).split()]
    watch.logged(server, f"{pids[0]} (sleep 600)")
    assert server.command("scale", workers=1)["ok"]
    watch.settled(server, 1)
    assert [psutil.pid_exists(pid) for pid in pids] == [True] * 3
    assert server.command("reload")["ok"]
    watch.until("they have ended", lambda: all(map(watch.is_gone, pids)))
    assert "has ended (" not in server.log()


def test_check_runs_what_was_registered_and_names_it(module: Module) -> None:
    folder = module(ONCE + "import subprocess\nsleeper = subprocess.Popen(['sleep', '600'])\n")
    done = check(folder)
    assert done.returncode == 0
    assert "until when its fork server stays: atexit mine.end\n" in done.stdout
    assert "# Started by the import, and ended with each generation: " in done.stdout
    assert "(sleep 600)\n" in done.stdout
    assert len(ended(folder)) == 1


def test_check_tells_where_what_was_registered_hangs(module: Module) -> None:
    folder = module(ONCE.replace("def end():", "def end():\n    import time; time.sleep(600)"))
    began = time.monotonic()
    done = check(folder, "--boot-timeout=0.5")
    assert time.monotonic() - began < watch.DEADLINE
    assert done.returncode == 78
    assert "what the import has registered for the end has not ended after boot_timeout = 0.5 s" in done.stderr
    assert "in end" in done.stderr
    assert "finalizers.py" not in done.stderr
