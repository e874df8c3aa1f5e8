"""In which order a fork server carries out what it was asked."""

import socket
from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from prefork import log
from prefork.forkserver import ForkServer
from prefork.pool import wire
from prefork.pool.wire import Command, Order
from prefork.system import forks


@pytest.mark.parametrize("dropped", [True, False])
def test_a_fork_spares_nothing_while_lines_are_to_be_told_of(monkeypatch: pytest.MonkeyPatch, dropped: bool) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(log, "has_dropped", lambda: dropped)
    monkeypatch.setattr(forks, "spare", lambda *, everything: asked.append(everything))
    ForkServer(SimpleNamespace())._fork([])  # type: ignore[arg-type]
    assert asked == [not dropped]


def test_what_is_asked_of_a_worker_comes_after_its_fork_though_forks_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    done: list[object] = []

    def fork(_: ForkServer, slots: Sequence[int]) -> None:
        done.append(list(slots))

    def carry_out(_: ForkServer, command: Command) -> None:
        done.append(command)

    monkeypatch.setattr(ForkServer, "_fork", fork)
    monkeypatch.setattr(ForkServer, "_carry_out", carry_out)
    with ours, theirs:
        ours.setblocking(False)
        server = ForkServer(SimpleNamespace(channel=ours))  # type: ignore[arg-type]
        for command in (Command(Order.FORK, 0), Command(Order.FORK, 1), Command(Order.KILL, 1), Command(Order.FORK, 2)):
            theirs.send(wire.pack_command(command))
        assert server._obey()
        assert done == [[0, 1], Command(Order.KILL, 1), [2]]
        theirs.close()
        assert not server._obey(), "nobody is at the other end any more"
