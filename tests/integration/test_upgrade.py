"""Upgrades in place: another program under the same pid, and nobody notices; a successor that is no good changes nothing."""

import json
import os
import shutil
import signal
import site
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import prefork
from prefork.system import program
from prefork.testing import Server, connect
from tests import watch
from tests.conftest import HANDLERS
from tests.load import Load

Start = Callable[..., Server]
Module = Callable[[str], Path]

# Which Python serves, and what was sent.
WHO = """
import os
def loop(sock):
    while data := sock.recv(64):
        sock.sendall(os.readlink("/proc/self/exe").encode() + b" " + data)
"""
ECHO = "def loop(sock):\n    while data := sock.recv(64):\n        sock.sendall(data)\n"
DEBIANS = "/usr/bin/python3"


def upgrade(server: Server) -> dict[str, Any]:
    """What `prefork upgrade` is told."""
    asked = server.command("upgrade")
    if not asked["ok"]:
        return asked
    return server.command("outcome", upgrade=asked["upgrade"])


def address(server: Server) -> tuple[str, int]:
    host, _, port = server.status()["listeners"][0]["address"].rpartition(":")
    return host, int(port)


def says(where: Any, word: bytes = b"x") -> bytes:
    with connect(where) as sock:
        sock.sendall(word)
        return sock.recv(256)


@pytest.mark.slow
def test_an_upgrade_under_load_loses_nobody_and_keeps_pid_counters_and_connections(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=4, spare_timeout=1)
    watch.settled(server, 4)
    fds = len(watch.descriptors(server.pid))
    with connect(server.address) as held, Load(server.address, clients=4) as load:
        held.sendall(b"before")
        assert held.recv(64) == b"before"
        for generation in (2, 3, 4):
            before = load.connections
            watch.until("the load runs", lambda before=before: load.connections > before + 50)  # type: ignore[misc]
            accepted = server.status()["totals"]["accepted"]
            assert upgrade(server) == {"ok": True, "generation": generation, "version": prefork.__version__, "suspended": False}
            status = server.status()
            assert (status["pid"], status["generation"], status["state"]) == (server.pid, generation, "running")
            assert status["totals"]["accepted"] >= accepted
            assert watch.identity_holds(status["totals"])
            held.sendall(b"still here")
            assert held.recv(64) == b"still here"
        # The held one was accepted by a worker of a program that has gone twice.
        assert server.status()["totals"]["serving"] >= 1
    totals = watch.quiet(server)
    assert (load.failures, load.refused) == ([], 0)
    assert totals["accepted"] == totals["ok"] == load.connections + 1
    watch.family_of(server.pid, 5, "the old generations have gone")
    watch.settled(server, 4)
    assert len(watch.descriptors(server.pid)) == fds
    assert server.process.poll() is None
    assert server.stop() == 0
    assert f"stopped: {totals['accepted']} connections accepted, 0 cut" in server.log()
    assert not os.path.exists(server.control)


def test_a_signal_is_enough(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=1)
    os.kill(server.pid, signal.SIGUSR2)
    watch.logged(server, "generation 2 serves")
    assert f"prefork {prefork.__version__} goes on where prefork {prefork.__version__} was, pid {server.pid}" in server.log()
    assert server.status()["pid"] == server.pid


def test_the_command_waits_for_the_new_code_and_tells(prefork_server: Start, module: Module) -> None:
    server = prefork_server("mine:loop", folder=module(ECHO), workers=1)
    command = [sys.executable, "-m", "prefork", "upgrade", "--control", server.control]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"upgraded: prefork {prefork.__version__}, generation 2 serves\n")
    module("1 / 0\n")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "upgrade refused, the old code keeps serving: mine:loop: the import raised" in done.stderr
    assert "ZeroDivisionError" in done.stderr
    assert says(server.address) == b"x"
    assert server.status()["generation"] == 2


