"""Connections and listening sockets that the import or on_boot leaves open."""

import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prefork.net import left_open
from prefork.testing import Server, StartError, serve
from tests import watch

Start = Callable[..., Server]
Module = Callable[[str], Path]

HANDLER = "\ndef loop(sock):\n    sock.sendall(b'hello')\n"


@pytest.fixture
def backend() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def port(listener: socket.socket) -> int:
    number: int = listener.getsockname()[1]
    return number


def check(folder: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-P", "-m", "prefork", "check", "--module", "mine:loop", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def source(listener: socket.socket) -> str:
    return f"import socket\ndatabase = socket.create_connection(('127.0.0.1', {port(listener)}))\n{HANDLER}"


def test_one_of_the_import_is_refused_with_its_peer_and_the_ways_out(module: Module, backend: socket.socket) -> None:
    folder = module(source(backend))
    with pytest.raises(StartError) as refused, serve("mine:loop", folder=folder):
        raise AssertionError("it serves")
    said = str(refused.value)
    assert re.search(rf"mine:loop: .*\(descriptor \d+ to 127\.0\.0\.1:{port(backend)}\)", said)
    assert 'connect in on_worker_start, or set shared_connections = "allow"' in said
    assert refused.value.exit_status == 78
    checked = check(folder)
    assert checked.returncode == 78
    assert f"to 127.0.0.1:{port(backend)})" in checked.stderr
    assert check(folder, "--shared-connections=allow").returncode == 0


def test_who_allows_them_is_served(prefork_server: Start, module: Module, backend: socket.socket) -> None:
    server = prefork_server("mine:loop", folder=module(source(backend)), shared_connections="allow")
    with server.connect() as sock:
        assert sock.recv(64) == b"hello"


def test_one_of_on_boot_is_refused_and_one_of_each_worker_is_not(
    prefork_server: Start, module: Module, backend: socket.socket
) -> None:
    hook = f"import socket\ndef connect():\n    global db\n    db = socket.create_connection(('127.0.0.1', {port(backend)}))\n"
    folder = module(hook + HANDLER)
    with (
        pytest.raises(StartError, match="on_boot left connections open"),
        serve("mine:loop", folder=folder, on_boot="mine:connect"),
    ):
        raise AssertionError("it serves")
    server = prefork_server("mine:loop", folder=folder, on_worker_start="mine:connect")
    with server.connect() as sock:
        assert sock.recv(64) == b"hello"


def test_a_reload_that_leaves_one_open_changes_nothing(prefork_server: Start, module: Module, backend: socket.socket) -> None:
    folder = module(HANDLER)
    server = prefork_server("mine:loop", folder=folder)
    (folder / "mine.py").write_text(source(backend))
    refused = server.command("reload")
    assert not refused["ok"]
    assert f"to 127.0.0.1:{port(backend)})" in refused["reason"]
    with server.connect() as sock:
        assert sock.recv(64) == b"hello"


def test_listening_sockets_are_named(prefork_server: Start, module: Module) -> None:
    folder = module(f"import socket\nlistener = socket.create_server(('127.0.0.1', 0))\n{HANDLER}")
    server = prefork_server("mine:loop", folder=folder)
    assert re.search(r"every worker has: descriptor \d+ at 127\.0\.0\.1:\d+", watch.logged(server, "listening sockets"))
    checked = check(folder)
    assert checked.returncode == 0
    assert re.search(r"every worker has: descriptor \d+ at 127\.0\.0\.1:\d+", checked.stderr)


LOOP = "import asyncio\ndef make():\n    global loop_of_mine\n    loop_of_mine = asyncio.new_event_loop()\n"


def test_an_event_loop_that_workers_share_is_named_and_one_of_each_is_not(prefork_server: Start, module: Module) -> None:
    server = prefork_server("mine:loop", folder=module(LOOP + HANDLER), on_worker_start="mine:make")
    assert "event loops" not in server.log()
    server.stop()
    folder = module(f"{LOOP}make()\n{HANDLER}")
    server = prefork_server("mine:loop", folder=folder)
    named = r"event loops \(epoll: descriptor \d+\), .*: make them in on_worker_start"
    assert re.search(named, watch.logged(server, "event loops"))
    checked = check(folder)
    assert checked.returncode == 0
    assert re.search(named, checked.stderr)


CIRCLE = """
class Circle: pass
for made in (asyncio.new_event_loop(), database):
    it = Circle()
    it.it, it.made = it, made
del database, made, it
"""


def test_what_the_import_has_let_go_in_a_circle_is_closed_and_not_refused(
    prefork_server: Start, module: Module, backend: socket.socket
) -> None:
    folder = module("import asyncio, gc\ngc.disable()\n" + source(backend) + CIRCLE)
    server = prefork_server("mine:loop", folder=folder)
    with server.connect() as sock:
        assert sock.recv(64) == b"hello"
    assert "event loops" not in server.log()


# -- which sockets are connections


@pytest.mark.parametrize("name", ["socket", "\0prefork-test-left-open"])
def test_a_unix_socket_with_a_name_is_one(tmp_path: Path, name: str) -> None:
    path = str(tmp_path / name) if name[0] != "\0" else f"{name}-{tmp_path.parent.name}-{tmp_path.name}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        before = left_open.sockets()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            shown = path.replace("\0", "@")
            assert left_open.since(before).connections == (f"descriptor {client.fileno()} to unix:{shown}",)
        assert left_open.since(before).connections == ()


def test_one_that_the_peer_has_closed_is_none(backend: socket.socket) -> None:
    before = left_open.sockets()
    with socket.create_connection(backend.getsockname()):
        accepted, _ = backend.accept()
        assert len(left_open.since(before).connections) == 2
        accepted.close()
        assert left_open.since(before).connections == ()


def test_what_was_there_before_is_none_under_any_number(backend: socket.socket) -> None:
    with socket.create_connection(backend.getsockname()) as inherited:
        before = left_open.sockets()
        with inherited.dup():
            assert left_open.since(before).connections == ()


def test_socketpairs_datagrams_and_unconnected_sockets_are_none() -> None:
    before = left_open.sockets()
    one, other = socket.socketpair()
    with one, other, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams, socket.socket() as unconnected:
        datagrams.connect(("127.0.0.1", 9))
        found = left_open.since(before)
        assert (found.connections, found.listening, unconnected.type) == ((), (), socket.SOCK_STREAM)


def test_an_ipv6_peer_is_written_in_brackets() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
        before = left_open.sockets()
        with socket.create_connection(listener.getsockname()[:2]) as client:
            number = port(listener)
            assert left_open.since(before).connections == (f"descriptor {client.fileno()} to [::1]:{number}",)
            client.sendall(b"a client with something unread stays one")
            assert left_open.since(before).connections == (f"descriptor {client.fileno()} to [::1]:{number}",)
