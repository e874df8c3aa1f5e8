"""Deploys by a link that is switched (``current -> releases/2``): everything that was given by its name follows it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from prefork.testing import Server, connect, serve
from tests import watch
from tests.integration.test_upgrade import address, own_python, says, upgrade, venv

HANDLER = "from word import WORD\ndef loop(sock):\n    sock.sendall(b'{number} ' + WORD)\n"
WHO = "import sys\ndef loop(sock):\n    sock.sendall(sys.prefix.encode())\n"
SERVE = ["serve", "--module=mine:loop", "--bind=127.0.0.1:0", "--workers=1"]


class Releases:
    """Two releases, and the link, which names the first."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.current = root / "current"
        for number in (1, 2):
            self.write(number, "mine.py", HANDLER.format(number=number))
            self.write(number, "lib/word.py", f"WORD = b'word {number}'\n")
            self.write(number, "prefork.toml", f"max_workers = 1{number}\n")
        self.current.symlink_to("releases/1")

    def write(self, number: int, name: str, text: str) -> None:
        """A file of one of them."""
        file = self.root / "releases" / str(number) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def switch(self, *, remove: bool) -> None:
        """To the second, in one step; the first may be removed then."""
        (self.root / "next").symlink_to("releases/2")
        os.rename(self.root / "next", self.current)
        if remove:
            shutil.rmtree(self.root / "releases" / "1")


@pytest.fixture
def releases(tmp_path: Path) -> Releases:
    return Releases(tmp_path)


@contextmanager
def running(releases: Releases, *words: str, python: str = sys.executable, **environment: str) -> Iterator[Server]:
    """A daemon that was started in the current release."""
    command = [python, "-m", "prefork", *SERVE, *words]
    with watch.running(command, releases.current, releases.root, environment=environment) as server:
        assert server.process.poll() is None, server.log()
        yield server


@pytest.mark.parametrize(("how", "remove"), [("flag", True), ("variable", False)])
def test_a_reload_and_an_upgrade_take_code_and_configuration_of_one_release(releases: Releases, how: str, remove: bool) -> None:
    words = ["--config=prefork.toml"] if how == "flag" else []
    named = {"PREFORK_CONFIG": "prefork.toml"} if how == "variable" else {}
    path = os.pathsep.join(["lib", str(Path(__file__).parents[2])])
    with running(releases, *words, PYTHONPATH=path, **named) as server:
        where = address(server)
        assert (says(where), server.status()["max_workers"]) == (b"1 word 1", 11)
        releases.switch(remove=remove)
        assert server.command("reload")["ok"], server.log()
        assert (says(where), server.status()["max_workers"]) == (b"2 word 2", 12)
        releases.write(2, "prefork.toml", "max_workers = 13\n")
        assert upgrade(server)["ok"], server.log()
        assert (says(where), server.status()["max_workers"]) == (b"2 word 2", 13)
        releases.write(2, "prefork.toml", "max_workers = 14\n")
        assert server.command("reload")["ok"], server.log()
        assert server.status()["max_workers"] == 14
        shutil.rmtree(releases.root / "releases" / "2")
        reason = server.command("reload")["reason"]
        assert reason.startswith(f"{releases.current}/prefork.toml"), "where it was looked for"


PLACES = {
    "bind": "unix:run/s?mode=0666",  # a Unix socket's path is short, and that of a test's folder is long
    "chdir": "app",
    "pid_file": "run/pid",
    "log_file": "run/log",
    "access_log": "./run/access",
}


@pytest.mark.parametrize("how", ["flags", "variables", "file"])
def test_what_the_daemon_makes_is_where_it_was_given_and_named_so(releases: Releases, how: str) -> None:
    for number in (1, 2):
        releases.write(number, "app/deep.py", f"def loop(sock):\n    sock.sendall(b'app {number}')\n")
        releases.write(number, "run/nothing", "")
    given = {**PLACES, "module": "deep:loop", "control": "run/c"}
    words = [f"--{key.replace('_', '-')}={value}" for key, value in given.items()] if how == "flags" else []
    variables = {f"PREFORK_{key.upper()}": value for key, value in given.items()} if how == "variables" else {}
    if how == "file":
        text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in given.items())
        for number in (1, 2):
            releases.write(number, "prefork.toml", text)
        words = ["--config=prefork.toml"]
    run = releases.current / "run"
    old = releases.root / "releases" / "1" / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "prefork", "serve", *words],
        cwd=releases.current,
        env={**os.environ, **variables, "PWD": str(releases.current)},
    )
    server = Server(str(run / "s"), process.pid, str(run / "c"), old / "log", process)
    try:
        watch.until("it serves", lambda: process.poll() is not None or (server.log_path.exists() and " serving " in server.log()))
        assert (run / "pid").read_text() == f"{server.pid}\n"
        with connect(server.address) as sock:
            assert sock.recv(64) == b"app 1"
        assert server.status()["listeners"][0]["address"] == f"unix:{run}/s"
        watch.until("the connection is logged", lambda: "unix ok" in (run / "access").read_text())
        releases.switch(remove=False)
        assert Server(None, process.pid, str(old / "c"), old / "log", process).command("reload")["ok"], "it is named as it was"
        # What the names stand for now was not there: it is made anew.
        with connect(server.address) as sock:
            assert sock.recv(64) == b"app 2"
    finally:
        assert server.stop() == 0


