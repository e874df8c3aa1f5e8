"""Who the daemon's processes are: root is given up for good, and what an ordinary user can do without it works.

The daemon runs from a copy that everybody can read, with the system's interpreter: one in somebody's home is nobody else's.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from prefork.testing import Server, connect
from tests import watch
from tests.public import PYTHON, copy

NOBODY = 65534
AS_NOBODY = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
WHO = """
import ctypes, grp, json, os, resource
def loop(sock):
    line = sock.recv(64).decode()
    told = {}
    for what, attempt in {
        "setuid": lambda: os.setuid(0), "setresuid": lambda: os.setresuid(0, 0, 0), "seteuid": lambda: os.seteuid(0),
        "setgid": lambda: os.setgid(0), "setgroups": lambda: os.setgroups([0]),
        "shadow": lambda: open("/etc/shadow").close(), "kill": lambda: os.kill(os.getppid(), 0) or os.kill(%d, 0),
        "nice": lambda: os.nice(-1) and None,
    }.items():
        try:
            attempt()
        except OSError as error:
            told[what] = type(error).__name__
        else:
            told[what] = "done"
    with open("/proc/self/status") as status:
        lines = [line.partition(":")[::2] for line in status]
    told |= {key: value.strip() for key, value in lines if key.startswith(("Uid", "Gid", "Groups", "NoNewPrivs", "Cap"))}
    mask = os.umask(0)
    os.umask(mask)
    told |= {
        "umask": mask, "folder": os.getcwd(), "nice_value": os.nice(0), "home": os.environ.get("HOME"), "pid": os.getpid(),
        "nofile": resource.getrlimit(resource.RLIMIT_NOFILE), "as": resource.getrlimit(resource.RLIMIT_AS),
        "sudo": os.system("su -c true >/dev/null 2>&1 </dev/null") if line == "su" else None,
    }
    sock.sendall(json.dumps(told).encode())
