"""Unix sockets in the file system: seen only as they shall be, and nobody else's files are touched."""

import os
import stat
from pathlib import Path

import pytest

from prefork.errors import InUseError
from prefork.net import unix
from prefork.system import replacing

NOBODY = pytest.param((65534, 65534), ["chown"], marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root can give it away"))


@pytest.mark.parametrize(("owner", "owned"), [NOBODY, ((os.getuid(), os.getgid()), []), (unix.UNCHANGED, [])])
def test_a_socket_is_never_seen_without_its_mode_and_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: tuple[int, int], owned: list[str]
) -> None:
    path = tmp_path / "socket"
    steps: list[str] = []
    for where, name in ((os, "chown"), (os, "chmod"), (replacing, "put")):
        real = getattr(where, name)

        def step(*args: object, name: str = name, real: object = real, **more: object) -> object:
            steps.append(name)
            assert not path.exists(), f"{name} comes when the socket has its name already"
            return real(*args, **more)  # type: ignore[operator]

        monkeypatch.setattr(where, name, step)
    sock, inode = unix.open_unix(str(path), 0o640, 1, owner)
    with sock:
        assert steps == ["chmod", *owned, "put"]
        assert (path.stat().st_dev, path.stat().st_ino) == inode
        assert stat.S_IMODE(path.stat().st_mode) == 0o1640, "cleaners spare it"
        assert [entry.name for entry in tmp_path.iterdir()] == ["socket"]


def test_of_two_that_find_the_same_stale_socket_one_has_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "socket")
    unix.open_unix(path, 0o600, 1)[0].close()
    real, winners = replacing.put, []
    begun: list[bool] = []

    def put(beside: str, place: str, stale: tuple[int, int] | None) -> bool:
        if not begun:  # another daemon, between our look and our step
            begun.append(True)
            winners.append(unix.open_unix(path, 0o600, 1))
        return real(beside, place, stale)

    monkeypatch.setattr(replacing, "put", put)
    with pytest.raises(InUseError, match="by this daemon itself"):
        unix.open_unix(path, 0o600, 1)
    sock, inode = winners[0]
    with sock:
        assert unix.inode_of(path) == inode
        assert [entry.name for entry in tmp_path.iterdir()] == ["socket"]


@pytest.mark.parametrize("kind", ["link", "file", "another socket"])
def test_what_was_put_in_a_sockets_place_is_not_given_away(tmp_path: Path, kind: str) -> None:
    victim, path = tmp_path / "victim", tmp_path / "socket"
    victim.write_text("precious")
    victim.chmod(0o600)
    inode = None
    if kind == "link":
        path.symlink_to(victim)
    elif kind == "file":
        os.link(victim, path)
    else:
        sock, (device, number) = unix.open_unix(str(path), 0o600, 1)
        sock.close()
        inode = (device, number + 1)
    with pytest.raises(FileExistsError):
        unix.dress(str(path), inode, 0o666, unix.UNCHANGED)
    assert stat.S_IMODE(victim.stat().st_mode) == 0o600
    assert path.stat().st_mode & 0o777 == 0o600
