"""A daemon on a terminal, and what becomes of it when that is closed: by a real shell, as people start it."""

import os
import pty
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests import watch

HANG_UP = "stopping (SIGHUP: the terminal was closed)"
SHELL = ("bash", "--norc", "--noprofile", "-i")


class Daemon:
    """A daemon that a shell is told to start."""

    def __init__(self, folder: Path) -> None:
        self._log, self._pid_file = folder / "daemon.log", folder / "pid"
        options = {"bind": "127.0.0.1:0", "workers": "1", "control": "off", "log-file": self._log, "pid-file": self._pid_file}
        flags = [f"--{name}={value}" for name, value in options.items()]
        self.command = shlex.join([sys.executable, "-m", "prefork", "serve", "--module=echo:loop", *flags])
        self.pid = 0

    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def says(self, text: str) -> None:
        try:
            watch.until(f"{text!r} in the log", lambda: text in self.log())
        except AssertionError as error:
            raise AssertionError(f"{error}:\n{self.log()}") from None

    def begin(self) -> None:
        self.says(" serving ")
        self.pid = int(self._pid_file.read_text())

    def reloads(self, generation: int = 2) -> None:
        """By somebody who is no shell of its terminal."""
        os.kill(self.pid, signal.SIGHUP)
        self.says(f"generation {generation} serves")

    def has_ended(self) -> None:
        try:
            watch.until("the daemon has ended", lambda: watch.is_gone(self.pid))
        except AssertionError as error:
            raise AssertionError(f"{error}:\n{self.log()}") from None
        assert ": 0 connections accepted, 0 cut" in self.log()


class Terminal:
    """A pseudo-terminal with a program on it, which is its session's leader."""

    def __init__(self, folder: Path, *program: str) -> None:
        self.leader, self._fd = pty.fork()
        if not self.leader:
            os.chdir(folder)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
            os.execvp(program[0], program)

    def type(self, line: str) -> None:
        os.write(self._fd, f"{line}\n".encode())

    def close(self) -> None:
        """As the window is closed, or the line lost. The program ends by it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            watch.until("the leader has ended", lambda: watch.is_gone(self.leader))


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    made = Daemon(tmp_path)
    yield made
    if made.pid and not watch.is_gone(made.pid):
        os.kill(made.pid, signal.SIGTERM)
        made.has_ended()


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*program: str) -> Terminal:
        opened.append(Terminal(tmp_path, *program))
        return opened[-1]

    yield start
    for each in opened:
        with suppress(ProcessLookupError):
            os.kill(each.leader, signal.SIGKILL)
        each.close()
        with suppress(ChildProcessError):
            os.waitpid(each.leader, 0)


Open = Callable[..., Terminal]


@pytest.mark.parametrize("how", ["{}", "{} &", "exec {}"], ids=["foreground", "background", "leader"])
def test_closing_the_terminal_stops_the_daemon(daemon: Daemon, terminal: Open, how: str) -> None:
    shell = terminal(*SHELL)
    shell.type(how.format(daemon.command))
    daemon.begin()
    shell.close()
    daemon.has_ended()
    assert HANG_UP in daemon.log()
    assert "generation 2" not in daemon.log()


def test_a_shell_that_is_killed_takes_its_terminal_and_the_daemon_with_it(daemon: Daemon, terminal: Open) -> None:
    shell = terminal(*SHELL)
    shell.type(daemon.command)
    daemon.begin()
    os.kill(shell.leader, signal.SIGKILL)
    daemon.has_ended()
    assert HANG_UP in daemon.log()


@pytest.mark.parametrize("how", ["nohup {}", "nohup {} &"], ids=["foreground", "background"])
def test_a_hang_up_does_nothing_under_nohup_and_a_signal_reloads(daemon: Daemon, terminal: Open, how: str) -> None:
    shell = terminal(*SHELL)
    shell.type(how.format(daemon.command))
    daemon.begin()
    shell.close()
    daemon.says("the hang-up of the terminal ignored: SIGHUP was ignored at the start (nohup)")
    daemon.reloads()
    assert "generation 3" not in daemon.log()


@pytest.mark.parametrize("how", ["{} & disown", "setsid {}", "setsid {} &"], ids=["disown", "setsid", "setsid-background"])
def test_a_daemon_that_no_hang_up_reaches_goes_on_and_reloads(daemon: Daemon, terminal: Open, how: str) -> None:
    shell = terminal(*SHELL)
    shell.type(how.format(daemon.command))
    daemon.begin()
    shell.close()
    for generation in (2, 3):
        daemon.reloads(generation)
    assert "hang-up" not in daemon.log()


def test_a_signal_that_is_typed_in_the_daemons_own_shell_reloads(daemon: Daemon, terminal: Open) -> None:
    shell = terminal(*SHELL)
    shell.type(f"{daemon.command} &")
    daemon.begin()
    shell.type("kill -HUP %1")
    daemon.says("generation 2 serves")
    shell.type("nohup true; kill -HUP %%")
    daemon.says("generation 3 serves")
    shell.close()
    daemon.has_ended()
    assert HANG_UP in daemon.log()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["{}", "nohup {}"])
def test_a_program_that_was_upgraded_knows_a_hang_up(daemon: Daemon, terminal: Open, how: str) -> None:
    shell = terminal(*SHELL)
    shell.type(how.format(daemon.command))
    daemon.begin()
    os.kill(daemon.pid, signal.SIGUSR2)
    daemon.says("generation 2 serves")
    shell.close()
    if how == "{}":
        daemon.has_ended()
        assert HANG_UP in daemon.log()
    else:
        daemon.says("the hang-up of the terminal ignored")
        daemon.reloads(3)


@contextmanager
def multiplexer(folder: Path, command: str) -> Iterator[Callable[..., None]]:
    """A tmux that runs this command, of a server of its own; a function that asks it for something."""
    watch.needs("tmux")

    def ask(*arguments: str) -> None:
        subprocess.run(
            ["tmux", "-S", str(folder / "tmux"), "-f", os.devnull, *arguments], check=False, capture_output=True, cwd=folder
        )

    ask("new-session", "-d", "-s", "test", command)
    try:
        yield ask
    finally:
        ask("kill-server")


@pytest.mark.parametrize("how", ["{}", "bash --norc -ic {}"], ids=["alone", "in a shell"])
def test_closing_the_window_of_a_multiplexer_stops_the_daemon(daemon: Daemon, tmp_path: Path, how: str) -> None:
    command = daemon.command if how == "{}" else how.format(shlex.quote(f"{daemon.command}; true"))
    with multiplexer(tmp_path, command) as ask:
        daemon.begin()
        ask("detach-client")
        daemon.reloads()
        ask("kill-session", "-t", "test")
        daemon.has_ended()
    assert HANG_UP in daemon.log()
