"""What user code can do without end costs the master next to nothing: it backs off, and it says so.

Counted are forks, generations and lines, never time. CPU where there is nothing else to count: what a process has used does not
depend on what else runs, and each bound is several times what was measured, and a fraction of what it was.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from prefork.pool.lives import TOLERATED
from prefork.testing import Server
from tests import watch
from tests.conftest import HANDLERS

Start = Callable[..., Server]
Module = Callable[[str], Path]


@pytest.mark.parametrize("how", ["signal", "status 0", "status 1"])
def test_workers_that_end_as_soon_as_they_accept_are_forked_ever_more_seldom(prefork_server: Start, how: str) -> None:
    server = prefork_server("storms:loop", folder=HANDLERS, workers=2, on_worker_start="storms:start", environment={"HOW": how})
    log = watch.logged(server, "2 in a row, next try in 2.2 s")
    assert log.count("in a row") < 10, "each failure is told, and not each death"
    # The first workers, those that were replaced until they counted as one failure, and those of the second try.
    assert server.status()["totals"]["forked"] <= 2 + TOLERATED + 1 + 2 + 2


def test_fork_servers_that_die_after_each_commit_are_replaced_ever_more_seldom(prefork_server: Start) -> None:
    server = prefork_server(
        "storms:loop", folder=HANDLERS, workers=2, on_worker_start="storms:start", environment={"HOW": "fork server"}
    )
    # A first death is replaced at once. Those before the commit are failed boots, which were backed off from before.
    watch.logged(server, "a new fork server in 1.5 s: the fork server died soon after its generation began to serve")
    watch.logged(server, "a new fork server in 2.2 s: the fork server died soon after its generation began to serve")
    assert server.status()["backoff"]["reason"].startswith("the fork server died soon after")