def test_signals_that_come_while_the_program_changes_are_obeyed_by_the_next(prefork_server: Start) -> None:
    """Between an exec and the new handlers each of them kills; here they come all the time."""
    server = prefork_server("echo:loop", workers=1)
    for _ in range(3):
        number = server.command("upgrade")["upgrade"]
        while server.status()["state"] == "upgrading":
            for signo in (signal.SIGTTIN, signal.SIGTTOU, signal.SIGUSR1, signal.SIGCHLD):
                os.kill(server.pid, signo)
        assert server.command("outcome", upgrade=number)["ok"], server.log()
    assert server.status()["pid"] == server.pid
    os.kill(server.pid, signal.SIGUSR2)
    watch.logged(server, "becomes what", times=4)
    assert server.stop() == 0


def test_one_that_was_started_by_path_with_a_relative_one(tmp_path: Path, module: Module) -> None:
    script = tmp_path / "bin" / "prefork"
    script.parent.mkdir()
    script.write_text("from prefork.entry import entry\nentry()\n")
    command = [sys.executable, "bin/prefork", "serve", "--module=mine:loop", "--workers=1", "--bind=127.0.0.1:0"]
    with watch.running(command, module(ECHO), tmp_path) as server:
        assert upgrade(server)["ok"]
        assert says(address(server)) == b"x"


def venv(folder: Path, python: str) -> None:
    """A virtual environment that finds what this interpreter finds, or one made anew for another Python."""
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    (folder / "bin" / "python").unlink(missing_ok=True)
    (folder / "bin" / "python").symlink_to(python)
    (folder / "pyvenv.cfg").write_text(f"home = {os.path.dirname(python)}\n")
    packages = folder / "lib" / "python{}.{}".format(*sys.version_info) / "site-packages"
    packages.mkdir(parents=True, exist_ok=True)
    places = {*site.getsitepackages(), str(Path(prefork.__file__).parents[1])}
    (packages / "ours.pth").write_text("".join(f"{place}\n" for place in places))


def own_python() -> str:
    return os.path.realpath(sys.executable)


def needs_another_python() -> None:
    watch.needs(DEBIANS)
    version = subprocess.run([DEBIANS, "-c", "import sys; print(sys.version_info[:2])"], capture_output=True, text=True, check=True)
    if sys.version_info[:2] != (3, 11) or version.stdout.strip() != "(3, 11)" or os.path.realpath(DEBIANS) == own_python():
        pytest.skip("needs a Python 3.11 of its own and the system's, to switch between them")


def test_a_venv_whose_python_was_switched_is_followed(tmp_path: Path, module: Module) -> None:
    needs_another_python()
    place = tmp_path / "venv"
    venv(place, own_python())
    command = [str(place / "bin" / "python"), "-m", "prefork", "serve", "--module=mine:loop", "--workers=2", "--bind=127.0.0.1:0"]
    with watch.running(command, module(WHO), tmp_path) as server:
        where = address(server)
        assert says(where) == f"{own_python()} x".encode()
        with connect(where) as held, Load(where, clients=1, rate=200) as load:
            held.sendall(b"1")
            held.recv(256)
            for python in (os.path.realpath(DEBIANS), own_python()):
                venv(place, python)
                assert upgrade(server)["ok"], server.log()
                assert os.readlink(f"/proc/{server.pid}/exe") == python
                assert says(where) == f"{python} x".encode()
                held.sendall(b"2")
                assert held.recv(256) == f"{own_python()} 2".encode()
        assert load.classes.keys() <= {"wrong bytes"}


