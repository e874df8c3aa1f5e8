"""conf/Containerfile, without an engine: what it says is run as pid 1 of a pid namespace."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from prefork.testing import connect
from tests import public, watch

FILE = Path(__file__).parents[2] / "conf" / "Containerfile"
# Podman's and docker's, in seconds.
ENGINE = 10.0
HANDLER = """
import subprocess
def loop(sock):
    if sock.recv(64) == b"orphan":
        # Its parent ends at once, and so does it, a little later.
        subprocess.run(["sh", "-c", "sleep 0.2 & exec true"])
    sock.sendall(b"hello")
    sock.recv(64)
"""


@dataclass(frozen=True, slots=True)
class Container:
    """``engine`` is the process that has made it, ``pid`` that of its pid 1 outside."""

    engine: "subprocess.Popen[bytes]"
    pid: int
    port: int

    def run(self, *command: str) -> "subprocess.CompletedProcess[str]":
        """Run a command there, as root."""
        line = ["nsenter", "-t", str(self.pid), "-m", "-p", *command]
        return subprocess.run(line, capture_output=True, text=True, check=False)


def said() -> dict[str, str]:
    """The instructions of the file, each the last one of its kind."""
    return dict(re.findall(r"^([A-Z]+) (.*)$", FILE.read_text(), re.MULTILINE))


def who() -> list[str]:
    """A command line's beginning: as the user that the file names."""
    uid, gid = said()["USER"].split(":")
    return ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups"]


@contextmanager
def started(tmp_path: Path) -> Iterator[Container]:
    """What the file starts, as it starts it; only the port, the handler and the way to the interpreter are others."""
    file, port = said(), watch.free_port()
    with public.copy() as folder:
        (folder / "mine.py").write_text(HANDLER)
        (folder / "prefork.toml").write_text('module = "mine:loop"\nworkers = 2\n')
        words: list[str] = json.loads(file["ENTRYPOINT"]) + json.loads(file["CMD"])
        assert words[0] == "prefork"
        line = [public.PYTHON, "-m", *(word.replace("/etc/prefork", "/mnt") for word in words)]
        environment = dict(word.split("=") for word in shlex.split(file["ENV"]))
        environment |= {
            "PREFORK_BIND": environment["PREFORK_BIND"].replace("0.0.0.0:7000", f"127.0.0.1:{port}"),
            "PATH": os.defpath,
        }
        new = ["unshare", "--pid", "--mount", "--fork", "--mount-proc"]
        private = f'mount --bind {folder} /mnt && mount -t tmpfs -o mode=1777 tmpfs /tmp && cd /mnt && exec "$@"'
        with (tmp_path / "log").open("wb") as log:
            command = [*new, "sh", "-c", private, "sh", *who(), *line]
            engine = subprocess.Popen(command, env={**environment, "PYTHONPATH": "/mnt"}, stderr=log)
        try:
            watch.until("it serves", lambda: b" serving " in (tmp_path / "log").read_bytes() or engine.poll() is not None)
            assert engine.poll() is None, (tmp_path / "log").read_text()
            yield Container(engine, psutil.Process(engine.pid).children()[0].pid, port)
        finally:
            # By hand: the kernel forgets --kill-child when credentials change.
            for first in psutil.Process(engine.pid).children() if engine.poll() is None else []:
                first.kill()
            engine.wait()  # which has waited for its child, as whose end the kernel ends everybody there


@pytest.fixture
def container(tmp_path: Path) -> Iterator[Container]:
    with started(tmp_path) as running:
        yield running


def alive(container: Container) -> list[tuple[str, str]]:
    """Its processes: what they are called, and their states."""
    found: list[tuple[str, str]] = []
    for process in watch.family(container.pid):
        with suppress(psutil.NoSuchProcess):
            found.append((process.name(), process.status()))
    return found


def test_the_master_is_pid_1_and_nobody_in_particular(container: Container) -> None:
    told = dict(line.partition(":")[::2] for line in Path(f"/proc/{container.pid}/status").read_text().splitlines())
    assert told["NSpid"].split()[-1] == "1"
    assert told["Uid"].split() == [said()["USER"].partition(":")[0]] * 4
    with connect(("127.0.0.1", container.port)) as sock:
        sock.sendall(b"x")
        assert sock.recv(64) == b"hello"


