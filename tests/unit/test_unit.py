"""`prefork unit` without a systemd: what is filled in, and what a socket unit can't have. `tests/systemd` starts what it prints."""

import configparser
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from prefork import unit
from prefork.cli import main
from prefork.errors import PreforkError
from prefork.unit import FOLDER, STOP_MARGIN, files


def values(text: str, key: str) -> list[str]:
    """All values of a key."""
    return re.findall(rf"^{key}=(.*)$", text, re.MULTILINE)


def printed(*arguments: str) -> tuple[str, str]:
    """The service and the socket (nothing without one)."""
    done = CliRunner().invoke(main, ["unit", *arguments])
    assert done.exit_code == 0, done.output
    first, *more = re.split(rf"^# {FOLDER}/(\S+)\n", done.stdout, flags=re.MULTILINE)
    assert first == ""
    assert more[::2] == [f"prefork@echo.{kind}" for kind in ("service", "socket")[: len(more) // 2]]
    return more[1], more[3] if len(more) > 2 else ""


def refused(*arguments: str) -> str:
    with pytest.raises(PreforkError) as caught:
        CliRunner().invoke(main, ["unit", *arguments], catch_exceptions=False)
    return str(caught.value)


ECHO = "--module=echo:loop"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_each_file_is_one_that_an_ini_reader_reads() -> None:
    for text in [*files().values(), *printed(ECHO)]:
        parser = configparser.ConfigParser(strict=False, interpolation=None)
        parser.read_string(text)
        assert len(parser.sections()) == 3
        assert not [line for line in text.splitlines() if len(line) > 132]


def test_what_was_given_here_is_given_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my conf.toml").write_text("workers = 3\n")
    monkeypatch.setenv("PREFORK_MAX_WORKERS", "99")
    service, _ = printed(ECHO, "--config=my conf.toml", "--timeout=5", "--umask=027")
    [start] = values(service, "ExecStart")
    words = start.partition(" serve ")[2]
    given = "--max-workers=99 --module=echo:loop --timeout=5 --umask=027 --name=echo --bind=systemd:echo"
    assert words == f'"--config={tmp_path}/my conf.toml" {given}'


def test_percent_and_dollar_mean_themselves(tmp_path: Path) -> None:
    service, _ = printed(ECHO, "--log-file=/var/log/100%$x.log")
    assert "--log-file=/var/log/100%%$$x.log" in values(service, "ExecStart")[0]


def test_time_outs_are_the_configurations() -> None:
    service, _ = printed(ECHO, "--graceful-timeout=5m", "--boot-timeout=10", "--canary=30")
    assert values(service, "TimeoutStopSec") == [str(300 + STOP_MARGIN)]
    assert values(service, "TimeoutStartSec") == [str(2 * 10 + 30 + STOP_MARGIN)]


def test_who_runs_it() -> None:
    service, _ = printed(ECHO)
    assert (values(service, "DynamicUser"), values(service, "User")) == (["yes"], [])
    service, _ = printed(ECHO, "--user=root")
    assert (values(service, "DynamicUser"), values(service, "User"), values(service, "CapabilityBoundingSet")) == (
        [],
        ["root"],
        [""],
    )


def test_with_a_user_the_master_is_root_and_can_do_four_things() -> None:
    service, _ = printed(ECHO, "--user=www-data", "--group=adm", "--bind=:443")
    assert [values(service, key) for key in ("DynamicUser", "User", "Group", "StateDirectory")] == [[], [], [], []]
    assert values(service, "CapabilityBoundingSet") == ["CAP_SETUID CAP_SETGID CAP_KILL CAP_CHOWN"]
    assert values(service, "AmbientCapabilities") == [""]
    assert values(service, "SystemCallFilter")[-1] == "@setuid @chown"
    assert " --user=www-data --group=adm " in values(service, "ExecStart")[0]
    alone, _ = printed(ECHO, "--user=www-data", "--bind=:443", "--no-socket")
    assert values(alone, "CapabilityBoundingSet") == ["CAP_SETUID CAP_SETGID CAP_KILL CAP_CHOWN CAP_NET_BIND_SERVICE"]
    assert values(alone, "AmbientCapabilities") == [""]


def test_without_a_control_socket_a_reload_is_a_signal() -> None:
    service, _ = printed(ECHO, "--control=off")
    assert values(service, "ExecReload") == ["kill -HUP $MAINPID"]


@pytest.mark.parametrize(
    ("bind", "lines"),
    [
        (["127.0.0.1:7000"], ["ListenStream=127.0.0.1:7000"]),
        ([":80"], ["ListenStream=[::]:80", "BindIPv6Only=both"]),
        (["[::1]:80"], ["ListenStream=[::1]:80", "BindIPv6Only=ipv6-only"]),
        (["[fe80::1%eth0]:80"], ["ListenStream=[fe80::1]:80%%eth0", "BindIPv6Only=ipv6-only"]),
        (
            ["unix:/run/a%.sock?mode=0660&group=adm", "127.0.0.1:1"],
            ["ListenStream=/run/a%%.sock", "ListenStream=127.0.0.1:1", "SocketMode=0660", "SocketGroup=adm", "RemoveOnStop=yes"],
        ),
    ],
)
def test_addresses_are_the_sockets(bind: list[str], lines: list[str]) -> None:
    service, socket = printed(ECHO, *(f"--bind={address}" for address in bind))
    found = [line for line in socket.splitlines() if line.startswith(("Listen", "Bind", "Socket", "Remove"))]
    assert found == lines
    assert values(socket, "FileDescriptorName") == ["echo"]
    assert "--bind=systemd:echo" in values(service, "ExecStart")[0]
    assert values(service, "Requires") == ["prefork@echo.socket"]
    assert values(service, "AmbientCapabilities") == [""]


@pytest.mark.parametrize(
    ("bind", "reason"),
    [
        (["127.0.0.1:0"], "a socket unit needs a port"),
        (["fd:3"], "who passes that socket knows its address"),
        (["systemd:web"], "who passes that socket knows its address"),
        ([":80", "[::1]:81"], "both IPv6 alone and IPv4 with it"),
        (["unix:/run/a?mode=0660", "unix:/run/b"], "have the same mode, user and group"),
    ],
)
def test_addresses_that_a_socket_unit_can_not_have(bind: list[str], reason: str) -> None:
    flags = [f"--bind={address}" for address in bind]
    told = refused(ECHO, *flags)
    assert reason in told
    assert "--no-socket" in told
    service, socket = printed(ECHO, "--no-socket", *flags)
    assert socket == ""
    assert [word for word in values(service, "ExecStart")[0].split() if word.startswith("--bind")] == flags


@pytest.mark.parametrize(("address", "needed"), [(":443", "CAP_NET_BIND_SERVICE"), (":7000", ""), ("unix:/run/x", ""), (":0", "")])
def test_who_binds_a_low_port_may_and_nobody_else(address: str, needed: str) -> None:
    service, _ = printed(ECHO, "--no-socket", f"--bind={address}")
    assert values(service, "AmbientCapabilities") == values(service, "CapabilityBoundingSet") == [needed]
    assert ("capset" in values(service, "SystemCallFilter")) == bool(needed), "fork servers give it up"
    assert values(service, "Requires") == []


def test_addresses_in_the_environment_are_separated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFORK_BIND", ":7000,unix:/run/x")
    service, _ = printed(ECHO, "--no-socket")
    assert " --bind=:7000 --bind=unix:/run/x " in values(service, "ExecStart")[0]


def test_a_handler_that_is_here_is_found_there(tmp_path: Path) -> None:
    service, _ = printed(ECHO)
    assert values(service, "WorkingDirectory") == []
    (tmp_path / "echo.py").touch()
    done = CliRunner().invoke(main, ["unit", ECHO])
    assert values(done.stdout, "WorkingDirectory") == [str(tmp_path)]
    # It is in /tmp, which the service has for itself.
    assert f"{tmp_path} can't be seen by the service" in done.stderr
    assert "prefork: -m" not in done.stderr, "a word of the command line is no path"
    service, _ = printed(ECHO, "--chdir=/srv")
    assert values(service, "WorkingDirectory") == []


def test_paths_are_given_there_by_the_names_that_they_have_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "releases" / "1").mkdir(parents=True)
    current = tmp_path / "current now"
    current.symlink_to("releases/1")
    (current / "echo.py").touch()
    (current / "prefork.toml").touch()
    monkeypatch.chdir(current)
    monkeypatch.setenv("PWD", str(current))
    monkeypatch.setenv("PREFORK_ACCESS_LOG", "log/access")
    given = ["--config=prefork.toml", "--log-file=/var/log/x", "--pid-file=run/pid", "--bind=unix:s?mode=0660"]
    service, _ = printed(ECHO, *given, "--no-socket")
    start = values(service, "ExecStart")[0]
    for word in ("config=", "access-log=", "pid-file=", "bind=unix:"):
        assert f'"--{word}{current}/' in start
    assert f"{current}/s?mode=0660" in start
    assert "--log-file=/var/log/x" in start
    assert values(service, "WorkingDirectory") == [str(current)]
    assert values(service, "Environment") == [f'"PWD={current}"'], "systemd tells no name"
    monkeypatch.setenv("PWD", str(current.resolve()))
    assert values(printed(ECHO, *given)[0], "Environment") == []


def test_what_a_file_names_relatively_is_there_too(tmp_path: Path) -> None:
    (tmp_path / "prefork.toml").write_text("log_file = './log'\n")
    service, _ = printed(ECHO, "--config=prefork.toml")
    assert values(service, "WorkingDirectory") == [str(tmp_path)]


def test_what_a_link_hides_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit, "HIDDEN", (f"{tmp_path}/home/",))
    (tmp_path / "home" / "app").mkdir(parents=True)
    (tmp_path / "app").symlink_to("home/app")
    done = CliRunner().invoke(main, ["unit", ECHO, f"--chdir={tmp_path}/app"])
    assert done.stderr.startswith(f"prefork: {tmp_path}/app can't be seen by the service")


def test_what_can_not_be_served_is_told_as_serve_would() -> None:
    assert "no handler" in refused()
    assert "wokers" in CliRunner().invoke(main, ["unit", "--wokers=3"]).stderr