"""


@pytest.fixture(scope="module")
def public() -> Iterator[Path]:
    """A folder that everybody can read, with prefork and what it needs in it, and ``run``, which belongs to nobody."""
    with copy() as folder:
        (folder / "run").mkdir()
        os.chown(folder / "run", NOBODY, NOBODY)
        (folder / "mine.py").write_text(WHO % 1)
        yield folder


@contextlib.contextmanager
def running(public: Path, *options: str, prefix: tuple[str, ...] = ()) -> Iterator[Server]:
    """A daemon from that folder, with these options."""
    control, log = public / "run" / "control", public / "log"
    command = [
        *prefix,
        PYTHON,
        "-B",
        "-m",
        "prefork",
        "serve",
        "--module=mine:loop",
        f"--control={control}",
        "--workers=2",
        *options,
    ]
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=public, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    server = Server(("127.0.0.1", 0), process.pid, str(control), log, process)
    try:
        watch.until("it serves or has ended", lambda: " serving " in server.log() or process.poll() is not None)
        if process.poll() is None:
            host, _, port = server.status()["listeners"][0]["address"].rpartition(":")
            server = Server((host, int(port)), process.pid, str(control), log, process)
        yield server
    finally:
        server.stop()


def told(server: Server, ask: bytes = b"?") -> dict[str, Any]:
    with connect(server.address) as sock:
        sock.sendall(ask)
        answer = sock.makefile("rb").read()
    assert answer, server.log()
    return dict(json.loads(answer))


def test_handlers_give_up_root_for_good_and_the_master_keeps_it(public: Path) -> None:
    with running(public, "--bind=127.0.0.1:0", "--user=nobody") as server:
        found = told(server, b"su")
        assert found["Uid"].split() == [str(NOBODY)] * 4, "real, effective, saved and file-system user"
        assert found["Gid"].split() == [str(NOBODY)] * 4
        assert set(found["Groups"].split()) == {str(NOBODY)}
        assert found["NoNewPrivs"] == "1"
        assert {found[key] for key in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {"0" * 16}
        attempts = ("setuid", "setresuid", "seteuid", "setgid", "setgroups", "shadow", "kill", "nice")
        assert {key: found[key] for key in attempts} == dict.fromkeys(attempts, "PermissionError")
        assert found["sudo"] != 0, "a set-user-ID program does not help"
        assert found["home"] == "/nonexistent"
        assert psutil.Process(server.pid).uids().effective == 0
        assert psutil.Process(watch.fork_server(server)).uids() == (NOBODY,) * 3
        assert "handlers run as root" not in server.log()
        # What signals and reaps across users: a reload, a killed fork server's orphans, a stop.
        assert server.command("reload")["ok"]
        psutil.Process(watch.fork_server(server)).kill()
        watch.logged(server, "generation 3 serves")
        watch.settled(server, 2)
        assert told(server)["Uid"].split() == [str(NOBODY)] * 4


def test_log_files_are_theirs_to_open_again(public: Path) -> None:
    path, old = public / "access.log", public / "access.log.1"
    with running(public, "--bind=127.0.0.1:0", "--user=nobody", f"--access-log={path}") as server:
        told(server)
        path.rename(old)
        os.kill(server.pid, signal.SIGUSR1)
        watch.logged(server, f"log files opened again: {path}")
        pid = told(server)["pid"]
        watch.until("it is in the new file", lambda: f"[{pid}]: " in path.read_text())
        assert (path.stat().st_uid, path.stat().st_mode & 0o777) == (NOBODY, 0o600)
        assert str(old) not in watch.descriptors(pid).values()
        # A link that the user might have made is not followed by root.
        path.unlink()
        path.symlink_to(old)
        os.kill(server.pid, signal.SIGUSR1)
        watch.logged(server, f"{path} can't be opened again (Too many levels of symbolic links)")
        assert told(server)["Uid"].split() == [str(NOBODY)] * 4
    path.unlink()
    old.unlink()


# What a master needs that keeps the handler out of its reach: it may neither read nor write what is others'.
FOUR = ("setpriv", "--bounding-set=-all,+setuid,+setgid,+kill,+chown", "--inh-caps=-all")


def test_a_master_with_four_capabilities_gives_files_away_and_finds_them_again(public: Path) -> None:
    own = public / "own"
    own.mkdir()
    os.chown(public / "run", 0, 0)  # the control socket is there
    log, path, pid_file = own / "log", own / "clients", own / "pid"
    config = public / "four.toml"
    options = [f"--config={config}", "--user=nobody", f"--access-log={log}", f"--pid-file={pid_file}"]
    for _ in range(2):  # the second time the log file is there
        config.write_text(f'bind = ["127.0.0.1:0", "unix:{path}?mode=0600&user=nobody"]\n')
        with running(public, *options, prefix=FOUR) as server:
            [found] = {line.split()[1] for line in Path(f"/proc/{server.pid}/status").read_text().splitlines() if "CapEff" in line}
            assert int(found, 16) == 1 << 0 | 1 << 5 | 1 << 6 | 1 << 7  # capability(7)
            assert told(server)["Uid"].split() == [str(NOBODY)] * 4
            assert (log.stat().st_uid, path.stat().st_uid, path.stat().st_mode & 0o777) == (NOBODY, NOBODY, 0o600)
            log.rename(own / "log.1")
            os.kill(server.pid, signal.SIGUSR1)
            watch.until("the new one is the handler's", lambda: log.exists() and log.stat().st_uid == NOBODY)
            config.write_text(f'bind = ["127.0.0.1:0", "unix:{path}?mode=0660&user=nobody"]\n')
            assert server.command("reload")["ok"]
            assert (path.stat().st_uid, path.stat().st_mode & 0o777) == (NOBODY, 0o660)
            assert server.command("outcome", upgrade=server.command("upgrade")["upgrade"])["generation"] == 3
            psutil.Process(watch.fork_server(server)).kill()
            watch.until("another one serves", lambda: server.status()["generation"] == 4)
            assert server.command("stop", quick=True)["ok"]
        assert server.process.wait(watch.DEADLINE) == 0
        assert not path.exists()
    os.chown(public / "run", NOBODY, NOBODY)


def test_a_dead_master_takes_processes_of_another_user_with_it(public: Path) -> None:
    with running(public, "--bind=127.0.0.1:0", "--user=nobody") as server:
        pids = [child.pid for child in watch.family(server.pid)]
        server.process.kill()
        server.process.wait()
        watch.until("all have gone", lambda: all(map(watch.is_gone, pids)), 5.0)
        os.unlink(server.control)


def test_a_number_is_a_user_and_a_group_that_is_named_is_the_only_one(public: Path) -> None:
    with running(public, "--bind=127.0.0.1:0", "--user=12345", "--group=daemon") as server:
        found = told(server)
        assert found["Uid"].split() == ["12345"] * 4
        assert (found["Gid"].split(), found["Groups"].split()) == (["1"] * 4, ["1"])


def test_a_low_port_is_bound_by_the_master_and_served_by_nobody(public: Path) -> None:
    port = next(port for port in range(1023, 900, -1) if watch.is_free(port))
    with running(public, f"--bind=127.0.0.1:{port}", "--user=nobody") as server:
        assert server.address == ("127.0.0.1", port)
        assert told(server)["Uid"].split() == [str(NOBODY)] * 4


@pytest.mark.parametrize("given", ["+net_bind_service", "+net_bind_service,+setpcap"])
def test_what_binds_a_low_port_without_root_is_the_masters_alone(public: Path, given: str) -> None:
    first, second = [port for port in range(1023, 900, -1) if watch.is_free(port)][:2]
    prefix = (*AS_NOBODY, f"--inh-caps={given}", f"--ambient-caps={given}")
    conf = public / "prefork.toml"
    conf.write_text(f'bind = ["127.0.0.1:{first}"]\n')
    with running(public, f"--config={conf}", prefix=prefix) as server:
        for _ in range(2):
            found = told(server)
            assert {found[key] for key in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {"0" * 16}
            assert (found["CapBnd"] == "0" * 16) == ("setpcap" in given)
            # The master has kept it.
            conf.write_text(f'bind = ["127.0.0.1:{first}", "127.0.0.1:{second}"]\n')
            assert server.command("reload")["ok"], server.log()
            with connect(("127.0.0.1", second)) as sock:
                sock.sendall(b"?")
                assert sock.recv(64)


def test_root_that_is_not_given_up_is_warned_of(public: Path) -> None:
    with running(public, "--bind=127.0.0.1:0") as server:
        watch.logged(server, "WARNING master")
        assert "handlers run as root: give a user to run them as (--user)" in server.log()


def test_umask_folder_niceness_and_limits_are_those_of_the_configuration(public: Path) -> None:
    options = ("--umask=027", f"--chdir={public}/run", "--nice=3", "--rlimit=nofile=300,as=2G,core=0")
    (public / "run" / "mine.py").write_text(WHO % 1)
    with running(public, "--bind=127.0.0.1:0", "--user=nobody", *options) as server:
        found = told(server)
        assert (found["umask"], found["folder"], found["nice_value"]) == (0o27, f"{public}/run", 3)
        assert (found["nofile"], found["as"]) == ([300, 300], [2 << 30, 2 << 30])
        assert psutil.Process(server.pid).nice() == 0
        scores = [int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for pid in (server.pid, found["pid"])]
        assert scores[1] == scores[0] + 200
    (public / "run" / "mine.py").unlink()


def test_a_worker_is_like_any_process_of_its_user_whatever_the_import_has_made_of_itself(public: Path) -> None:
    # /proc/self/oom_score_adj and environ of a process that can't be dumped are root's.
    not_dumpable = "import ctypes\nctypes.CDLL(None).prctl(4, ctypes.c_ulong(0), 0, 0, 0)\n"
    (public / "run" / "mine.py").write_text(not_dumpable + WHO % 1)
    with running(public, "--bind=127.0.0.1:0", "--user=nobody", f"--chdir={public}/run") as server:
        pid = told(server)["pid"]
        assert os.stat(f"/proc/{pid}/environ").st_uid == NOBODY
    (public / "run" / "mine.py").unlink()


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--user=nosuchuser"], 78, "user 'nosuchuser' does not exist on this machine"),
        (["--group=nosuchgroup"], 78, "group 'nosuchgroup' does not exist on this machine"),
        (["--user=nobody", "--chdir=/root"], 78, "can't enter the working directory /root as user nobody: Permission denied"),
        (["--chdir=/no/such"], 78, "can't enter the working directory /no/such: No such file"),
    ],
)
def test_who_it_can_not_be_is_told_at_the_start(public: Path, options: list[str], status: int, message: str) -> None:
    with running(public, "--bind=127.0.0.1:0", *options) as server:
        assert server.process.wait(watch.DEADLINE) == status
        assert message in server.log()


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--bind=127.0.0.1:0", "--user=daemon"], 77, "user = 'daemon': only root can become somebody else"),
        (["--bind=127.0.0.1:0", "--group=daemon"], 77, "group = 'daemon': only root can become somebody else"),
        (["--bind=127.0.0.1:0", "--nice=-5"], 78, "nice = -5: only root may be less nice"),
        (["--bind=127.0.0.1:0", "--rlimit=nofile=unlimited"], 78, "rlimit nofile: the hard limit is "),
        (["--bind=127.0.0.1:999"], 77, "CAP_NET_BIND_SERVICE"),
        (["--bind=unix:/run/s?user=daemon"], 77, "no permission to create a socket there and give it away"),
        (["--bind=127.0.0.1:0", "--pid-file=/run/x.pid"], 77, "pid_file = '/run/x.pid': no permission to write in /run"),
    ],
)
def test_without_root_what_takes_it_is_refused_with_the_remedy(public: Path, options: list[str], status: int, message: str) -> None:
    with running(public, *options, prefix=AS_NOBODY) as server:
        assert server.process.wait(watch.DEADLINE) == status
        assert message in server.log()


@pytest.fixture(scope="module")
def closed(public: Path) -> Iterator[Path]:
    """A folder that is root's alone, with Python in it, and prefork."""
    home = public / "closed"
    asked = [PYTHON, "-c", "import os, sys; print(os.path.dirname(os.__file__), os.path.realpath(sys.executable))"]
    library, python = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()
    (home / "bin").mkdir(parents=True)
    (home / "lib").mkdir()
    shutil.copy(python, home / "bin" / "python3")
    (home / "lib" / Path(library).name).symlink_to(library)
    (home / "packages").symlink_to(public)
    home.chmod(0o700)
    yield home
    shutil.rmtree(home)