def test_a_working_directory_that_was_removed_is_no_hindrance(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    command = [sys.executable, "-m", "prefork", "serve", "--module=echo:loop", "--workers=1", "--bind=127.0.0.1:0"]
    with watch.running(command, folder, tmp_path) as server:
        folder.rmdir()
        for generation in (2, 3):
            assert upgrade(server)["generation"] == generation
            assert says(address(server)) == b"x"
        assert f"the working directory {folder} was removed" in server.log()


def test_what_is_found_on_the_python_path_is_found_from_nowhere_too(tmp_path: Path, module: Module) -> None:
    folder, place = tmp_path / "gone", module(ECHO)
    folder.mkdir()
    command = [sys.executable, "-m", "prefork", "serve", "--module=mine:loop", "--workers=1", "--bind=127.0.0.1:0"]
    with watch.running(command, folder, tmp_path, environment={"PYTHONPATH": str(place)}) as server:
        folder.rmdir()
        assert upgrade(server)["ok"]
        assert says(address(server)) == b"x"
        (place / "mine.py").unlink()
        assert "no module 'mine' in the working directory, which was removed, or on the Python path" in upgrade(server)["reason"]


def test_a_working_directory_that_was_removed_and_made_again_is_entered_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "release"
    folder.mkdir()
    (folder / "mine.py").write_text(ECHO)
    command = [sys.executable, "-m", "prefork", "serve", "--module=mine:loop", "--workers=1", "--bind=127.0.0.1:0"]
    with watch.running(command, folder, tmp_path) as server:
        shutil.rmtree(folder)
        answer = upgrade(server)
        assert not answer["ok"]
        assert answer["reason"].startswith("mine:loop: no module 'mine' in the working directory, which was removed,"), answer
        folder.mkdir()
        (folder / "mine.py").write_text(WHO)
        assert upgrade(server)["ok"]
        assert says(address(server)) == f"{own_python()} x".encode()


SUCCESSOR = """
import sys
from prefork import carried, upgrading
from prefork.entry import entry
{}
entry()
"""


@pytest.fixture
def successor(tmp_path: Path, module: Module) -> Iterator[tuple[Server, Callable[[str], None]]]:
    """A daemon, and what its next program does first."""
    script = tmp_path / "program.py"

    def write(what: str) -> None:
        script.write_text(SUCCESSOR.format(what))

    write("")
    command = [sys.executable, str(script), "serve", "--module=mine:loop", "--workers=2", "--bind=127.0.0.1:0"]
    with watch.running([*command, "--spare-timeout=0.2"], module(ECHO), tmp_path) as server:
        yield server, write


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("carried.FORMAT = 99", "writes format 1, and this one reads format 99: it takes a restart"),
        ("carried.wire.VERSION = 2", "writes wire 1, and this one reads wire 2"),
        ("carried.scoreboard.VERSION = 2", "writes board 1, and this one reads board 2"),
        ("import no_such_module", "No module named 'no_such_module'"),
        ("sys.exit(3)", "the new program's check said nothing: exit status 3"),
        ("import os; os.abort()", "the new program's check said nothing: signal 6 (SIGABRT)"),
    ],
)
def test_a_successor_that_can_not_go_on_is_refused_before_anything_is_touched(
    successor: tuple[Server, Callable[[str], None]], what: str, reason: str
) -> None:
    server, write = successor
    before = watch.descriptors(server.pid)
    with connect(address(server)) as held:
        write(what)
        answer = upgrade(server)
        assert not answer["ok"]
        assert reason in answer["reason"], answer
        held.sendall(b"x")
        assert held.recv(64) == b"x"
    assert "upgrade refused, generation 1 keeps serving" in server.log()
    assert "becomes what" not in server.log()
    watch.settled(server, 2)
    assert watch.descriptors(server.pid).keys() == before.keys()
    write("")
    assert upgrade(server)["ok"]


@pytest.mark.parametrize("first", ["", "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"])
def test_a_successor_that_hangs_is_given_up(tmp_path: Path, module: Module, first: str) -> None:
    script = tmp_path / "program.py"
    script.write_text(SUCCESSOR.format("upgrading.START = 0.2"))
    command = [sys.executable, str(script), "serve", "--module=mine:loop", "--workers=1", "--bind=127.0.0.1:0", "--boot-timeout=1"]
    with watch.running([*command, "--spare-timeout=0.2"], module(ECHO), tmp_path) as server:
        script.write_text(SUCCESSOR.format(f"{first}\nimport time; time.sleep(600)"))
        assert upgrade(server)["reason"] == "the new program's check has not ended in time"
        assert says(address(server)) == b"x"
        watch.family_of(server.pid, 2, "it has gone")


