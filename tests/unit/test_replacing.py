"""A name is taken from the file that was looked at and from no other."""

import errno
import os
from pathlib import Path

import pytest

from prefork.net.unix import inode_of
from prefork.system import replacing


@pytest.fixture(params=["exchanging", "not exchanging"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """On a file system that can exchange names, and on one that can't."""

    def refuse(_old: str, _new: str, _flags: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    if request.param == "not exchanging":
        monkeypatch.setattr(replacing, "_rename", refuse)
    (tmp_path / "new").write_text("new")
    return tmp_path


def names(folder: Path) -> dict[str, str]:
    return {entry.name: entry.read_text() for entry in folder.iterdir()}


def test_a_free_name_is_taken(folder: Path) -> None:
    assert replacing.put(f"{folder}/new", f"{folder}/name", None)
    assert names(folder) == {"name": "new"}


def test_a_name_that_is_not_free_any_more_is_not(folder: Path) -> None:
    (folder / "name").write_text("other")
    assert not replacing.put(f"{folder}/new", f"{folder}/name", None)
    assert names(folder) == {"new": "new", "name": "other"}


def test_what_was_looked_at_is_replaced(folder: Path) -> None:
    (folder / "name").write_text("stale")
    assert replacing.put(f"{folder}/new", f"{folder}/name", inode_of(f"{folder}/name"))
    assert names(folder) == {"name": "new"}


def test_what_was_not_looked_at_goes_back(tmp_path: Path) -> None:
    for name in ("new", "name", "stale"):
        (tmp_path / name).write_text(name)
    before = names(tmp_path)
    assert not replacing.put(f"{tmp_path}/new", f"{tmp_path}/name", inode_of(f"{tmp_path}/stale"))
    assert names(tmp_path) == before
    (tmp_path / "name").unlink()
    assert not replacing.put(f"{tmp_path}/new", f"{tmp_path}/name", inode_of(f"{tmp_path}/stale"))
    assert names(tmp_path) == {"new": "new", "stale": "stale"}


def test_what_can_not_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "new").touch()
    with pytest.raises(OSError, match="cross-device"):
        replacing.put(f"{tmp_path}/new", "/proc/name", None)
