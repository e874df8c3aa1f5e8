"""Successors that are no prefork, or do not go on: the check refuses them, or the old program comes back under the same pid."""

import json
import os
import shutil
import signal
import site
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import prefork
from prefork.testing import Server, connect
from tests import watch
from tests.integration.test_upgrade import ECHO, address, says, upgrade
from tests.load import Load

Module = Callable[[str], Path]

LAUNCHER = "from prefork.entry import entry\nentry()\n"
# The check finds nothing wrong with it.
SERVES_OTHERWISE = "import os, signal, sys, time\nif sys.argv[1] == 'serve':\n    {}\n" + LAUNCHER
# The last thing that the check does: it writes another text into its script.
BECOMES = "pass\nelse:\n    import atexit; atexit.register(lambda: open(__file__, 'w').write('{}'))"
# It has read the state, and means another one.
ANSWERS_ANOTHER = f"""
import os
from prefork.system import program
program.answer = lambda token: os.write(4, token[::-1].encode())
{LAUNCHER}"""
NO_PREFORK = "is no prefork, or not a whole one: its check has ended with exit status 0 and did not read the state"
BACK = "the new program failed, and became this one again: "


def command(script: Path, *more: str) -> list[str]:
    return [sys.executable, str(script), "serve", "--module=mine:loop", "--workers=1", "--bind=127.0.0.1:0", *more]


def test_an_interpreter_that_is_something_else_is_refused(tmp_path: Path, module: Module) -> None:
    python, script = tmp_path / "python", tmp_path / "launcher"
    python.symlink_to(os.path.realpath(sys.executable))
    script.write_text(LAUNCHER)
    places = os.pathsep.join([*site.getsitepackages(), str(Path(prefork.__file__).parents[1])])
    with watch.running([str(python), *command(script)[1:]], module(ECHO), tmp_path, environment={"PYTHONPATH": places}) as server:
        python.unlink()
        python.symlink_to("/bin/true")
        assert upgrade(server)["reason"] == f"{python} {script} {NO_PREFORK}"
        assert says(address(server)) == b"x"


def descriptors(server: Server) -> set[int]:
    """What the master has open: root's to see."""
    return set(watch.descriptors(server.pid)) if os.geteuid() == 0 else set()


def asked_to_upgrade(server: Server) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "prefork", "upgrade", "--control", server.control]
    return subprocess.run(line, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "text",
    [
        "",
        pytest.param("raise SystemExit(0)", marks=pytest.mark.slow),
        pytest.param("import os\nos._exit(0)", marks=pytest.mark.slow),
        pytest.param("import os\nos.write(4, b'token')", marks=pytest.mark.slow),
        pytest.param("import os\nos.write(4, os.pread(3, 1 << 20, 0))", marks=pytest.mark.slow),
        ANSWERS_ANOTHER,
    ],
    ids=["empty", "exits with 0", "leaves with 0", "says token", "says the state", "says another token"],
)
def test_what_does_not_prove_that_it_has_read_the_state_is_refused(tmp_path: Path, module: Module, text: str) -> None:
    script, pid_file = tmp_path / "launcher", tmp_path / "pid"
    script.write_text(LAUNCHER)
    with watch.running(command(script, f"--pid-file={pid_file}"), module(ECHO), tmp_path) as server:
        before = descriptors(server)
        script.write_text(text)
        done = asked_to_upgrade(server)
        assert (done.returncode, done.stdout) == (1, "")
        assert f"upgrade refused, the old code keeps serving: {sys.executable} {script} {NO_PREFORK}" in done.stderr
        assert says(address(server)) == b"x"
        assert pid_file.read_text() == f"{server.pid}\n"
        assert "becomes what" not in server.log()
        watch.until("its descriptors are closed", lambda: descriptors(server) == before)
        script.write_text(LAUNCHER)
        assert upgrade(server)["ok"]