@pytest.mark.parametrize("command", ["serve", "check"])
@pytest.mark.parametrize("what", ["interpreter", "packages"])
def test_a_user_that_can_not_read_python_is_told_at_the_start_and_by_check(
    public: Path, closed: Path, what: str, command: str
) -> None:
    python, environment = (str(closed / "bin" / "python3"), {"PYTHONHOME": str(closed), "PYTHONPATH": str(public)})
    missing = [f"the interpreter {python}", f"the standard library {closed}/lib/"]
    if what == "packages":
        python, environment, missing = PYTHON, {"PYTHONPATH": str(closed / "packages")}, [f"site-packages {closed}/packages"]
    line = [python, "-P", "-B", "-m", "prefork", command, "--module=mine:loop", "--user=nobody", "--bind=127.0.0.1:0"]
    done = subprocess.run(
        [*line, f"--control={public}/run/control"],
        cwd=public,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 78, done.stderr
    assert "user nobody can't read " in done.stderr
    for one in missing:
        assert one in done.stderr
    assert f"have Python where every user can, as in /opt, or let them in (chmod a+rx {closed})" in done.stderr
    assert "internal error" not in done.stderr


@pytest.mark.parametrize(
    ("source", "message"),
    [("import other", "ours:loop: the import raised; "), (None, "no module 'ours' in {folder} or on the Python path; ")],
    ids=["what the handler imports", "the handler"],
)
def test_a_place_of_modules_that_a_user_can_not_read_is_named_when_one_is_missing(
    public: Path, closed: Path, source: str | None, message: str
) -> None:
    (closed / "more").mkdir(exist_ok=True)
    (closed / "more" / "other.py").touch()
    folder = public / "folder"
    folder.mkdir()
    (folder / "ours.py").write_text(source or "")
    folder.chmod(0o755 if source else 0o711)
    environment = os.environ | {"PYTHONPATH": f"{public}:{closed}/more"}
    line = [PYTHON, "-P", "-B", "-m", "prefork", "check", "--module=ours:loop", "--user=nobody"]
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    shutil.rmtree(folder)
    named = str(closed) if source else f"{closed}, {folder}"
    assert f"{message.format(folder=folder)}user 65534 can't read {named}, which the Python path leads to" in done.stderr
    assert done.returncode == 78


BECOMES_ROOT = """
import os
def loop(sock):
    sock.sendall(b"%d" % os.getpid())
    os.execv("./rootly", ["./rootly", "-I", "-c", "import os, time; os.setresuid(0, 0, 0); time.sleep(60)"])
"""


def test_a_worker_that_has_become_root_is_left_behind_by_a_stop_and_named(public: Path) -> None:
    shutil.copy(PYTHON, public / "rootly")
    (public / "rootly").chmod(0o4755)
    if subprocess.run([*AS_NOBODY, public / "rootly", "-c", "import os; os.setuid(0)"], check=False).returncode != 0:
        pytest.skip("set-user-ID programs are nobody but root's here (nosuid)")
    (public / "run" / "mine.py").write_text(BECOMES_ROOT)
    (public / "run" / "rootly").symlink_to(public / "rootly")
    options = ("--bind=127.0.0.1:0", f"--chdir={public}/run", "--graceful-timeout=0.1")
    with running(public, *options, prefix=AS_NOBODY) as server:
        with connect(server.address) as sock:
            pid = int(sock.recv(64))
            watch.until("it is root", lambda: psutil.Process(pid).uids().real == 0)
            assert server.stop() == 0
        assert f"these processes can't be ended by us, and are left behind: {pid}" in server.log()
        assert "internal error" not in server.log()
        os.kill(pid, signal.SIGKILL)
    for name in ("mine.py", "rootly"):
        (public / "run" / name).unlink()


def test_a_port_of_another_users_says_so_to_who_can_not_see_it(public: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with running(public, f"--bind=127.0.0.1:{port}", prefix=AS_NOBODY) as server:
            assert server.process.wait(watch.DEADLINE) == 69
            assert f"127.0.0.1:{port} is in use by another user's process, which root can see" in server.log()


# What is another user's is there, and can't be read.
UNREADABLE = ("unshare", "--mount", "sh", "-c", 'mount -t proc -o hidepid=noaccess proc /proc && exec "$@"', "sh")
HOLDER = """
import socket, sys, time
sock = socket.create_server(("127.0.0.1", 0))
print(sock.getsockname()[1], flush=True)
time.sleep(600)
"""


def test_an_address_in_use_names_a_holder_whose_parent_can_not_be_read(public: Path) -> None:
    with subprocess.Popen([*AS_NOBODY, PYTHON, "-c", HOLDER], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        port = int(holder.stdout.readline())
        with running(public, f"--bind=127.0.0.1:{port}", prefix=(*UNREADABLE, *AS_NOBODY)) as server:
            status = server.process.wait(watch.DEADLINE)
        holder.kill()
    assert status == 69
    assert f"127.0.0.1:{port} is in use by python3 (pid {holder.pid})" in server.log()


def test_a_path_in_use_names_a_holder_that_can_not_be_read(public: Path) -> None:
    path = public / "run" / "socket"
    with socket.socket(socket.AF_UNIX) as ours:
        ours.bind(str(path))
        ours.listen()
        path.chmod(0o666)
        with running(public, f"--bind=unix:{path}", prefix=(*UNREADABLE, *AS_NOBODY)) as server:
            assert server.process.wait(watch.DEADLINE) == 69
            assert f"unix:{path} is in use by process {os.getpid()}\n" in server.log()
    path.unlink()


def test_without_root_everything_else_works(public: Path) -> None:
    options = (
        "--bind=127.0.0.1:0",
        "--user=nobody",
        f"--pid-file={public}/run/pid",
        "--rlimit=nofile=300",
        "--nice=1",
        "--umask=077",
    )
    with running(public, *options, f"--bind=unix:{public}/run/socket?mode=0666", prefix=AS_NOBODY) as server:
        assert told(server)["umask"] == 0o77, server.log()
        assert (public / "run" / "pid").read_text() == f"{server.pid}\n"
        assert server.command("reload")["ok"]
        assert server.command("scale", workers="3")["ok"]
        watch.settled(server, 3)
        assert server.command("stop")["ok"]
        assert server.process.wait(watch.DEADLINE) == 0
        assert "internal error" not in server.log()
    assert list((public / "run").iterdir()) == []


# As an ftpd does for its client.
BECOMES_ANOTHER = """
import os

def loop(sock):
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    while data := sock.recv(64):
        sock.sendall(data)
"""


def test_a_worker_of_root_that_becomes_another_user_is_its_fork_servers_all_the_same(
    prefork_server: Callable[..., Server], module: Callable[[str], Path]
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    server = prefork_server("mine:loop", folder=module(BECOMES_ANOTHER), workers=2, group="daemon")
    with server.connect() as sock:
        sock.sendall(b"a")
        assert sock.recv(64) == b"a"
        os.kill(watch.fork_server(server), signal.SIGKILL)
        watch.logged(server, "generation 2 serves")
        totals = watch.settled(server, 2)["totals"]
        assert (totals["serving"], totals["killed"]) == (1, 0)
        sock.sendall(b"b")
        assert sock.recv(64) == b"b"
    totals = watch.quiet(server)
    assert (totals["accepted"], totals["ok"], totals["killed"]) == (1, 1, 0)
    assert "made no sense" not in server.log()
