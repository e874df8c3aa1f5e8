"""The worker's loop in this process, with an accept() of ours, while other processes overwrite the board."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prefork.accepting import EXIT_RETIRED
from prefork.config import Sources
from prefork.handler import Handler, Shape
from prefork.pool import scoreboard
from prefork.pool.scoreboard import NOTHING, Access, Counts, Layout, Scoreboard
from prefork.worker import Brief, Worker

LAYOUT = Layout(1, 2)
SLOT = 1


class Clients:
    """A listener with so many clients; after the last one the worker is asked to leave."""

    family, type, proto = socket.AF_INET, socket.SOCK_STREAM, 0

    def __init__(self, count: int) -> None:
        self.left = count
        self.held: list[socket.socket] = []
        self.worker: Worker

    def fileno(self) -> int:
        return -1

    def _accept(self) -> tuple[int, Any]:
        self.left -= 1
        self.worker.retiring = self.left == 0
        ours, theirs = socket.socketpair()
        self.held.append(ours)
        return theirs.detach(), ("192.0.2.7", 4711)


@contextmanager
def served(count: int, account: Counts, call: Any, **options: Any) -> Iterator[tuple[Scoreboard, int]]:
    """A worker has served so many with ``call(board, number, worker)``. Gives its board, and its exit status."""
    board_fd, orders_fd = scoreboard.create("board", LAYOUT.board_bytes), scoreboard.create("orders", LAYOUT.orders_bytes)
    master = Scoreboard(board_fd, orders_fd, LAYOUT, Access.MASTER)
    master.keep_account(SLOT, account)
    board = Scoreboard(board_fd, orders_fd, LAYOUT, Access.WORKER)
    doorbell_read, doorbell = os.pipe2(os.O_NONBLOCK)
    clients = Clients(count)
    brief = Brief(
        generation=1,
        config=Sources({"module": "echo:loop", "bind": ["127.0.0.1:0"], **options}).load(),
        name="loop",
        master_pid=0,
        fork_server_pid=0,
        scoreboard=board,
        place=0,
        listener=SimpleNamespace(sock=clients, address=SimpleNamespace(family=socket.AF_INET), fileno=clients.fileno),  # type: ignore[arg-type]
        listener_stat=os.stat("/"),
        doorbell=doorbell,
        gate=-1,
        devnull=-1,
        devnull_stat=os.stat("/"),
        stacks=-1,
        reopen=(),
        offer=None,
        part=lambda: None,
        schedule=None,
        forget=(),
        private=frozenset(),
    )
    worker = Worker(brief, Handler(lambda _: call(board, clients.left, worker), Shape.SOCKET, {}))
    clients.worker, worker.slot, worker.pid = worker, SLOT, os.getpid()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(worker, "_put_back", lambda: None)  # this process' signals stay what they are
            patch.setattr("prefork.worker.log.event", lambda *_, **__: None)
            yield master, worker._prepare_to_serve()(SLOT)
    finally:
        worker.sock.detach()  # closed by its number, and kept for the next connection
        for sock in clients.held:
            sock.close()
        for mapped in (board, master):
            mapped.close()
        for fd in (board_fd, orders_fd, doorbell_read, doorbell):
            os.close(fd)


def overwrite(board: Scoreboard, pattern: bytes) -> None:
    size = LAYOUT.board_bytes
    board.board[:] = (pattern * (size // len(pattern) + 1))[:size]


accounts = st.builds(
    lambda ok, error, rejected, killed: Counts(ok + error + rejected + killed, ok, error, rejected, killed),
    *[st.integers(0, 10**6)] * 4,
)


@settings(max_examples=60)
@example(pattern=b"\xff", account=Counts(5, 5, 0, 0, 0), fails=(False, False, True))
@given(
    st.binary(min_size=1, max_size=64),
    accounts,
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_a_worker_survives_any_content_of_its_board_and_counts_right(
    pattern: bytes, account: Counts, fails: tuple[bool, bool, bool]
) -> None:
    def handle(board: Scoreboard, left: int, _: Worker) -> None:
        overwrite(board, pattern)
        if fails[left]:
            raise ValueError("the handler's own")

    with served(3, account, handle, log_level="error", max_connections=2) as (board, status):
        assert status == EXIT_RETIRED
        errors = sum(fails)
        expected = Counts(account.begun + 3, account.ok + 3 - errors, account.error + errors, account.rejected, account.killed)
        assert board.written(SLOT, account) == expected
        assert board.tired[SLOT] in (1, pattern[0], *pattern), "the row is anybody's"


def test_a_worker_whose_board_is_overwritten_knows_its_own_connection() -> None:
    known = []

    def handle(board: Scoreboard, _: int, worker: Worker) -> None:
        overwrite(board, b"\0\xff")
        known.append(worker.connection())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Worker, "_local", lambda _: "192.0.2.1:7000")
        with served(2, Counts(40, 40, 0, 0, 0), handle) as (_, status):
            assert status == EXIT_RETIRED
    assert [(conn.peer, conn.id) for conn in known] == [("192.0.2.7:4711", "1.1.41"), ("192.0.2.7:4711", "1.1.42")]
    assert 0 < known[0].accepted_at <= known[1].accepted_at


def test_a_worker_that_serves_no_connection_says_so_whatever_its_board_says() -> None:
    found: list[Worker] = []
    with served(1, NOTHING, lambda *told: found.append(told[-1])) as (board, _):
        overwrite(board, bytes([scoreboard.BUSY]))
        with pytest.raises(RuntimeError, match="serves no connection now"):
            found[0].connection()