def test_orphans_are_reaped_whoever_has_left_them(container: Container) -> None:
    with connect(("127.0.0.1", container.port)) as sock:
        sock.sendall(b"orphan")
        assert sock.recv(64) == b"hello"
    # And one that no worker has begun, as a health check's may be.
    assert container.run("sh", "-c", "(sleep 0.2 &) ; true").returncode == 0

    watch.until("they have ended", lambda: "sleep" not in [name for name, _ in alive(container)])
    watch.until("nobody is left to be reaped", lambda: psutil.STATUS_ZOMBIE not in [state for _, state in alive(container)])
    assert container.engine.poll() is None


def test_the_health_check_of_the_file_answers(container: Container) -> None:
    [program, command] = json.loads(said()["HEALTHCHECK"].removeprefix("CMD "))
    line = ["env", "-i", "PYTHONPATH=/mnt", *who(), public.PYTHON, "-P", "-m", program, command]
    done = container.run(*line)
    assert done.returncode == 0, done.stderr
    assert "running" in done.stdout


def test_a_stop_from_outside_waits_for_the_daemon_and_not_for_our_own_pid_1(tmp_path: Path) -> None:
    watch.needs("unshare")
    control, log = tmp_path / "control", tmp_path / "log"
    serves = ["serve", "--module=echo:loop", "--bind=127.0.0.1:0", "--workers=1", f"--control={control}", f"--log-file={log}"]
    line = ["unshare", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc", sys.executable, "-P", "-m", "prefork", *serves]
    with subprocess.Popen(line) as engine:
        try:
            watch.until("it serves", lambda: log.exists() and " serving " in log.read_text())
            stop = [sys.executable, "-P", "-m", "prefork", "stop", "--control", str(control)]
            done = subprocess.run(stop, capture_output=True, text=True, timeout=watch.DEADLINE, check=False)
            assert (done.returncode, done.stdout) == (0, "stopped: 0 connections accepted, 0 cut\n"), done.stderr
            assert engine.wait(watch.DEADLINE) == 0
        finally:
            engine.kill()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes a pid namespace")
def test_memory_and_cpu_are_shown_where_the_pids_are_the_daemons_and_nowhere_else(tmp_path: Path) -> None:
    watch.needs("unshare")
    control, log = tmp_path / "control", tmp_path / "log"
    serves = ["serve", "--module=echo:loop", "--bind=127.0.0.1:0", "--workers=1", f"--control={control}", f"--log-file={log}"]
    # The worker there has our own number: before it come who reads the command line, the log's writer and the fork server.
    begin = f'echo {os.getpid() - 4} > /proc/sys/kernel/ns_last_pid && exec "$@"'
    new = ["unshare", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc", "sh", "-c", begin, "sh"]
    status = [sys.executable, "-P", "-m", "prefork", "status", "--json", "--control", str(control)]
    with subprocess.Popen([*new, sys.executable, "-P", "-m", "prefork", *serves]) as engine:
        try:
            watch.until("it serves", lambda: log.exists() and " serving " in log.read_text())
            [pid] = [child.pid for child in psutil.Process(engine.pid).children()]
            inside = ["nsenter", "-t", str(pid), "--pid", "--mount"]
            its_proc = ["unshare", "--mount", "sh", "-c", f'mount --bind /proc/{pid}/root/proc /proc && exec "$@"', "sh"]
            for where, shown in ((inside, True), ([], False), (its_proc, False)):
                done = subprocess.run([*where, *status], capture_output=True, text=True, check=False)
                assert done.returncode == 0, done.stderr
                [worker] = json.loads(done.stdout)["workers"]
                assert worker["pid"] == os.getpid()
                assert [worker[key] is not None for key in ("rss", "cpu")] == [shown, shown], where
        finally:
            engine.kill()


def test_a_stop_takes_less_than_engines_give_it(container: Container) -> None:
    assert said()["STOPSIGNAL"] == "SIGTERM"
    with watch.soon("a stop"):
        os.kill(container.pid, signal.SIGTERM)
        assert container.engine.wait() == 0


@pytest.mark.slow
def test_also_when_clients_stay(container: Container) -> None:
    with connect(("127.0.0.1", container.port)) as sock:
        sock.sendall(b"x")
        assert sock.recv(64) == b"hello"
        assert float(dict(word.split("=") for word in shlex.split(said()["ENV"]))["PREFORK_GRACEFUL_TIMEOUT"]) <= ENGINE - 2
        with watch.soon("a stop with a client that stays"):
            os.kill(container.pid, signal.SIGTERM)
            assert container.engine.wait() == 0
        assert sock.recv(64) == b""
