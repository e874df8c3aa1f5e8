"""`prefork.testing`, as people use it for their own handlers."""

import socket

import pytest

from prefork.testing import StartError, serve


def shout(sock: socket.socket) -> None:
    """A handler in a test module."""
    sock.sendall(sock.recv(64).upper())


def test_a_function_is_served_as_it_stands() -> None:
    with serve(shout, workers=2) as server:
        with server.connect() as sock:
            sock.sendall(b"hello")
            assert sock.recv(64) == b"HELLO"
        assert server.status()["listeners"][0]["workers"]["target"] == 2
        assert server.command("reload") == {"ok": True, "generation": 2, "suspended": False}
    assert server.process.returncode == 0


def test_a_daemon_that_does_not_start_says_why() -> None:
    with pytest.raises(StartError, match="no module 'nosuch'") as caught, serve("nosuch:loop"):
        pass
    assert caught.value.exit_status == 78


def test_the_daemon_ends_with_the_block_even_when_the_test_fails() -> None:
    with pytest.raises(ZeroDivisionError), serve(shout) as server:
        raise ZeroDivisionError
    assert server.process.returncode == 0
