"""How a client may end, and what else raises the same errors."""

import errno
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from prefork.net.peer import GONE_ERRORS
from prefork.testing import Server, connect
from tests import watch
from tests.conftest import HANDLERS
from tests.handlers.ending import CALLS, KINDS, RESET

Start = Callable[..., Server]
ADDRESSES = ["127.0.0.1:0", ":0", "unix"]
ERRNOS = sorted(errno.errorcode[number] for number in GONE_ERRORS)


class Clients:
    """Clients of one daemon, one after the other: how their connections have ended, by what is counted."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.is_unix = isinstance(server.address, str)
        self.counted = server.status()["totals"]

    @contextmanager
    def told(self, order: dict[str, Any]) -> Iterator[socket.socket]:
        """A client whose handler has read this order."""
        with self.server.connect() as sock:
            sock.sendall(json.dumps(order).encode() + b"\n")
            assert sock.recv(1) == b"!"
            yield sock

    def gone(self, **order: Any) -> str:
        """One that has gone when the handler does that."""
        with self.told({"gone": True, **order}) as sock:
            if not self.is_unix:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        return self.outcome()

    def living(self, *, half_closed: bool = False, **order: Any) -> str:
        """One that waits for an answer."""
        with self.told(order) as sock:
            if half_closed:
                sock.shutdown(socket.SHUT_WR)
            else:
                sock.sendall(b"x")
            assert watch.cut(sock)
        return self.outcome()

    def outcome(self) -> str:
        """Of the one connection since this was asked last."""
        before, self.counted = self.counted, watch.quiet(self.server)
        [outcome] = [key for key in ("ok", "error", "killed", "rejected") if self.counted[key] != before[key]]
        assert self.counted["accepted"] == before["accepted"] + 1
        return outcome


@pytest.fixture(params=ADDRESSES)
def clients(request: pytest.FixtureRequest, prefork_server: Start, tmp_path: Path) -> Clients:
    bind = request.param.replace("unix", f"unix:{tmp_path}/socket")
    return Clients(prefork_server("ending:loop", folder=HANDLERS, bind=bind, workers=1, max_workers=1, log_level="debug"))


def test_every_error_of_a_client_that_has_gone_is_its_end(clients: Clients) -> None:
    calls = ["EPIPE"] if clients.is_unix else list(CALLS)  # a Unix socket's other calls do not fail
    kinds = ["ConnectionResetError", "OddError"]
    assert {call: clients.gone(call=call) for call in calls} == dict.fromkeys(calls, "ok")
    assert {name: clients.gone(errno=name) for name in ERRNOS} == dict.fromkeys(ERRNOS, "ok")
    assert {kind: clients.gone(kind=kind) for kind in kinds} == dict.fromkeys(kinds, "ok")
    log = clients.server.log()
    assert "the handler raised" not in log
    assert log.count(" ended the connection: ") == len(calls) + len(ERRNOS) + len(kinds)


@pytest.mark.parametrize("half_closed", [False, True], ids=["open", "half-closed"])
def test_the_same_error_while_the_client_lives_is_the_handlers(clients: Clients, half_closed: bool) -> None:
    calls = [*CALLS, "ECONNREFUSED"]
    assert {call: clients.living(half_closed=half_closed, call=call, backend=True) for call in calls} == dict.fromkeys(
        calls, "error"
    )
    watch.logged(clients.server, "ConnectionResetError: [Errno 104] Connection reset by peer")
    assert {name: clients.living(half_closed=half_closed, errno=name) for name in ERRNOS} == dict.fromkeys(ERRNOS, "error")
    assert {kind: clients.living(half_closed=half_closed, kind=kind) for kind in KINDS} == dict.fromkeys(KINDS, "error")


def test_what_no_peer_does_is_the_handlers_error_also_when_the_client_has_gone(clients: Clients) -> None:
    errors = ["ENOENT", "EACCES", "EBADF", "EINVAL", "EAGAIN", "ECONNREFUSED", "EMFILE"]
    kinds = ["TimeoutError", "ValueError"]
    assert {name: clients.gone(errno=name) for name in errors} == dict.fromkeys(errors, "error")
    assert clients.gone(call="ECONNREFUSED") == "error"
    assert {kind: clients.gone(kind=kind) for kind in kinds} == dict.fromkeys(kinds, "error")


def test_only_the_connections_own_descriptor_tells_that_its_client_has_gone(clients: Clients) -> None:
    gone = {"nothing": "ok", "detached": "ok", "closed": "error", "a lost backend": "error", "a pipe": "error"}
    assert {made: clients.gone(errno="ECONNRESET", made=made) for made in gone} == gone
    for made in ("a lost backend", "a pipe"):
        assert clients.living(errno="ECONNRESET", made=made) == "error"


def test_a_client_that_has_closed_and_not_read_everything_has_gone(clients: Clients) -> None:
    with clients.server.connect() as sock:
        sock.sendall(json.dumps({"gone": True, "errno": "ENOTCONN"}).encode() + b"\n")
        assert sock.recv(1, socket.MSG_PEEK) == b"!"
    assert clients.outcome() == "ok"


def test_a_health_check_that_resets_before_the_handler_asks_who_it_is_is_no_error(prefork_server: Start) -> None:
    server = prefork_server("ending:checked", folder=HANDLERS, workers=2)
    for _ in range(5):
        with server.connect() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    totals = watch.until("all are counted", lambda: (now := server.status()["totals"])["ok"] + now["error"] == 5 and now)
    assert (totals["ok"], totals["error"]) == (5, 0)
    assert "raised" not in server.log()


@pytest.mark.parametrize("bind", ADDRESSES)
def test_a_handler_is_told_its_clients_address_as_accept_gives_it(prefork_server: Start, tmp_path: Path, bind: str) -> None:
    server: Server = prefork_server("ending:about", folder=HANDLERS, bind=bind.replace("unix", f"unix:{tmp_path}/socket"))
    for address in [(host, server.address[1]) for host in ("127.0.0.1", "::1")] if bind == ":0" else [server.address]:
        with connect(address) as sock:
            mine: Any = sock.getsockname()
            assert json.loads(sock.makefile().read()) == (list(mine) if isinstance(mine, tuple) else mine)