@pytest.mark.parametrize(
    ("then", "reason"),
    [
        ("", "can't be executed: No such file or directory"),
        ("os.symlink('/bin/true', sys.executable)", "is another file than the one that was tried; try again"),
    ],
    ids=["vanishes", "becomes another"],
)
def test_a_successor_that_vanishes_after_its_trial_changes_nothing(tmp_path: Path, module: Module, then: str, reason: str) -> None:
    python, script = tmp_path / "python", tmp_path / "program.py"
    python.symlink_to(own_python())
    script.write_text(SUCCESSOR.format(""))
    places = os.pathsep.join([*site.getsitepackages(), str(Path(prefork.__file__).parents[1])])
    command = [str(python), str(script), "serve", "--module=mine:loop", "--workers=1", "--bind=127.0.0.1:0"]
    with (
        watch.running(command, module(ECHO), tmp_path, environment={"PYTHONPATH": places}) as server,
        connect(address(server)) as held,
    ):
        script.write_text(SUCCESSOR.format(f"import os; os.unlink(sys.executable)\n{then}"))
        fds = watch.descriptors(server.pid).keys()
        assert upgrade(server)["reason"] == f"{python} {reason}"
        held.sendall(b"x")
        assert held.recv(64) == b"x"
        assert watch.descriptors(server.pid).keys() == fds
        os.kill(server.pid, signal.SIGHUP)  # it hears signals again
        watch.logged(server, "generation 2 serves")


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        ("upgrading.Upgrading.adopt = fail", "RuntimeError: planted"),
        ('sys.argv += ["--wokers=3"] if sys.argv[1] == "serve" else []', "SystemExit: 2"),
    ],
    ids=["it can't go on with the state", "it does not take the command line"],
)
def test_a_successor_that_fails_after_all_goes_back(tmp_path: Path, module: Module, failure: str, reason: str) -> None:
    """Its check was fine; what goes wrong then is a bug, and the program that was is started again, if it is still there."""
    needs_another_python()
    place, script = tmp_path / "venv", tmp_path / "program.py"
    venv(place, own_python())
    fails = f"""
def fail(self, state):
    raise RuntimeError("planted")
import os
if os.readlink("/proc/self/exe") == {os.path.realpath(DEBIANS)!r}:
    {failure}
"""
    script.write_text(SUCCESSOR.format(fails))
    command = [str(place / "bin" / "python"), str(script), "serve", "--module=mine:loop", "--workers=2", "--bind=127.0.0.1:0"]
    with watch.running(command, module(ECHO), tmp_path) as server, connect(address(server)) as held:
        fds = len(watch.descriptors(server.pid))
        venv(place, os.path.realpath(DEBIANS))
        with Load(address(server), clients=1) as load:
            answer = upgrade(server)
            assert not answer["ok"]
            assert f"the new program failed, and became this one again: {reason}" in answer["reason"]
            before = load.connections
            watch.until("the load goes on", lambda: load.connections > before + 20)
        assert (load.failures, load.refused) == ([], 0)
        held.sendall(b"x")
        assert held.recv(64) == b"x"
        assert os.readlink(f"/proc/{server.pid}/exe") == own_python()
        assert len(watch.descriptors(server.pid)) == fds
        assert server.status()["generation"] == 1


FAILS = """
def fail(self, state):
    raise ValueError("planted \\udfff\\0")
upgrading.Upgrading.adopt = fail
"""


