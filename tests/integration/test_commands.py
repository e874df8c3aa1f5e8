"""The commands that need no daemon (check, init, completion, man), and what all commands have in common."""

import fcntl
import os
import pty
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import click
import psutil
import pytest

from prefork.cli import OTHER_COMMANDS, main
from prefork.config import OPTIONS, flag, reference
from prefork.testing import Server, StartError, serve
from tests import public, watch
from tests.integration.test_control import run

Start = Callable[..., Server]
CONF = Path(__file__).parents[2] / "conf" / "prefork.toml"
LOOP = "def loop(sock):\n    sock.sendall(b'hello')\n"
BIN = os.path.dirname(sys.executable)


def check(folder: Path, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """`prefork check` in a folder."""
    command = [sys.executable, "-m", "prefork", "check", *arguments]
    settings = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=folder, env=settings)


# -- check


# Text with which user code would set a terminal's title, clear it, and turn text around; and what the commands show of it.
STEERING = "\x1b]0;OWNED\x07 \x1b[2J \x9b1m \u202e ä"
SHOWN = r"\x1b]0;OWNED\x07 \x1b[2J \x9b1m \u202e ä"


def test_check_shows_what_the_import_prints_and_raises_without_its_control_characters(module: Callable[[str], Path]) -> None:
    printed = f"import os\nprint({STEERING!r})\nos.write(2, {('raw ' + STEERING).encode()!r} + b'\\xff\\xc3')\n"
    done = check(module(printed + LOOP), "--module=mine:loop")
    assert (done.returncode, done.stderr) == (0, f"{SHOWN}\nraw {SHOWN}\\xff\\xc3")
    done = check(module(f"{printed}raise ValueError({STEERING!r} + '\\n  indented')\n"), "--module=mine:loop")
    assert done.returncode == 78
    assert done.stderr.startswith(f"{SHOWN}\nraw {SHOWN}\\xff\\xc3prefork: mine:loop: the import raised\nTraceback")
    assert done.stderr.endswith(f"\nValueError: {SHOWN}\n  indented\n")


def test_check_ends_an_import_that_prints_for_ever(module: Callable[[str], Path]) -> None:
    done = check(module("while True:\n    print('x' * 1000)\n"), "--module=mine:loop", "--boot-timeout=0.3")
    assert done.returncode == 78
    assert "the import has not ended after boot_timeout = 0.3 s" in done.stderr[-500:]


def test_check_reads_no_more_of_an_imports_outcome_than_a_traceback_needs(module: Callable[[str], Path]) -> None:
    files = "[int(fd) for fd in os.listdir('/proc/self/fd') if 'outcome' in os.path.realpath(f'/proc/self/fd/{fd}')]"
    done = check(module(f"import os\nfor fd in {files}:\n    os.truncate(fd, 1 << 40)\n" + LOOP), "--module=mine:loop")
    assert done.returncode == 78
    assert done.stderr.startswith("prefork: \\x00\\x00")
    assert len(done.stderr) < 5 << 18


def test_check_prints_a_configuration_that_steers_no_terminal(module: Callable[[str], Path]) -> None:
    folder = module(LOOP)
    (folder / "my.toml").write_text('module = "mine:loop"\nbind = ["unix:/tmp/\\u001b[2J\\u009b\\u202e\\U000E0001ä"]\n')
    done = check(folder, "--config", "my.toml")
    assert "ä" in done.stdout
    assert [line for line in done.stdout.split("\n") if not line.isprintable()] == []
    assert tomllib.loads(done.stdout)["bind"] == ["unix:/tmp/\x1b[2J\x9b\u202e\U000e0001ä"]


def test_a_refused_reload_and_a_start_show_no_control_character_of_the_handlers(
    prefork_server: Start, module: Callable[[str], Path]
) -> None:
    server = prefork_server("mine:loop", folder=module(LOOP), workers=1)
    module(f"raise ValueError({STEERING!r})\n")
    done = run("reload", "--control", server.control)
    assert done.returncode == 1
    assert done.stderr.endswith(f"\nValueError: {SHOWN}\n")
    assert [line for line in done.stderr.split("\n") if not line.isprintable()] == []
    with pytest.raises(StartError) as failure, serve("mine:loop", folder=module(f"raise ValueError({STEERING!r})\n")):
        pass
    assert f"\nValueError: {SHOWN}\n" in str(failure.value)
    assert [line for line in str(failure.value).split("\n") if not line.isprintable()] == []