SCRIPT = """
import prefork
prefork.Server("mine:loop", config="prefork.toml", bind="127.0.0.1:0", control="run/c", workers=1).run()
"""


def test_keywords_too(releases: Releases) -> None:
    for number in (1, 2):
        releases.write(number, "run/nothing", "")
        releases.write(number, "word.py", "WORD = b'word'\n")
    settings = {**os.environ, "PWD": str(releases.current)}
    with subprocess.Popen([sys.executable, "-c", SCRIPT], cwd=releases.current, env=settings) as process:
        control = str(releases.current / "run" / "c")
        server = Server(None, process.pid, control, Path(), process)
        watch.until("it serves", lambda: os.path.exists(control) and server.status()["state"] == "running")
        releases.switch(remove=False)
        old = Server(None, process.pid, str(releases.root / "releases" / "1" / "run" / "c"), Path(), process)
        assert old.command("reload")["ok"]
        assert (says(address(server)), server.status()["max_workers"]) == (b"2 word", 12)
        assert server.stop() == 0


def test_the_fixture_is_started_by_a_folders_name(releases: Releases) -> None:
    for number in (1, 2):
        releases.write(number, "word.py", "WORD = b'word'\n")
    with serve("mine:loop", folder=releases.current, workers=1, config="prefork.toml") as server:
        releases.switch(remove=True)
        assert server.command("reload")["ok"]
        assert (says(server.address), server.status()["max_workers"]) == (b"2 word", 12)


def test_check_shows_paths_by_the_folders_name(releases: Releases) -> None:
    releases.write(1, "word.py", "WORD = b'word'\n")
    command = [sys.executable, "-m", "prefork", "check", *SERVE[1:], "--config=prefork.toml", "--log-file=./log", "--chdir=."]
    settings = {**os.environ, "PWD": str(releases.current)}
    done = subprocess.run(command, cwd=releases.current, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f'\nlog_file = "{releases.current}/log"\n' in done.stdout
    assert f'\nchdir = "{releases.current}/."\n' in done.stdout


def test_an_interpreter_in_the_release_is_the_next_ones_after_an_upgrade(releases: Releases) -> None:
    for number in (1, 2):
        venv(releases.root / "releases" / str(number) / "venv", own_python())
        releases.write(number, "mine.py", WHO)
    with running(releases, python="venv/bin/python") as server:
        assert says(address(server)) == f"{releases.root}/releases/1/venv".encode()
        releases.switch(remove=True)
        assert upgrade(server)["ok"], server.log()
        assert says(address(server)) == f"{releases.current}/venv".encode()


@pytest.mark.parametrize("remove", [False, True])
def test_a_script_whose_first_line_names_the_old_release_is_told(releases: Releases, remove: bool) -> None:
    for number in (1, 2):
        place = releases.root / "releases" / str(number) / "venv"
        venv(place, own_python())
        releases.write(number, "mine.py", WHO)
        script = place / "bin" / "prefork"
        script.write_text(f"#!{place}/bin/python\nfrom prefork.entry import entry\nentry()\n")
        script.chmod(0o755)
    command = ["venv/bin/prefork", *SERVE]
    with watch.running(command, releases.current, releases.root) as server:
        releases.switch(remove=remove)
        answer = upgrade(server)
        assert not answer["ok"]
        old = releases.root / "releases" / "1" / "venv" / "bin" / "python"
        assert f"{releases.current}/venv/bin/prefork names another interpreter in its first line than {old}" in answer["reason"]
        assert server.command("reload")["ok"], "code and configuration need no other interpreter"


def test_what_was_removed_from_the_path_is_named_where_a_module_is_missing(releases: Releases) -> None:
    place = releases.root / "releases" / "1" / "lib"
    path = os.pathsep.join([str(place), str(Path(__file__).parents[2])])
    with running(releases, PYTHONPATH=path) as server:
        releases.switch(remove=True)
        reason = server.command("reload")["reason"]
        assert "ModuleNotFoundError: No module named 'word'" in reason
        assert reason.endswith(f"\nremoved from the Python path since the start: {place}: an upgrade or a restart finds it anew")