@pytest.mark.parametrize("name", ["__main__.py", pytest.param("check.py", marks=pytest.mark.slow)])
def test_a_package_with_a_file_that_is_empty_is_refused(tmp_path: Path, module: Module, name: str) -> None:
    place = tmp_path / "release"
    package = shutil.copytree(Path(prefork.__file__).parent, place / "prefork", ignore=shutil.ignore_patterns("__pycache__"))
    line = [sys.executable, "-B", "-m", "prefork", "serve", "--module=mine:loop", "--workers=1", "--bind=127.0.0.1:0"]
    with watch.running(line, module(ECHO), tmp_path, environment={"PYTHONPATH": str(place)}) as server:
        whole = (package / name).read_text()
        (package / name).write_text("")
        assert not upgrade(server)["ok"]
        assert says(address(server)) == b"x"
        (package / name).write_text(whole)
        assert upgrade(server)["ok"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("sys.exit()", "it has ended with exit status 0, and not gone on"),
        pytest.param("sys.exit(3)", "SystemExit: 3", marks=pytest.mark.slow),
        pytest.param("raise OSError(28, 'No space')", "OSError: [Errno 28] No space", marks=pytest.mark.slow),
        (
            "signal.setitimer(signal.ITIMER_REAL, 0.05, 60); time.sleep(600)",
            "it has not gone on in time; it was at {script}:3 (<module>)",
        ),
        (BECOMES.format(""), "it has ended and not gone on"),
        pytest.param(BECOMES.format("1 +"), "SyntaxError: invalid syntax (launcher, line 1)", marks=pytest.mark.slow),
    ],
    ids=["status 0", "status 3", "raises", "hangs", "is emptied meanwhile", "is half-written meanwhile"],
)
def test_a_successor_that_does_not_go_on_gives_way_to_the_program_that_was(
    tmp_path: Path, module: Module, text: str, reason: str
) -> None:
    """All of it is in the one script: the text that the old program was started with is not on the disk any more."""
    script, pid_file = tmp_path / "launcher", tmp_path / "pid"
    script.write_text(LAUNCHER)
    line = command(script, f"--pid-file={pid_file}", "--spare-timeout=0.2")
    with watch.running(line, module(ECHO), tmp_path) as server, connect(address(server)) as held:
        held.sendall(b"1")
        assert held.recv(64) == b"1"
        before = len(descriptors(server))
        with Load(address(server), clients=1, rate=200) as load:
            script.write_text(SERVES_OTHERWISE.format(text))
            done = asked_to_upgrade(server)
            assert done.returncode == 1
            assert f"upgrade refused, the old code keeps serving: {BACK}{reason.format(script=script)}" in done.stderr
            seen = load.connections
            watch.until("the load goes on", lambda: load.connections > seen + 20)
        assert (load.failures, load.refused) == ([], 0)
        held.sendall(b"2")
        assert held.recv(64) == b"2"
        assert (server.status()["pid"], server.status()["generation"]) == (server.pid, 1)
        assert pid_file.read_text() == f"{server.pid}\n"
        assert len(descriptors(server)) == before
        watch.until("who holds a connection, and one who waits", lambda: len(watch.family(server.pid)) == 3)
        script.write_text(LAUNCHER)
        assert upgrade(server)["ok"]


@pytest.mark.slow
def test_the_time_in_which_a_successor_hung_counts_against_no_connection(tmp_path: Path, module: Module) -> None:
    script = tmp_path / "launcher"
    script.write_text("from prefork.system import program\nprogram.SWITCH = 5.0\n" + LAUNCHER)
    with watch.running(command(script, "--timeout=4"), module(ECHO), tmp_path) as server, connect(address(server)) as held:
        script.write_text(SERVES_OTHERWISE.format("time.sleep(600)"))
        assert f"{BACK}it has not gone on in time; it was at {script}:3 (<module>)" in upgrade(server)["reason"]
        held.sendall(b"1")
        assert held.recv(64) == b"1"
        watch.logged(server, "for 4.0 s: it is killed")


def test_a_successor_that_never_comes_back_to_its_interpreter_is_killed(tmp_path: Path, module: Module) -> None:
    """The first alarm waits for the next bytecode, which does not come. Whoever starts the daemon then finds everything free."""
    script, pid_file = tmp_path / "launcher", tmp_path / "pid"
    script.write_text(LAUNCHER)
    line = command(script, f"--pid-file={pid_file}")
    with watch.running(line, module(ECHO), tmp_path) as server:
        family = [child.pid for child in watch.family(server.pid)]
        hangs = "from collections import deque; from itertools import repeat; deque(repeat(0), maxlen=0)"
        script.write_text(SERVES_OTHERWISE.format(f"signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05); {hangs}"))
        os.kill(server.pid, signal.SIGUSR2)
        assert server.process.wait(watch.DEADLINE) == -signal.SIGALRM
        watch.until("all have gone", lambda: all(map(watch.is_gone, family)))
    script.write_text(LAUNCHER)
    with watch.running(line, tmp_path, tmp_path) as server:
        assert says(address(server)) == b"x"