def test_releases_that_a_link_switches_go_back_to_the_one_that_was(tmp_path: Path, module: Module) -> None:
    for number, first in enumerate(("", FAILS, ""), 1):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "program.py").write_text(SUCCESSOR.format(first))

    def switch(number: int) -> None:
        (tmp_path / "next").symlink_to(str(number))
        (tmp_path / "next").rename(tmp_path / "current")

    switch(1)
    told = "import json, os\ndef loop(sock):\n    sock.recv(64)\n    sock.sendall(json.dumps(dict(os.environ)).encode())\n"
    command = [sys.executable, "current/program.py", "serve", "--module=mine:loop", "--workers=1", "--bind=127.0.0.1:0"]
    with watch.running(command, module(told), tmp_path) as server:

        def environment() -> dict[str, str]:
            with connect(address(server)) as sock:
                sock.sendall(b"x")
                found: dict[str, str] = json.loads(sock.makefile("rb").read())
                return {name: text for name, text in found.items() if name.startswith("P")}

        before = environment()
        for generation in (2, 3):
            switch(2)
            number = server.command("upgrade")["upgrade"]
            os.kill(server.pid, signal.SIGHUP)  # it is not forgotten, either
            answer = server.command("outcome", upgrade=number)
            assert answer["reason"].endswith(r"became this one again: ValueError: planted \udfff\0")
            watch.logged(server, f"generation {generation} serves")
        assert environment() == before
        switch(3)
        assert upgrade(server)["ok"]
        assert environment() == before


FAILS_ONCE = """
import os
failed = {!r}
def fail(self, state):
    open(failed, "w").close()
    raise RuntimeError("planted")
if not os.path.exists(failed):
    upgrading.Upgrading.adopt = fail
"""


def test_who_goes_back_replaces_a_fork_server_that_was_dead_before(
    successor: tuple[Server, Callable[[str], None]], module: Module, tmp_path: Path
) -> None:
    server, write = successor
    module("1 / 0\n")
    os.kill(watch.fork_server(server), signal.SIGKILL)
    watch.logged(server, "a new fork server in 2.2 s")
    module(ECHO)
    write(FAILS_ONCE.format(str(tmp_path / "failed")))
    assert "became this one again: RuntimeError: planted" in upgrade(server)["reason"]
    watch.logged(server, "generation 4 serves")
    watch.settled(server, 2)


def test_log_files_go_on_whatever_has_become_of_their_folders(tmp_path: Path, module: Module) -> None:
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs" / "log"
    command = [sys.executable, "-m", "prefork", "serve", "--module=mine:loop", "--workers=1", "--bind=127.0.0.1:0"]
    with watch.running([*command, f"--log-file={log}", "--access-log=-"], module(ECHO), tmp_path, log) as server:
        with log.open() as file, connect(address(server)) as held:
            held.sendall(b"x")
            held.recv(64)
            shutil.rmtree(tmp_path / "logs")
            assert upgrade(server)["ok"]
            (busy,) = watch.workers(server, "busy")
            os.kill(busy["pid"], signal.SIGKILL)
            assert held.recv(64) == b""
            watch.until("the death is told where the log was", lambda: "SIGKILL" in file.read())
        assert says(address(server)) == b"x"


def test_a_fork_server_that_dies_during_the_trial_is_replaced_before_the_upgrade(prefork_server: Start, module: Module) -> None:
    server = prefork_server("mine:loop", folder=module(ECHO), workers=2)
    module("import time\ntime.sleep(1)\n" + ECHO)
    number = server.command("upgrade")["upgrade"]
    os.kill(watch.fork_server(server), signal.SIGKILL)
    assert server.command("outcome", upgrade=number)["generation"] == 3
    watch.settled(server, 2)
    watch.family_of(server.pid, 3, "only one generation is left")


def test_who_has_asked_nothing_yet_is_told_to_ask_again(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=1)
    with connect(server.control) as silent, connect(server.control) as slow:
        slow.sendall(b'{"command": "sta')
        assert upgrade(server)["ok"]
        for client in (silent, slow):
            answer = json.loads(client.makefile("rb").read())
            assert (answer["ok"], answer["again"]) == (False, True)


