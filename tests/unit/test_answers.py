"""What is put together of a daemon's answer: the daemon may be another user's, or none."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefork.ops import status
from prefork.pool import scoreboard
from prefork.pool.scoreboard import Layout

LAYOUT = Layout(1, 2)
FACTS: dict[str, Any] = {
    **dict.fromkeys(("name", "module", "version", "pid", "state", "started_at", "uptime", "overdue"), "x"),
    **dict.fromkeys(("generation", "reload", "backoff", "max_workers"), 1),
    **dict.fromkeys(("saturated_seconds", "saturated_since", "stalled_seconds", "stalled_since", "ceiling_since"), 1.0),
    "listeners": [],
    "targets": [],
    "ended": {"begun": 0, "ok": 0, "error": 0, "rejected": 0, "killed": 0},
    "histogram": [0] * scoreboard.BUCKETS,
    "forked": 0,
    "exited": 0,
    "deaths": [],
    "boards": [{"generation": 1, "layout": [1, 2], "high": [2], "listeners": ["x"]}],
}


def true_one(_folder: Path) -> int:
    return scoreboard.create("board", max(LAYOUT.board_bytes, LAYOUT.orders_bytes))


def unsealed(_folder: Path) -> int:
    """It could be cut off while it is read."""
    fd = os.memfd_create("board", os.MFD_ALLOW_SEALING)
    true = true_one(_folder)
    os.pwrite(fd, os.pread(true, 1 << 20, 0), 0)
    os.close(true)
    return fd


def on_a_disk(folder: Path) -> int:
    """It could be on a file system that never answers."""
    fd, true = os.open(folder / "board", os.O_RDWR | os.O_CREAT), true_one(folder)
    os.pwrite(fd, os.pread(true, 1 << 20, 0), 0)
    os.close(true)
    return fd


def end_of_a_pipe(_folder: Path) -> int:
    reading, writing = os.pipe()
    os.close(writing)
    return reading


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_a_true_board_is_read(tmp_path: Path) -> None:
    descriptors = [true_one(tmp_path), true_one(tmp_path)]
    assert status.assemble(FACTS, descriptors)["totals"]["accepted"] == 0
    assert not any(map(is_open, descriptors))


@pytest.mark.parametrize("strange", [unsealed, on_a_disk, end_of_a_pipe])
def test_what_is_no_board_is_not_read(tmp_path: Path, strange: Callable[[Path], int]) -> None:
    for descriptors in ([strange(tmp_path), true_one(tmp_path)], [true_one(tmp_path), strange(tmp_path)]):
        with pytest.raises((ValueError, OSError), match=r"not a prefork scoreboard|Invalid argument"):
            status.assemble(FACTS, descriptors)
        assert not any(map(is_open, descriptors))


@pytest.mark.parametrize("high", [[1 << 40], [1 << 40, -(1 << 40)], ["2"], None])
def test_numbers_of_slots_that_no_daemon_has_are_not_gone_through(tmp_path: Path, high: Any) -> None:
    descriptors = [true_one(tmp_path), true_one(tmp_path)]
    with pytest.raises((ValueError, TypeError)):
        status.assemble({**FACTS, "boards": [{**FACTS["boards"][0], "high": high}]}, descriptors)
    assert not any(map(is_open, descriptors))
