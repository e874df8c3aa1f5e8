"""`prefork.Server`: the daemon from Python."""

import functools
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import prefork
from prefork import errors
from prefork.errors import ConfigError, PreforkError, RefusedError
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


def test_an_object_is_told_with_what_to_pass() -> None:
    begins = r"was given a \w+, and the fork server imports the handler by its name: pass "
    module = __name__
    program = type("Shout", (), {"__module__": "__main__"})
    for given, right in (
        (
            test_an_object_is_told_with_what_to_pass,
            f'"{module}:test_an_object_is_told_with_what_to_pass", and do not import it here',
        ),
        (lambda _: None, 'MODULE:ATTR as text, like "mine:loop", of a file of its own'),
        (functools.partial(print), "MODULE:ATTR as text"),
        (program, '"mine:Shout", with Shout in a file of its own (mine.py), not in the program itself'),
        (subprocess, '"subprocess:ATTR"'),
        (3, "MODULE:ATTR as text"),
    ):
        with pytest.raises(ConfigError, match=begins + re.escape(right)):
            prefork.Server(given)  # type: ignore[arg-type]


def test_what_a_server_raises_is_a_name_of_the_package_and_has_an_exit_code() -> None:
    raised = {error for error in vars(errors).values() if isinstance(error, type) and issubclass(error, PreforkError)}
    assert raised == {getattr(prefork, name) for name in prefork.__all__ if name.endswith("Error")}
    assert {error.exit_code for error in raised} == {1, 69, 70, 77, 78}


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
