"""When a connection's client has gone, by what the kernel says of real sockets."""

import os
import socket
import struct
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from prefork.net.peer import GONE_ERRORS, has_gone, may_be_told_by_peer
from tests import watch

FAMILIES = ["IPv4", "IPv6", "Unix"]
Step = Callable[[socket.socket, socket.socket], object]


def reset(client: socket.socket, _: socket.socket) -> None:
    if client.family != socket.AF_UNIX:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def close_unread(client: socket.socket, ours: socket.socket) -> None:
    ours.send(b"for the client")
    client.recv(1, socket.MSG_PEEK)
    client.close()


def close_and_be_written_to(client: socket.socket, ours: socket.socket) -> None:
    client.close()
    if client.family != socket.AF_UNIX:
        ours.send(b"to nobody")


def end_both(client: socket.socket, ours: socket.socket) -> None:
    ours.shutdown(socket.SHUT_WR)
    assert client.recv(1) == b""
    client.close()


GONE: dict[str, Step] = {
    "reset": reset,
    "closed before it has read everything": close_unread,
    "closed, and written to": close_and_be_written_to,
    "both directions ended": end_both,
}
LIVING: dict[str, Step] = {
    "open": lambda client, _: client.send(b"x"),
    "half-closed": lambda client, _: client.shutdown(socket.SHUT_WR),
    "our direction ended": lambda _, ours: ours.shutdown(socket.SHUT_WR),
    "our reading ended": lambda _, ours: ours.shutdown(socket.SHUT_RD),
}


def connection(stack: ExitStack, family: str, folder: Path) -> tuple[socket.socket, socket.socket, socket.socket, object]:
    """Listener, client, the accepted socket, and what accept() gave."""
    name: Any = {"IPv4": ("127.0.0.1", 0), "IPv6": ("::1", 0), "Unix": str(folder / "socket")}[family]
    kind = socket.AF_UNIX if family == "Unix" else socket.AF_INET6 if family == "IPv6" else socket.AF_INET
    listener, client = stack.enter_context(socket.socket(kind)), stack.enter_context(socket.socket(kind))
    listener.bind(name)
    listener.listen()
    client.connect(listener.getsockname())
    ours, address = listener.accept()
    return listener, client, stack.enter_context(ours), address


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("step", GONE)
def test_a_client_has_gone(family: str, step: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        listener, client, ours, address = connection(stack, family, tmp_path)
        GONE[step](client, ours)
        watch.until("it has gone", lambda: has_gone(ours.fileno(), listener.fileno(), listener.family, address))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("step", LIVING)
def test_a_client_lives(family: str, step: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        listener, client, ours, address = connection(stack, family, tmp_path)
        LIVING[step](client, ours)
        if step in ("open", "half-closed"):
            ours.recv(1)  # it has arrived
        assert not has_gone(ours.fileno(), listener.fileno(), listener.family, address)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_stands_at_the_number_of_a_connection_is_not_taken_for_it(family: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        (tmp_path / "other").mkdir()
        listener, client, ours, address = connection(stack, family, tmp_path)
        _, other, theirs, _ = connection(stack, family, tmp_path / "other")
        for end in (client, other):
            reset(end, ours)
        fd = ours.fileno()
        watch.until("it has gone", lambda: has_gone(fd, listener.fileno(), listener.family, address))
        os.dup2(theirs.fileno(), fd)
        assert not has_gone(fd, listener.fileno(), listener.family, address)
        os.close(ours.detach())
        assert not has_gone(fd, listener.fileno(), listener.family, address)


def test_errors_that_only_look_like_a_peers_are_none() -> None:
    class LyingError(Exception):
        __class__ = property(lambda _: ConnectionResetError)
        errno = 104

    told = [OSError(number, "x") for number in GONE_ERRORS] + [ConnectionError(), BrokenPipeError("a library's")]
    others = [ConnectionRefusedError(), TimeoutError("timed out"), OSError(2, "x"), OSError([], "x"), LyingError(), KeyError()]
    assert [may_be_told_by_peer(error) for error in told] == [True] * len(told)
    assert [may_be_told_by_peer(error) for error in others] == [False] * len(others)