def test_an_interpreter_that_hangs_before_it_does_anything_is_killed(tmp_path: Path, module: Module) -> None:
    script = tmp_path / "launcher"
    script.write_text("from prefork.system import program\nprogram.SWITCH = 0.3\n" + LAUNCHER)
    with watch.running(command(script), module(ECHO), tmp_path, environment={"PYTHONPATH": str(tmp_path)}) as server:
        (tmp_path / "sitecustomize.py").write_text("import os, time\nif 'PREFORK_STATE' in os.environ:\n    time.sleep(600)\n")
        os.kill(server.pid, signal.SIGUSR2)
        assert server.process.wait(watch.DEADLINE) == -signal.SIGALRM


WITH_PLANT = "import plant\n" + LAUNCHER
FAILS = "from prefork import upgrading\ndef fail(self, state):\n    raise ValueError('planted')\nupgrading.Upgrading.adopt = fail\n"


@pytest.mark.parametrize("plant", [FAILS, pytest.param("import sys\nsys.exit(0)\n", marks=pytest.mark.slow)])
def test_two_programs_that_fail_leave_nothing_and_a_status_that_is_restarted(tmp_path: Path, module: Module, plant: str) -> None:
    script, pid_file = tmp_path / "launcher", tmp_path / "pid"
    script.write_text(WITH_PLANT)
    (tmp_path / "plant.py").write_text("")
    with watch.running(command(script, f"--pid-file={pid_file}"), module(ECHO), tmp_path) as server:
        family = [child.pid for child in watch.family(server.pid)]
        late = "import atexit, sys\nif sys.argv[1] == 'check':\n    atexit.register(lambda: open(__file__, 'w').write({!r}))\n"
        (tmp_path / "plant.py").write_text(late.format(plant))
        os.kill(server.pid, signal.SIGUSR2)
        assert server.process.wait(watch.DEADLINE) == 70
        assert "prefork: the upgrade has ended the daemon: " in server.log()
        assert not pid_file.exists()
        assert not os.path.exists(server.control)
        watch.until("all have gone", lambda: all(map(watch.is_gone, family)))


TOLD = """
import json, sys
def loop(sock):
    sock.recv(64)
    main = sys.modules["__main__"]
    sock.sendall(json.dumps([sys.argv, sys.orig_argv, sys.path, main.__file__, main.__name__]).encode())
"""


@pytest.mark.parametrize(
    "way", ["script", "zip", *(pytest.param(way, marks=pytest.mark.slow) for way in ("-m", "-c", "-I", "folder"))]
)
def test_however_it_was_started_it_finds_itself_so_after_each_upgrade(tmp_path: Path, module: Module, way: str) -> None:
    script, archive, place = tmp_path / "bin" / "launcher", tmp_path / "all.pyz", tmp_path / "folder"
    for made in (script, place / "__main__.py"):
        made.parent.mkdir()
        made.write_text(LAUNCHER)
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("__main__.py", LAUNCHER)
    words = {
        "-m": ["-m", "prefork"],
        "-c": ["-c", LAUNCHER + "prefork = 1"],
        "-I": ["-I", str(script)],
        "script": ["bin/launcher"],
        "zip": [str(archive)],
        "folder": ["-X", "utf8", "folder"],
    }[way]
    line = [sys.executable, *words, "serve", "--module=mine:loop", "--workers=1", "--bind=127.0.0.1:0"]
    if way == "-c":
        module("import sys\nsys.modules['__main__'].__file__ = '-c'\n" + TOLD)
    else:
        module(TOLD)
    with watch.running(line, tmp_path, tmp_path) as server:

        def found() -> Any:
            with connect(address(server)) as sock:
                sock.sendall(b"x")
                return json.loads(sock.makefile("rb").read())

        before = found()
        for _ in range(2):
            assert upgrade(server)["ok"]
            after = found()
            if way in ("script", "folder"):  # made absolute, since the first start
                assert after[1][-6:] != before[1][-6:]
                after[1] = before[1]
                after[0][0], after[3] = before[0][0], before[3]
            assert after == before
