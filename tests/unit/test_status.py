"""The status of a daemon whose handlers have written over their boards: whatever stands there, it can be read and shown."""

from typing import Any

import click
from hypothesis import example, given
from hypothesis import strategies as st

from prefork.ops import status
from prefork.pool import scoreboard
from prefork.pool.scoreboard import NOTHING, Access, Counts, Layout, Scoreboard

LAYOUT, HIGH = Layout(1, 8), 6
_NAMES = ("starting", "idle", "busy", "retiring", "paused")


def facts(ended: Counts) -> dict[str, Any]:
    """What a master answers."""
    return {
        "name": "echo",
        "module": "echo:loop",
        "version": "1",
        "pid": 1,
        "state": "running",
        "started_at": 0.0,
        "uptime": 1.0,
        "generation": 1,
        "reload": None,
        "backoff": None,
        "max_workers": 4,
        "saturated_seconds": 0.0,
        "saturated_since": None,
        "stalled_seconds": 0.0,
        "stalled_since": None,
        "ceiling_since": None,
        "listeners": [{"address": "127.0.0.1:7000", "queue": 0, "queue_limit": 1}],
        "targets": [2],
        "ended": {key: getattr(ended, key) for key in ("begun", "ok", "error", "rejected", "killed")},
        "histogram": [0] * scoreboard.BUCKETS,
        "forked": 2,
        "exited": 0,
        "overdue": [],
        "deaths": [],
        "boards": [{"generation": 1, "layout": [1, 8], "high": [HIGH], "listeners": ["127.0.0.1:7000"]}],
    }


def shown(pattern: bytes, accounts: list[Counts]) -> dict[str, Any]:
    """The status where the board is full of this pattern."""
    board_fd, orders_fd = scoreboard.create("board", LAYOUT.board_bytes), scoreboard.create("orders", LAYOUT.orders_bytes)
    board = Scoreboard(board_fd, orders_fd, LAYOUT, Access.MASTER)
    for slot, account in enumerate(accounts):
        board.keep_account(slot, account)
    board.board[:] = (pattern * LAYOUT.board_bytes)[: LAYOUT.board_bytes]
    board.close()
    return status.assemble(facts(NOTHING), [board_fd, orders_fd])


account = st.builds(lambda ok, error: Counts(ok + error, ok, error, 0, 0), *[st.integers(0, 10**9)] * 2)


@example(pattern=b"\xff", accounts=[Counts(5, 4, 1, 0, 0)] * HIGH)
@example(pattern=b"B", accounts=[NOTHING] * HIGH)
@given(st.binary(min_size=1, max_size=24), st.lists(account, min_size=HIGH, max_size=HIGH))
def test_no_content_of_a_board_keeps_its_status_from_being_told(pattern: bytes, accounts: list[Counts]) -> None:
    told = shown(pattern, accounts)
    totals = told["totals"]
    assert totals["ok"] + totals["error"] + totals["killed"] + totals["rejected"] + totals["serving"] == totals["accepted"]
    assert totals["accepted"] >= sum(one.begun for one in accounts), "nothing goes back"
    assert 0 <= totals["serving"] <= HIGH
    assert sum(told["listeners"][0]["workers"][name] for name in _NAMES) == len(told["workers"])
    assert all(line.isprintable() for line in click.unstyle(status.table(told)).split("\n"))
