"""`prefork.Server`: the daemon from Python."""

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import prefork
from prefork.errors import ConfigError, RefusedError
from prefork.testing import Server, connect
from tests import watch

Module = Callable[[str], Path]

SCRIPT = """
import os
import sys
import prefork
print("begins")
options = dict(bind=["127.0.0.1:{port}"], workers=2, control="{control}", drain_timeout=5.0, nodelay=False)
before = set(os.listdir("/proc/self/fd"))
status = prefork.Server("mine:loop", **options).run()
print("ends with", status, set(os.listdir("/proc/self/fd")) == before)
import signal
print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, signal.pthread_sigmask(signal.SIG_BLOCK, ()))
"""


def test_every_option_is_a_keyword_and_a_reload_sees_new_code(module: Module) -> None:
    folder = module("def loop(sock):\n    sock.sendall(b'old')\n")
    control, port = str(folder / "control"), watch.free_port()
    (folder / "main.py").write_text(SCRIPT.format(port=port, control=control))
    with subprocess.Popen([sys.executable, "main.py"], cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        server = Server(("127.0.0.1", port), process.pid, control, folder / "log", process)  # type: ignore[arg-type]
        watch.until("it listens", lambda: Path(control).exists())
        watch.settled(server, 2)
        with connect(server.address) as sock:
            assert sock.recv(3) == b"old"
        module("def loop(sock):\n    sock.sendall(b'new')\n")
        assert server.command("reload")["ok"]
        with connect(server.address) as sock:
            assert sock.recv(3) == b"new"
        assert server.command("stop")["ok"]
        output, _ = process.communicate(timeout=watch.DEADLINE)
    assert output == "begins\nends with 0 True\nTrue set()\n", "nothing that was buffered is written by a fork, too"


IMPATIENT = """
import socket
import prefork
socket.setdefaulttimeout(0.001)
prefork.Server("mine:loop", bind=["127.0.0.1:{port}", "unix:{path}"], workers=1, control="{control}").run()
"""


def test_the_programs_default_timeout_is_no_acceptors(module: Module) -> None:
    folder = module("def loop(sock):\n    sock.sendall(b'served' if sock.gettimeout() is None else b'impatient')\n")
    control, path, port = str(folder / "control"), str(folder / "path"), watch.free_port()
    (folder / "main.py").write_text(IMPATIENT.format(port=port, path=path, control=control))
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen([sys.executable, "main.py"], cwd=folder, stderr=log) as process,
    ):
        server = Server(("127.0.0.1", port), process.pid, control, folder / "log", process)
        watch.until("it listens", lambda: Path(control).exists())
        watch.settled(server, 1, listener=1)
        for address in (server.address, path):
            with connect(address) as sock:
                assert sock.recv(64) == b"served"
        assert server.command("stop")["ok"]
    assert "accept failed" not in server.log()


def test_a_wrong_option_is_told_at_once_with_its_place() -> None:
    with pytest.raises(ConfigError, match=r"unknown option 'worker' of prefork\.Server: did you mean 'workers'"):
        prefork.Server("echo:loop", worker=3)
    with pytest.raises(ConfigError, match=r"workers = 0 of prefork\.Server: must be a whole number"):
        prefork.Server("echo:loop", workers=0)


def test_keywords_beat_the_environment_which_beats_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "prefork.toml"
    file.write_text("module = 'echo:loop'\nworkers = 1\nbacklog = 1\nnice = 1\n")
    monkeypatch.setenv("PREFORK_WORKERS", "2")
    monkeypatch.setenv("PREFORK_BACKLOG", "2")
    conf = prefork.Server(config=str(file), workers=3)._sources.load()
    assert (conf.workers, conf.backlog, conf.nice) == (3, 2, 1)


def test_the_file_may_be_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "prefork.toml"
    file.write_text("module = 'echo:loop'\nworkers = 3\n")
    monkeypatch.setenv("PREFORK_CONFIG", str(file))
    assert prefork.Server()._sources.load().workers == 3


def test_where_a_daemon_can_not_live_it_says_why() -> None:
    sys.modules["imported_already"] = sys
    try:
        with pytest.raises(ConfigError, match="imported in this process already"):
            prefork.Server("imported_already:loop").run()
    finally:
        del sys.modules["imported_already"]
    release = threading.Event()
    other = threading.Thread(target=release.wait)
    other.start()
    try:
        with pytest.raises(RefusedError, match="without other threads"):
            prefork.Server("echo:loop").run()
    finally:
        release.set()
        other.join()
