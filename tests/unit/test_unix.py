"""Unix sockets in the file system: seen only as they shall be, and nobody else's files are touched."""

import os
import stat
from pathlib import Path

import pytest

from prefork.net import unix

NOBODY = pytest.param((65534, 65534), ["chown"], marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root can give it away"))


@pytest.mark.parametrize(("owner", "owned"), [NOBODY, ((os.getuid(), os.getgid()), []), (unix.UNCHANGED, [])])
def test_a_socket_is_never_seen_without_its_mode_and_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: tuple[int, int], owned: list[str]
) -> None:
    path = tmp_path / "socket"
    steps: list[str] = []
    for name in ("chown", "chmod", "rename"):
        real = getattr(os, name)

        def step(*args: object, name: str = name, real: object = real, **more: object) -> None:
            steps.append(name)
            assert not path.exists(), f"{name} comes when the socket has its name already"
            real(*args, **more)  # type: ignore[operator]

        monkeypatch.setattr(os, name, step)
    sock, inode = unix.open_unix(str(path), 0o640, 1, owner)
    with sock:
        assert steps == [*owned, "chmod", "rename"]
        assert (path.stat().st_dev, path.stat().st_ino) == inode
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
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
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