def test_an_upgrade_whose_fork_server_dies_at_once_is_answered_at_once(prefork_server: Start, module: Module) -> None:
    server = prefork_server("mine:loop", folder=module(ECHO), workers=1)
    module("import os, sys\nif not any('adopt' in word for word in sys.orig_argv):\n    os.kill(os.getpid(), 9)\n" + ECHO)
    with watch.soon("an answer"):
        reason = upgrade(server)["reason"]
    assert f"prefork {prefork.__version__} runs, but its reload was refused: mine:loop: the fork server died" in reason


def test_the_time_at_the_ceiling_does_not_go_back(prefork_server: Start) -> None:
    server = prefork_server("echo:loop", workers=1, max_workers=1)
    with connect(server.address):
        before = watch.until("at the ceiling for a while", lambda: (s := server.status()["saturated_seconds"]) > 0.5 and s)
        assert upgrade(server)["ok"]
        assert server.status()["saturated_seconds"] >= before


@pytest.mark.slow
def test_an_upgrade_during_a_reload_is_refused_and_a_reload_during_an_upgrade_is_part_of_it(
    prefork_server: Start, module: Module
) -> None:
    server = prefork_server("mine:loop", folder=module("import time\ntime.sleep(1)\n" + ECHO), workers=1)
    os.kill(server.pid, signal.SIGHUP)
    watch.until("the reload has begun", lambda: server.status()["state"] == "reloading")
    assert "a reload is under way" in server.command("upgrade")["reason"]
    watch.logged(server, "generation 2 serves")
    number = server.command("upgrade")["upgrade"]
    assert server.status()["state"] == "upgrading"
    assert "an upgrade is under way" in server.command("upgrade")["reason"]
    assert server.command("reload") == {"ok": True, "upgrade": number}
    assert server.command("outcome", upgrade=number)["generation"] == 3
    assert server.command("outcome", upgrade=number + 1)["ok"] is False
    assert server.command("outcome")["ok"] is False


def test_a_reload_that_waited_for_an_upgrade_that_was_refused_is_done(prefork_server: Start, module: Module) -> None:
    server = prefork_server("mine:loop", folder=module(ECHO), workers=1, boot_timeout=30)
    module("import time, sys\nif any('adopt' in word for word in sys.orig_argv):\n    time.sleep(0.5)\n    1 / 0\n" + ECHO)
    number = server.command("upgrade")["upgrade"]
    os.kill(server.pid, signal.SIGHUP)
    assert "ZeroDivisionError" in server.command("outcome", upgrade=number)["reason"]
    watch.logged(server, "generation 2 serves")


def test_a_stop_during_the_trial_ends_both(prefork_server: Start, module: Module) -> None:
    server = prefork_server("mine:loop", folder=module(ECHO), workers=1)
    module("import time\ntime.sleep(600)\n")
    number = server.command("upgrade")["upgrade"]
    watch.until("the trial runs", lambda: any("check" in p.cmdline() for p in watch.family(server.pid) if not watch.is_gone(p.pid)))
    with connect(server.control) as asked:
        asked.sendall(json.dumps({"command": "outcome", "upgrade": number}).encode() + b"\n")
        assert server.stop() == 0
        assert json.loads(asked.makefile("rb").read()) == {"ok": False, "reason": "the daemon is stopping"}