def test_check_prints_every_option_with_its_value_and_where_it_comes_from(module: Callable[[str], Path]) -> None:
    folder = module(LOOP)
    (folder / "my.toml").write_text('module = "mine:loop"\nbacklog = 5\nworkers = 1\n')
    done = check(folder, "--config", "my.toml", "--workers=3", PREFORK_MAX_LIFETIME="1h")
    assert (done.returncode, done.stderr) == (0, "")
    for lines in (
        '# in my.toml\nmodule = "mine:loop"\n',
        "# in my.toml\nbacklog = 5\n",
        "# on the command line (--workers)\nworkers = 3\n",
        "# in the environment (PREFORK_MAX_LIFETIME)\nmax_lifetime = 3600\n",
        "# default\nmax_workers = 256\n",
        "# not set: The instance's name; the handler's module unless said.\n#name = ",
    ):
        assert lines in done.stdout
    assert all(re.search(rf"^#?{key} = ", done.stdout, re.MULTILINE) for key in OPTIONS)


def test_what_check_prints_can_be_saved_and_read_back(module: Callable[[str], Path]) -> None:
    folder = module(LOOP)
    awkward = 'in "my"\nown\x7f.toml'  # a file's name must not end the comment that it stands in
    (folder / awkward).write_text(f'module = "mine:loop"\nbind = ["unix:{folder}/a\\"b\\u007f?mode=0660", ":80"]\numask = "027"\n')
    first = check(folder, "--config", awkward, "--rlimit=nofile=64,cpu=60", "--keepalive=on")
    assert first.returncode == 0, first.stderr
    (folder / "saved.toml").write_text(first.stdout)
    second = check(folder, "--config", "saved.toml")
    assert second.returncode == 0, second.stderr
    assert tomllib.loads(first.stdout) == tomllib.loads(second.stdout)


def test_check_binds_and_makes_nothing(module: Callable[[str], Path], tmp_path: Path) -> None:
    folder = module(LOOP)
    with socket.create_server(("127.0.0.1", 0)) as holder:
        address = f"--bind=127.0.0.1:{holder.getsockname()[1]}"
        done = check(
            folder,
            *("--module=mine:loop", address, f"--bind=unix:{tmp_path}/s", f"--control={tmp_path}/c", f"--pid-file={tmp_path}/p"),
            *(f"--log-file={tmp_path}/l", f"--access-log={tmp_path}/a"),
            XDG_RUNTIME_DIR=str(tmp_path),
        )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


PREFORK = [sys.executable, "-P", "-m", "prefork"]


def test_the_import_finds_what_it_finds_in_a_fork_server(module: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    folder = module("")
    (tmp_path / "elsewhere" / "there.py").write_text(
        "import os, sys, signal\n"
        "print('umask', oct(os.umask(0)), 'in', os.getcwd(), 'first', sys.path[0], 'input', os.readlink('/proc/self/fd/0'))\n"
        "print('session', os.getsid(0) == os.getpid(), 'stray', os.path.exists('/proc/self/fd/77'))\n"
        "print('blocked', signal.pthread_sigmask(signal.SIG_BLOCK, ()), 'term', signal.getsignal(signal.SIGTERM))\n" + LOOP
    )
    elsewhere = f"{tmp_path}/elsewhere"
    command = [sys.executable, "-m", "prefork", "check", "--module=there:loop", f"--chdir={elsewhere}", "--umask=027"]
    stray = os.dup2(0, 77)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=folder, pass_fds=[stray])
    finally:
        os.close(stray)
    assert done.returncode == 0, done.stderr
    assert f"umask 0o27 in {elsewhere} first {elsewhere} input /dev/null" in done.stderr
    assert "session True stray False" in done.stderr
    assert "blocked set() term 0" in done.stderr
    assert not (tmp_path / "elsewhere" / "__pycache__").exists()


def test_signal_handlers_that_can_not_stay_are_told(module: Callable[[str], Path]) -> None:
    installs = "import signal\nfor signo in (10, 13, 15):\n    signal.signal(signo, print)\n"
    done = check(module(installs + LOOP), "--module=mine:loop")
    assert done.returncode == 0
    told = (
        "prefork: mine:loop: handlers that the import has installed for SIGPIPE, SIGTERM are undone, workers need these signals\n"
    )
    assert told in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give itself up")
def test_the_import_is_not_roots_when_the_handler_would_not_be(tmp_path: Path) -> None:
    with public.interpreter() as (folder, environment):
        (folder / "mine.py").write_text("import os\nprint('ids', *os.getresuid(), os.getgroups())\nos.kill(os.getppid(), 0)\n")
        done = check(folder, "--module=mine:loop", "--user=65534", "--group=65533", **environment)
    assert done.returncode == 78
    assert "ids 65534 65534 65534 [65533]\n" in done.stderr
    assert "PermissionError: [Errno 1] Operation not permitted\n" in done.stderr
    assert check(tmp_path, "--module=echo:loop", "--user=nosuchuser").returncode == 78


