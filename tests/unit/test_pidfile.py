"""The pid file: whole, ours, and stale ones replaced."""

import fcntl
import os
import stat
import struct
from pathlib import Path

import pytest

from prefork.errors import AddressError, ConfigError
from prefork.system import pidfile, replacing

READ_LOCK = struct.pack("@hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)


def test_it_holds_the_pid_and_everybody_can_read_it(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        written = pidfile.write(f"{tmp_path}/pid")
    finally:
        os.umask(before)
    assert (tmp_path / "pid").read_text() == f"{os.getpid()}\n"
    assert stat.S_IMODE((tmp_path / "pid").stat().st_mode) == 0o644
    written.remove()
    assert list(tmp_path.iterdir()) == []


def test_it_is_never_seen_without_its_pid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pid"
    real, seen = os.write, []

    def write(fd: int, data: bytes) -> int:
        seen.append(path.exists())
        return real(fd, data)

    monkeypatch.setattr(os, "write", write)
    written = pidfile.write(str(path))
    written.remove()
    assert seen == [False]


def test_a_stale_one_is_replaced_even_when_its_pid_is_somebody_elses_now(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    path.write_text("1\n")
    pidfile.write(str(path)).remove()
    path.touch()  # made beforehand, for its owner or its mode
    written = pidfile.write(str(path))
    assert path.read_text() == f"{os.getpid()}\n"
    written.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_live_daemons_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    written = pidfile.write(str(path))
    path.write_text("4711\n")
    with pytest.raises(AddressError, match="the daemon with pid 4711 is running and holds it"):
        pidfile.write(str(path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["pid"]
    assert path.read_text() == "4711\n"
    written.remove()
    assert list(tmp_path.iterdir()) == []


def test_no_lock_of_a_reader_is_a_daemons(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    path.write_text("4711\n")
    with path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        fcntl.fcntl(held, fcntl.F_OFD_SETLK, READ_LOCK)
        written = pidfile.write(str(path))
        assert path.read_text() == f"{os.getpid()}\n"
    with path.open("rb") as reader, pytest.raises(BlockingIOError):
        fcntl.fcntl(reader, fcntl.F_OFD_SETLK, READ_LOCK)
    written.remove()


def test_it_is_locked_before_others_can_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, modes = fcntl.fcntl, []

    def lock(fd: int, what: int, argument: bytes) -> bytes:
        if what == fcntl.F_OFD_SETLK:
            modes.append(stat.S_IMODE(os.fstat(fd).st_mode))
        return real(fd, what, argument)

    monkeypatch.setattr(fcntl, "fcntl", lock)
    pidfile.write(f"{tmp_path}/pid").remove()
    assert modes == [0o600]


def test_of_two_that_find_the_same_stale_one_each_knows_who_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pid"
    path.write_text("1\n")
    real, others = replacing.put, []
    begun: list[bool] = []

    def put(beside: str, place: str, stale: tuple[int, int] | None) -> bool:
        if not begun:  # another daemon, between our look and our step
            begun.append(True)
            others.append(pidfile.write(str(path)))
        return real(beside, place, stale)

    monkeypatch.setattr(replacing, "put", put)
    with pytest.raises(AddressError, match="is running and holds it"):
        pidfile.write(str(path))
    assert os.path.samestat(path.stat(), os.fstat(others[0].fd))
    assert [entry.name for entry in tmp_path.iterdir()] == ["pid"]
    others[0].remove()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_another_users_file_is_refused_whoever_locks_it(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    path.write_text("1\n")
    os.chown(path, 65534, -1)
    with pytest.raises(ConfigError, match="a file of user 65534 is in the way"):
        pidfile.write(str(path))
    assert path.read_text() == "1\n"


def test_one_that_is_not_ours_any_more_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    written = pidfile.write(str(path))
    path.unlink()
    path.write_text("somebody else's")
    written.remove()
    assert path.read_text() == "somebody else's"
    path.unlink()
    written = pidfile.write(str(path))
    path.unlink()
    written.remove()


@pytest.mark.parametrize("kind", ["missing", "link", "directory", "file", "fifo"])
def test_where_it_can_not_be_is_told_with_the_path(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "pid"
    victim = tmp_path / "victim"
    victim.write_text("precious")
    wanted = {
        "missing": "the directory .*/no does not exist",
        "link": "a symbolic link is in the way",
        "directory": "something that is no file is in the way",
        "file": "a file that is no pid file is in the way",
        "fifo": "something that is no file is in the way",
    }
    if kind == "missing":
        path = tmp_path / "no" / "pid"
    elif kind == "link":
        path.symlink_to(victim)
    elif kind == "file":
        path.write_text("127.0.0.1 localhost\n")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=wanted[kind]) as caught:
        pidfile.write(str(path))
    assert str(path) in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before
    assert victim.read_text() == "precious"