def test_everything_that_is_held_is_held_after_it(tmp_path: Path, module: Module) -> None:
    """A Unix socket with its path, an inherited one, the pid file with its lock, a suspension, and who drains."""
    with socket.create_server(("127.0.0.1", 0)) as ours:
        pid_file, path = tmp_path / "pid", tmp_path / "socket"
        command = [sys.executable, "-m", "prefork", "serve", "--module=mine:loop", "--workers=1", f"--pid-file={pid_file}"]
        command += [f"--bind=unix:{path}?mode=0660", f"--bind=fd:{ours.fileno()}", "--bind=127.0.0.1:0"]
        with watch.running(command, module(ECHO), tmp_path, fds=(ours.fileno(),)) as server:
            tcp = ("127.0.0.1", int(server.status()["listeners"][2]["address"].rpartition(":")[2]))
            everywhere = [str(path), ours.getsockname(), tcp]
            inode, mode = path.stat().st_ino, path.stat().st_mode
            with connect(str(path)) as held:
                held.sendall(b"1")
                assert held.recv(64) == b"1"
                assert server.command("suspend")["ok"]
                assert upgrade(server)["suspended"] is True
                assert upgrade(server)["ok"]
                assert (path.stat().st_ino, path.stat().st_mode) == (inode, mode)
                assert pid_file.read_text() == f"{server.pid}\n"
                assert server.status()["state"] == "suspended"
                assert server.command("resume")["ok"]
                assert [says(where) for where in everywhere] == [b"x"] * 3
                held.sendall(b"2")
                assert held.recv(64) == b"2"
            second = subprocess.run(
                [*command, "--name=second"], cwd=tmp_path, capture_output=True, text=True, check=False, pass_fds=(ours.fileno(),)
            )
            assert second.returncode == 69
            assert f"the daemon with pid {server.pid} is running and holds it" in second.stderr
            # A reload can still tell what was inherited from what was not.
            assert server.command("reload")["ok"]
            assert server.stop() == 0
            assert not path.exists()
            assert not pid_file.exists()
        with connect(ours.getsockname()), ours.accept()[0]:
            pass


def test_workers_of_a_dead_fork_server_are_carried_too(prefork_server: Start, module: Module) -> None:
    server = prefork_server("mine:loop", folder=module(ECHO), workers=2)
    with connect(server.address) as held:
        held.sendall(b"1")
        held.recv(64)
        module("1 / 0\n")
        os.kill(watch.fork_server(server), signal.SIGKILL)
        watch.logged(server, "a new fork server in")
        module(ECHO)
        assert upgrade(server)["ok"]
        held.sendall(b"2")
        assert held.recv(64) == b"2"
        assert server.status()["totals"]["serving"] == 1
    watch.settled(server, 2)
    totals = watch.quiet(server)
    assert totals["accepted"] == totals["ok"] == 1


def test_deaths_and_totals_of_all_generations_are_carried(prefork_server: Start) -> None:
    server = prefork_server("bad:loop", folder=HANDLERS, workers=2)
    assert says(server.address, b"leaves at once") == b""
    before = watch.until("the death is known", lambda: server.status()["deaths"])
    assert upgrade(server)["ok"]
    assert server.status()["deaths"] == before
    assert server.status()["totals"]["killed"] == 1
    assert server.status()["uptime"] > 0


def test_a_daemon_that_was_not_started_by_the_command_says_so(tmp_path: Path, module: Module) -> None:
    folder = module(ECHO)
    (folder / "main.py").write_text(
        "import sys\nfrom prefork import Server\n"
        "Server('mine:loop', bind='127.0.0.1:0', workers=1, control=sys.argv[1].partition('=')[2]).run()\n"
    )
    with watch.running([sys.executable, "main.py"], folder, tmp_path) as server:
        assert "not started as `prefork serve`" in server.command("upgrade")["reason"]
        os.kill(server.pid, signal.SIGUSR2)
        watch.logged(server, "upgrade (SIGUSR2) ignored")
        assert says(address(server)) == b"x"


def test_somebody_elses_state_is_not_ours(tmp_path: Path, module: Module) -> None:
    command = [sys.executable, "-m", "prefork", "serve", "--module=mine:loop", "--workers=1", "--bind=127.0.0.1:0"]
    with watch.running(command, module(ECHO), tmp_path, environment={program.VARIABLE: "3:1"}) as server:
        assert says(address(server)) == b"x"
        assert "no option" not in server.log()