def test_what_the_import_prints_does_not_mix_with_what_check_prints(module: Callable[[str], Path]) -> None:
    folder = module("import os\nprint('x' * 1_000_000)\nos.system('echo from a child')\n" + LOOP)
    done = check(folder, "--module=mine:loop")
    assert done.returncode == 0
    assert tomllib.loads(done.stdout)["module"] == "mine:loop"
    assert "x" * 1_000_000 in done.stderr
    assert "from a child\n" in done.stderr


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("1 / 0\n", "mine:loop: the import raised\nTraceback (most recent call last):\n"),
        ("import nosuch\n", "ModuleNotFoundError: No module named 'nosuch'"),
        ("import sys\nsys.exit(0)\n", "SystemExit: 0"),
        ("import os\nos._exit(3)\n", "mine:loop: the import ended its process: exit status 3"),
        ("import os\nos._exit(0)\n", "mine:loop: the import ended its process: exit status 0"),
        ("import os\nos.kill(os.getpid(), 9)\n", "mine:loop: the import ended its process: signal 9 (SIGKILL)"),
        ("import threading, time\nthreading.Thread(target=time.sleep, args=(99,), daemon=True).start()\n", "started threads"),
        ("import os\nos.closerange(3, 300)\n", "mine:loop: the import closed descriptors that were not its own"),
        ("import os\nif os.fork():\n    os.wait()\nelse:\n    1 / 0\n1 / 0\n", "the import forks"),
        ("del loop\n", "mine.py has no 'loop'"),
        ("raise Exception('\\udc80')\n", "Exception: \\udc80"),
    ],
)
def test_an_import_that_fails_is_told_and_ends_with_78(module: Callable[[str], Path], source: str, says: str) -> None:
    done = check(module(LOOP + source), "--module=mine:loop")
    assert (done.returncode, done.stdout) == (78, "")
    assert says in done.stderr
    assert done.stderr.count("prefork: mine:loop: the import raised") <= 1, "a child that has come back says nothing"


@pytest.mark.parametrize("how", ["time.sleep(99)", "while True: pass", "os.kill(os.getpid(), signal.SIGSTOP)", "deaf()"])
def test_an_import_that_never_returns_is_ended_at_boot_timeout(module: Callable[[str], Path], how: str) -> None:
    source = f"import os, signal, time\ndef deaf():\n    signal.pthread_sigmask(0, range(1, 65))\n    time.sleep(99)\n{how}\n"
    done = check(module(source + LOOP), "--module=mine:loop", "--boot-timeout=0.2")
    assert (done.returncode, done.stdout) == (78, "")
    assert "mine:loop: the import has not ended after boot_timeout = 0.2 s" in done.stderr
    if how not in ("deaf()", "os.kill(os.getpid(), signal.SIGSTOP)"):
        assert 'it was here (most recent call first)\n  File "' in done.stderr
        assert 'mine.py", line 5 in <module>\n' in done.stderr
        assert "prefork/handler.py" not in done.stderr


CHILDREN = """
import os, time
for number in range(3):
    if os.fork() == 0:
        if number == 0:
            break  # comes back as if it were the import
        os.setsid()
        os.fork()
        with open(f"pid.{os.getpid()}", "w"):
            time.sleep(99)
while len([name for name in os.listdir() if name.startswith("pid.")]) < 4:
    time.sleep(0.01)
"""


def test_processes_that_the_import_started_are_ended_with_it(module: Callable[[str], Path]) -> None:
    folder = module(CHILDREN + LOOP)
    done = check(folder, "--module=mine:loop")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the import forks: a child that returns from it is ended") == 1
    pids = [int(path.suffix[1:]) for path in folder.glob("pid.*")]
    assert len(pids) == 4
    assert not any(map(psutil.pid_exists, pids))


@pytest.mark.parametrize("signo", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_check_that_is_interrupted_leaves_nobody(module: Callable[[str], Path], signo: int) -> None:
    folder = module(CHILDREN + "time.sleep(99)\n")
    # A shell that runs tests in the background has them ignore SIGINT.
    command = ["env", "--default-signal", sys.executable, "-m", "prefork", "check", "--module=mine:loop"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        watch.until("the import has forked", lambda: len(list(folder.glob("pid.*"))) == 4)
        process.send_signal(signo)
        assert process.wait(watch.DEADLINE) == 1
    assert not any(psutil.pid_exists(int(path.suffix[1:])) for path in folder.glob("pid.*"))


def test_children_that_check_has_inherited_are_not_its_own(module: Callable[[str], Path]) -> None:
    folder = module(LOOP)
    script = f'sleep 99 >&2 & echo $! >&2; exec "{sys.executable}" -m prefork check --module=mine:loop'
    done = subprocess.Popen(["sh", "-c", script], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert done.stderr is not None
    with done.stderr as output:
        sleeper = int(output.readline())
        assert done.wait(watch.DEADLINE) == 0
        assert psutil.Process(sleeper).name() == "sleep"
        os.kill(sleeper, signal.SIGTERM)


@pytest.mark.parametrize("option", ["on_boot", "on_worker_start", "on_worker_exit"])
def test_hooks_are_imported_and_not_called(module: Callable[[str], Path], option: str) -> None:
    folder = module(LOOP)
    (folder / "hooks.py").write_text("print('imported')\ndef hook():\n    print('called')\nnumber = 3\n")
    done = check(folder, "--module=mine:loop", f"{flag(option)}=hooks:hook")
    assert (done.returncode, done.stderr) == (0, "imported\n")
    for target in ("nosuch:hook", "hooks:nosuch", "hooks:number"):
        bad = check(folder, "--module=mine:loop", f"{flag(option)}={target}")
        assert (bad.returncode, bad.stdout) == (78, "")
        assert f"{option} = {target}" in bad.stderr


HOOKS = """
import os, sys, time
def tell(what):
    print(what, os.getpid(), flush=True)
    if what == os.environ.get("HANGS"):
        time.sleep(60)
    if what == os.environ.get("RAISES"):
        raise KeyError(what)
    if what == os.environ.get("EXITS"):
        os._exit(3)
    if what == os.environ.get("FORKS") and os.fork() == 0:
        return
def boot(): tell("boot")
def start(): tell("start")
def leave(): tell("leave")
"""
CALLED = ("--hooks", "mine:loop", "--on-boot=mine:boot", "--on-worker-start=mine:start", "--on-worker-exit=mine:leave")
LABELS = {"boot": "on_boot = mine:boot", "start": "on_worker_start = mine:start", "leave": "on_worker_exit = mine:leave"}


def test_check_calls_each_hook_once_when_it_is_asked_to(module: Callable[[str], Path]) -> None:
    done = check(module(HOOKS + LOOP), *CALLED)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stderr.splitlines()] == ["boot", "start", "leave"]
    assert f"mine:loop can be imported. Called were {', '.join(LABELS.values())}.\n" in done.stdout
    tomllib.loads(done.stdout)


@pytest.mark.parametrize("hook", LABELS)
def test_check_tells_where_a_hook_hangs(module: Callable[[str], Path], hook: str) -> None:
    done = check(module(HOOKS + LOOP), *CALLED, "--boot-timeout=0.5", HANGS=hook)
    assert (done.returncode, done.stdout) == (78, "")
    told = f"prefork: mine:loop: {LABELS[hook]} has not ended after boot_timeout = 0.5 s; it was here (most recent call first)\n"
    assert told in done.stderr
    assert 'mine.py", line 6 in tell\n' in done.stderr
    assert f" in {hook}\n" in done.stderr
    assert "prefork/handler.py" not in done.stderr


@pytest.mark.parametrize("hook", LABELS)
def test_check_tells_of_a_hook_that_raises_or_ends_its_process(module: Callable[[str], Path], hook: str) -> None:
    folder = module(HOOKS + LOOP)
    raised = check(folder, *CALLED, RAISES=hook)
    assert (raised.returncode, raised.stdout) == (78, "")
    assert f"prefork: {LABELS[hook]} raised\nTraceback" in raised.stderr
    ended = check(folder, *CALLED, EXITS=hook)
    assert (ended.returncode, ended.stdout) == (78, "")
    assert f"prefork: mine:loop: {LABELS[hook]} ended its process: exit status 3\n" in ended.stderr
    assert check(folder, *CALLED, FORKS=hook).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["mine:loop"], 0, ""),
        (["mine:loop", "--module=echo:loop"], 2, "two handlers are given, mine:loop and --module echo:loop: leave out one"),
        (["mine"], 78, "module = 'mine' on the command line: must be MODULE:ATTR, like echo:loop"),
        (["mine.py"], 2, "mine.py is a file, and a handler is MODULE:ATTR, like echo:loop: mine:ATTR"),
        (["my.toml"], 2, "a configuration is given by --config my.toml"),
        ([], 78, "no handler: give MODULE:ATTR, like echo:loop, or module in the configuration file"),
    ],
)
@pytest.mark.parametrize("command", ["check", "unit", "serve"])
def test_the_handler_may_stand_by_itself(
    module: Callable[[str], Path], command: str, arguments: list[str], status: int, says: str
) -> None:
    folder = module(LOOP)
    (folder / "my.toml").write_text("")
    if command == "serve" and status == 0:
        with serve("", folder=folder, arguments=tuple(arguments), workers=1) as server, server.connect() as sock:
            assert sock.recv(64) == b"hello"
            assert server.status()["module"] == "mine:loop"
        return
    done = subprocess.run([*PREFORK, command, *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == status, done.stderr
    assert says in done.stderr
    assert status or {"check": 'module = "mine:loop"\n', "unit": " --module=mine:loop "}[command] in done.stdout


def test_serve_without_a_handler_names_the_configuration_that_is_there(tmp_path: Path) -> None:
    assert run("init", str(tmp_path)).returncode == 0
    done = subprocess.run([*PREFORK, "serve"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 78
    assert done.stderr.endswith("no handler: give --config prefork.toml, which is here, or MODULE:ATTR, like echo:loop\n")


def test_check_tells_all_mistakes_of_a_file_at_once(module: Callable[[str], Path]) -> None:
    folder = module("print('imported')\n" + LOOP)
    (folder / "file").write_text("")
    right = (
        f"module = 'mine:lop'\nlog_file = '{folder}/logs/log'\naccess_log = '{folder}/file/access'\npid_file = '/run/no/such/pid'\n"
        f"bind = ['unix:{folder}/sockets/s?user=nosuchuser']\n"
    )
    (folder / "my.toml").write_text(right + "workers = 0\nmax_worker = 3\n")
    done = check(folder, "--config=my.toml")
    missing = [
        f"bind = '{folder}/sockets/s' in my.toml: {folder}/sockets is no directory: make it, or give another path",
        f"log_file = '{folder}/logs/log' in my.toml: {folder}/logs is no directory: make it, or give another path",
        f"access_log = '{folder}/file/access' in my.toml: {folder}/file is no directory: make it, or give another path",
    ]
    first, second, user, *rest = done.stderr.splitlines()
    assert (done.returncode, done.stdout, rest) == (78, "", missing)
    assert first == "prefork: workers = 0 in my.toml: must be a whole number from 1 to 1048576"
    assert second == "unknown option 'max_worker' in my.toml: did you mean 'max_workers'?"
    assert "user 'nosuchuser' does not exist" in user
    (folder / "my.toml").write_text(right)
    with_the_handlers = check(folder, "--config=my.toml")
    printed, user, *rest, handler = with_the_handlers.stderr.splitlines()
    assert (with_the_handlers.returncode, printed, rest) == (78, "imported", missing)
    assert handler == f"mine:lop: {folder}/mine.py has no 'lop'; did you mean 'loop'?"


def test_a_bad_configuration_ends_with_78_before_anything_is_imported(module: Callable[[str], Path]) -> None:
    folder = module("print('imported')\n" + LOOP)
    done = check(folder, "--module=mine:loop", "--workers=0")
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr == "prefork: workers = '0' on the command line (--workers): must be a whole number from 1 to 1048576\n"
    assert check(folder, "--module=mine:loop", f"--chdir={folder}/nosuch").returncode == 78
    star = check(folder, "--module=mine:loop", "--bind=*:7000")
    assert "every address of this machine is written :7000" in star.stderr


@pytest.mark.skipif(shutil.which("setpriv") is None or os.geteuid() != 0, reason="needs setpriv(1) and root")
def test_a_file_that_can_not_be_read_is_a_bad_configuration_and_no_bad_usage() -> None:
    with tempfile.NamedTemporaryFile(dir="/tmp", suffix=".toml") as file:
        os.chmod(file.name, 0o600)
        # Root without its capabilities is held to the owner's bits: the interpreter stays readable, another user's file is not.
        os.chown(file.name, 65534, 65534)
        done = subprocess.run(
            ["setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable, "-m", "prefork", "check", "--config", file.name],
            capture_output=True,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (78, f"prefork: {file.name}: can't read the configuration: Permission denied\n")


def test_a_mistyped_variable_is_told_beside_the_configuration(module: Callable[[str], Path]) -> None:
    done = check(module(LOOP), "--module=mine:loop", PREFORK_WOKERS="3")
    assert done.returncode == 0
    assert done.stderr == "prefork: the environment variable PREFORK_WOKERS is no option: did you mean PREFORK_WORKERS?\n"


# -- conf/prefork.toml


def test_the_reference_configuration_is_that_of_the_definition() -> None:
    assert CONF.read_text() == reference(), "regenerate it: python -m prefork.config > conf/prefork.toml"
    assert set(re.findall(r"^#?(\w+) = ", CONF.read_text(), re.MULTILINE)) == set(OPTIONS)


def test_a_daemon_runs_with_the_reference_configuration() -> None:
    with serve("", arguments=("--config", str(CONF))) as server:
        assert server.status()["listeners"][0]["workers"]["target"] == 8


# -- init


def test_what_init_prints_is_a_working_beginning(tmp_path: Path) -> None:
    watch.needs("nc")
    port = str(watch.free_port())
    settings = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "RUNTIME_DIRECTORY": str(tmp_path)}

    def shell(line: str, folder: Path) -> str:
        done = subprocess.run(line, shell=True, cwd=folder, env=settings, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, (line, done.stderr)
        return done.stdout

    printed = shell("prefork init 'my first'", tmp_path)
    enter, start, talk, reload, status, stop = [
        re.split(r"\s{3,}", line.strip())[0].replace("7000", port) for line in printed.splitlines() if line.startswith("  ")
    ]
    folder = Path(shell(f"{enter} && pwd", tmp_path).strip())
    assert (folder / "prefork.toml").read_text().count("127.0.0.1:7000") == 1
    (folder / "prefork.toml").write_text((folder / "prefork.toml").read_text().replace("7000", port))
    with subprocess.Popen(shlex.split(start), cwd=folder, env=settings, stderr=subprocess.DEVNULL) as daemon:
        try:
            watch.until("it runs", lambda: run("status", "mine", RUNTIME_DIRECTORY=str(tmp_path)).stdout.count("  running  "))
            assert shell(talk, folder) == "hello\n"
            (folder / "mine.py").write_text((folder / "mine.py").read_text().replace("sendall(data)", "sendall(data.upper())"))
            assert shell(reload, folder) == "reloaded: generation 2 serves\n"
            assert shell(talk, folder) == "HELLO\n"
            assert "2 accepted = 2 ok" in shell(status, folder)
            assert "2 connections accepted" in shell(stop, folder)
            assert daemon.wait(watch.DEADLINE) == 0
        finally:
            daemon.kill()  # in case that it was not stopped


def test_what_init_writes_passes_check_as_it_stands(tmp_path: Path) -> None:
    assert run("init", str(tmp_path / "a" / "b")).returncode == 0
    done = check(tmp_path / "a" / "b", "--config=prefork.toml")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["mine.py", "prefork.toml"])
def test_init_overwrites_nothing_and_then_writes_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("nowhere")
    done = run("init", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == f"prefork: nothing written: {tmp_path / name} in the way; name another directory: prefork init DIR\n"
    assert [path.name for path in tmp_path.iterdir()] == [name]


# -- man


def test_the_manual_page_is_whole_and_without_warnings(tmp_path: Path) -> None:
    watch.needs("man")
    watch.needs("groff")
    page = tmp_path / "prefork.1"
    page.write_text(run("man").stdout)
    assert not re.search(r"(?<!\\)-", page.read_text()), "a bare - is a hyphen, which nobody can copy from the page"
    settings = {**os.environ, "LC_ALL": "C.UTF-8", "MANWIDTH": "200"}
    warned = subprocess.run(["groff", "-man", "-ww", "-z", str(page)], capture_output=True, text=True, check=True)
    assert warned.stderr == ""
    shown = subprocess.run(["man", "--warnings=w", "-l", str(page)], capture_output=True, text=True, check=True, env=settings)
    assert shown.stderr == ""
    text = shown.stdout
    for name, command in main.commands.items():
        assert f"   prefork {name}\n" in text
        assert all(
            option in text
            for param in command.params
            for option in param.opts
            if isinstance(param, click.Option) and not param.hidden
        )
    sections = re.findall(r"^[A-Z ]+$", text, re.MULTILINE)
    assert sections == [
        *("NAME", "SYNOPSIS", "DESCRIPTION", "COMMANDS", "OPTIONS OF SERVE AND CHECK", "OTHER OPTIONS", "SIGNALS", "EXIT STATUS"),
        *("ENVIRONMENT", "FILES", "EXAMPLES", "LOG EVENTS", "SEE ALSO"),
    ]
    assert "[default: 127.0.0.1:7000]" in " ".join(text.split()), "wherever the line ends"
    for line in (
        "TTIN, TTOU\n",
        "       78     the configuration",
        "~/.bashrc",
        "prefork scale echo +4",
    ):
        assert line in text
    assert "\\" not in text


# -- completion


@pytest.fixture
def completing(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a shell that knows prefork, with an instance running and a file to complete."""
    (tmp_path / "prefork-own.toml").write_text("")
    (tmp_path / "prefork-other").mkdir()
    with serve("echo:loop", name="completed", control=str(tmp_path / "completed.sock")):
        yield {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "HOME": str(tmp_path),
            "TERM": "xterm",
            "LC_ALL": "C.UTF-8",
            "RUNTIME_DIRECTORY": str(tmp_path),
        }


TYPED = {
    "prefork stat": "prefork status",
    "prefork serve --max-w": "prefork serve --max-workers",
    "prefork reload comp": "prefork reload completed",
    "prefork check --config prefork-ow": "prefork check --config prefork-own.toml",
    "prefork serve --log-file prefork-ow": "prefork serve --log-file prefork-own.toml",
    "prefork stop --control compl": "prefork stop --control completed.sock",
    "prefork serve --drain e": "prefork serve --drain eof",
    "prefork serve --log-level w": "prefork serve --log-level warning",
    "prefork check --log-format j": "prefork check --log-format json",
    "prefork unit --scheduling i": "prefork unit --scheduling inherit",
    "prefork serve --nodelay of": "prefork serve --nodelay off",
    "prefork serve --log-file std": "prefork serve --log-file stderr",
    "prefork serve --control of": "prefork serve --control off",
    "prefork serve --chdir prefork-o": "prefork serve --chdir prefork-other",
}


def terminal(command: list[str], keys: bytes, until: str, environment: Mapping[str, str], folder: Path) -> str:
    """Type at a program that has a terminal of its own; what it shows until it shows that."""
    pid, fd = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.execvpe(command[0], command, dict(environment))
    shown = b""
    try:
        # Wide, so that no line is broken.
        fcntl.ioctl(fd, termios.TIOCSWINSZ, b"\x32\x00\xff\x00\x00\x00\x00\x00")
        os.write(fd, keys)
        with suppress(OSError):  # the other end is closed: it has ended
            while until.encode() not in shown:
                shown += os.read(fd, 4096)
    finally:
        os.close(fd)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return shown.decode(errors="replace")


@pytest.mark.parametrize("typed", TYPED)
@pytest.mark.parametrize(
    ("shell", "prepare"),
    [
        (["bash", "--norc", "--noprofile", "-i"], 'eval "$(prefork completion bash)"'),
        (["zsh", "-f", "-i"], 'autoload -U compinit; compinit -u -D; eval "$(prefork completion zsh)"; bindkey -e'),
    ],
    ids=["bash", "zsh"],
)
def test_a_shell_completes(shell: list[str], prepare: str, typed: str, completing: dict[str, str], tmp_path: Path) -> None:
    watch.needs(shell[0])
    # Tab; then to the line's begin and end (C-a, C-e), to have the line echoed instead of run.
    keys = f"{prepare}\n{typed}\t\x01echo '<\x05>' en''d\n".encode()
    shown = terminal(shell, keys, "> end", completing, tmp_path)
    assert f"\n<{TYPED[typed]}" in shown.replace("\r", "").replace("\x1b[?2004l", ""), shown


@pytest.mark.parametrize("typed", TYPED)
def test_fish_completes(typed: str, completing: dict[str, str], tmp_path: Path) -> None:
    watch.needs("fish")
    command = ["fish", "--no-config", "-c", f"prefork completion fish | source; complete -C {shlex.quote(typed)}"]
    done = subprocess.run(command, env=completing, capture_output=True, text=True, check=True, cwd=tmp_path, timeout=60)
    assert TYPED[typed].split()[-1] in [line.split("\t")[0].rstrip("/") for line in done.stdout.splitlines()]


def test_the_shell_is_that_of_the_environment_unless_it_is_named() -> None:
    assert run("completion", SHELL="/usr/bin/fish").stdout == run("completion", "fish", SHELL="/bin/bash").stdout != ""
    unknown = run("completion", SHELL="/bin/tcsh")
    assert unknown.returncode == 2
    assert "there are bash, zsh and fish, and SHELL is '/bin/tcsh'" in unknown.stderr


# -- what all commands have in common


def test_every_command_has_an_example_in_its_help() -> None:
    for name in main.commands:
        done = run(name, "--help")
        assert done.returncode == 0
        assert f"Examples:\n    prefork {name}" in done.stdout


def test_a_mistyped_command_is_told_with_the_nearest() -> None:
    done = run("relod")
    assert done.returncode == 2
    assert done.stderr.endswith("Error: No such command 'relod'. Did you mean 'reload'?\n")
    assert run("xyz").stderr.endswith(f"Error: No such command 'xyz'. There are {', '.join(main.commands)}.\n")


def test_a_command_of_another_program_is_told_with_what_does_the_same() -> None:
    done = run("top")
    assert done.returncode == 2
    assert done.stderr.endswith("Error: No such command 'top'. There is: prefork status\n")
    for word, command in OTHER_COMMANDS.items():
        assert word not in main.commands
        name, *arguments = command.split()
        assert name in main.commands or name in ("--help", "--version")
        assert not arguments or arguments[0] in [option for param in main.commands[name].params for option in param.opts]


def test_a_mistyped_option_is_told_with_the_nearest() -> None:
    done = run("serve", "--max-worker", "3")
    assert done.returncode == 2
    assert done.stderr.endswith("Error: No such option '--max-worker'. Did you mean '--max-workers'?\n"), done.stderr
    assert run("serve", "--port", "3").stderr.endswith("Error: No such option '--port'. Did you mean '--bind'?\n")
    assert run("serve", "--zzz", "3").stderr.endswith("Error: No such option '--zzz'.\n"), "all have their dashes in common"


def test_a_mistyped_instance_is_told_with_the_nearest(prefork_server: Start, tmp_path: Path) -> None:
    for name in ("echo-1", "smtp-1"):
        prefork_server("echo:loop", name=name, control=str(tmp_path / f"{name}.sock"))
    done = run("status", "ecoh-1", RUNTIME_DIRECTORY=str(tmp_path))
    assert done.returncode == 1
    assert "no instance 'ecoh-1' is running; did you mean 'echo-1'? running: " in done.stderr
    assert {"echo-1", "smtp-1"} <= set(re.findall(r"[\w-]+", done.stderr))


def test_the_version_is_told() -> None:
    assert re.fullmatch(r"prefork \d+\.\d+\.\d+\n", run("--version").stdout)


def coloured(command: list[str], **environment: str) -> bool:
    settings = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | {"TERM": "xterm"} | environment
    return "\x1b[" in terminal([sys.executable, "-m", "prefork", *command], b"", "\0", settings, Path.cwd())


@pytest.mark.parametrize(
    "command", [["status", "--control", "PATH"], ["status", "--control", "/nosuch"], ["serve", "-b", "1.2.3.4:1"]]
)
def test_colours_are_for_terminals_that_want_them(prefork_server: Start, command: list[str]) -> None:
    server = prefork_server("echo:loop", workers=1)
    command = [server.control if word == "PATH" else word for word in command]
    assert coloured(command)
    assert coloured(command, NO_COLOR="")
    assert not coloured(command, NO_COLOR="1")
    assert not coloured(command, TERM="dumb")
    done = run(*command)
    assert "\x1b" not in done.stdout + done.stderr


def test_the_table_tells_of_refused_reloads_and_deaths(prefork_server: Start, module: Callable[[str], Path]) -> None:
    server = prefork_server("mine:loop", folder=module("import os\ndef loop(sock):\n    os._exit(3)\n"), workers=1)
    with server.connect() as sock:
        assert sock.recv(1) == b""
    watch.until("it is counted", lambda: server.status()["deaths"])
    module("1 / 0\n")
    assert run("reload", "--control", server.control).returncode == 1
    shown = run("status", "--control", server.control).stdout
    assert re.search(r"^last reload refused \d.* ago: mine:loop: the import raised$", shown, re.MULTILINE)
    assert re.search(r"^DIED +PID +GEN +SLOT +CAUSE +PEER$", shown, re.MULTILINE)
    assert re.search(r" ago +\d+ +1 +\d+ +exit status 3 +127\.0\.0\.1:\d+$", shown, re.MULTILINE)


@pytest.mark.parametrize(("timeout", "status", "says"), [("100ms", 2, "'100ms' must be a duration"), ("0.2s", 0, "1 cut")])
def test_stop_takes_a_duration(prefork_server: Start, timeout: str, status: int, says: str) -> None:
    server = prefork_server("echo:loop", workers=1)
    with server.connect() as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        done = run("stop", "--timeout", timeout, "--control", server.control)
        assert done.returncode == status
        assert says in done.stdout + done.stderr
