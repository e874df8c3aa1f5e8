"""A socketserver server that is the handler: what it does with each connection, and how that is counted."""

import http.client
import json
import re
import socket
import subprocess
import sys
import xmlrpc.client
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefork.testing import Server, StartError, connect, serve
from tests import watch
from tests.conftest import HANDLERS
from tests.handlers.ending import RESET

Start = Callable[..., Server]
Module = Callable[[str], Path]


def get(address: Any, path: str = "/") -> bytes:
    connection = http.client.HTTPConnection(address[0], address[1], timeout=10)
    connection.request("GET", path)
    body = connection.getresponse().read()
    connection.close()
    return body


def ask(address: Any, line: str) -> bytes:
    """What a line is answered with."""
    with connect(address) as sock:
        sock.sendall(line.encode() + b"\n")
        return sock.makefile("rb").read()


def outcomes(server: Server) -> list[int]:
    totals = watch.quiet(server)
    assert watch.identity_holds(totals)
    return [totals[key] for key in ("ok", "error", "rejected", "killed")]


# -- servers of the standard library


@pytest.mark.parametrize("name", ["wsgi", "closed"])
def test_a_wsgi_application_is_served_by_wsgiref(prefork_server: Start, name: str) -> None:
    server = prefork_server(f"servers:{name}", folder=HANDLERS, workers=1)
    told = ["127.0.0.1", socket.getfqdn("127.0.0.1"), str(server.address[1])]
    assert json.loads(get(server.address)) == told
    assert server.command("reload")["ok"]
    assert json.loads(get(server.address)) == told
    assert outcomes(server) == [2, 0, 0, 0]


def test_xmlrpc_is_served_and_has_its_connection(prefork_server: Start) -> None:
    server = prefork_server("servers:rpc", folder=HANDLERS, workers=1)
    with xmlrpc.client.ServerProxy("http://127.0.0.1:{1}/".format(*server.address)) as proxy:
        assert proxy.upper("hello") == "HELLO"
        assert str(proxy.peer()).startswith("127.0.0.1:")
    assert outcomes(server) == [2, 0, 0, 0]


def test_an_http_server_that_begins_threads_serves_in_the_worker_itself(prefork_server: Start) -> None:
    server = prefork_server("servers:files", folder=HANDLERS, workers=1)
    assert get(server.address, "/tiny.py") == (HANDLERS / "tiny.py").read_bytes()
    assert outcomes(server) == [1, 0, 0, 0]


# -- what is called, and counted


DESCRIPTORS = """
import os, socketserver
class Answer(socketserver.BaseRequestHandler):
    def handle(self):
        told = f"{len(os.listdir('/proc/self/fd'))} {self.server.server_address[1]}"
        self.request.recv(64)
        self.request.sendall(told.encode())
server = socketserver.TCPServer(("", 0), Answer, bind_and_activate=False)
"""


@pytest.mark.parametrize("bind", ["127.0.0.1:0", ":0", "unix"])
def test_each_connection_goes_through_the_servers_methods_with_the_clients_address(
    prefork_server: Start, tmp_path: Path, bind: str
) -> None:
    server = prefork_server("servers:noted", folder=HANDLERS, bind=bind.replace("unix", f"unix:{tmp_path}/socket"), workers=1)
    address = ("127.0.0.1", server.address[1]) if bind == ":0" else server.address
    for served in (1, 2):
        with connect(address) as sock:
            mine = json.dumps(sock.getsockname())
            sock.sendall(b"about\n")
            told = json.loads(sock.makefile().read())
        name = {":0": ["::", server.address[1], 0, 0], "unix": server.address}.get(bind, list(server.address))
        family = {":0": "AF_INET6", "unix": "AF_UNIX"}.get(bind, "AF_INET")
        assert told == {
            "client": json.loads(mine),
            "server": name,
            "socket": name,
            "family": family,
            "served": served,
        }
    assert outcomes(server) == [2, 0, 0, 0]
    printed = re.findall("stdout: (.*)", server.log())
    assert printed[3:] == [f"get_request {mine}", f"verify_request {mine}", "close_request"]
    assert len(printed) == 6


def test_a_servers_own_socket_is_closed_and_it_says_where_it_listens(prefork_server: Start, module: Module) -> None:
    server = prefork_server("mine:server", folder=module(DESCRIPTORS), workers=1)
    # Standard three, listener, doorbell, /dev/null, the pipe for stacks, the connection, the folder that is listed.
    assert ask(server.address, "") == b"9 %d" % server.address[1]


def test_what_verify_request_refuses_is_rejected(prefork_server: Start) -> None:
    server = prefork_server("servers:noted", folder=HANDLERS, workers=1, max_workers=1, access_log="-")
    for _ in range(3):
        with server.connect() as sock:
            sock.sendall(b"no\n")
            assert watch.cut(sock)
    assert outcomes(server) == [0, 0, 3, 0]
    assert server.status()["duration"]["p50"] is None, "what was not served has no duration"
    assert b'"served": 1' in ask(server.address, "about")
    assert outcomes(server) == [1, 0, 3, 0]
    log = watch.logged(server, " ok after ")
    assert log.count(" rejected after ") == 3
    assert "Traceback" not in log


def test_a_client_that_was_rejected_was_its_workers_last(prefork_server: Start) -> None:
    server = prefork_server("servers:noted", folder=HANDLERS, workers=1, max_connections=1)
    for _ in range(4):
        with server.connect() as sock:
            sock.sendall(b"no\n")
            assert watch.cut(sock)
    assert outcomes(server) == [0, 0, 4, 0]
    assert len(set(re.findall(r"\[(\d+)\]: stdout: get_request", server.log()))) == 4


def test_what_handle_error_swallows_is_an_error_with_its_traceback(prefork_server: Start) -> None:
    server = prefork_server("servers:noted", folder=HANDLERS, workers=1, max_workers=1)
    assert ask(server.address, "raise") == b""
    assert outcomes(server) == [0, 1, 0, 0]
    log = watch.logged(server, "ValueError: of the request handler")
    assert "handle_error ValueError" in log
    assert "request.py" not in log
    assert ask(server.address, "verify") == b""
    assert ask(server.address, "exit") == b""
    assert outcomes(server) == [0, 3, 0, 0]
    log = watch.logged(server, "SystemExit: 3")
    assert "ValueError: of verify_request" in log
    assert log.count("handle_error ") == 1, "the library's servers tell it nothing else"
    assert log.count("stdout: close_request") == 3


def test_the_librarys_handle_error_is_not_called_beside_the_log(prefork_server: Start) -> None:
    server = prefork_server("servers:plain", folder=HANDLERS, workers=1)
    assert ask(server.address, "raise") == b""
    log = watch.logged(server, "ValueError: of the request handler")
    assert log.count("ValueError: of the request handler") == 1
    assert "Exception occurred during processing" not in log
    assert outcomes(server) == [0, 1, 0, 0]


@pytest.mark.parametrize("name", ["noted", "plain"])
def test_a_client_that_has_gone_is_no_error_of_a_server(prefork_server: Start, name: str) -> None:
    server = prefork_server(f"servers:{name}", folder=HANDLERS, workers=1, log_level="debug")
    with server.connect() as sock:
        sock.sendall(b"gone\n")
        assert sock.recv(1) == b"!"
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    assert outcomes(server) == [1, 0, 0, 0]
    log = watch.logged(server, " ended the connection: [Errno 107]")
    assert "Traceback" not in log
    assert ("handle_error OSError" in log) == (name == "noted")


def test_a_servers_own_socket_object_and_address_reach_its_handler(prefork_server: Start) -> None:
    server = prefork_server("servers:relaying", folder=HANDLERS, workers=1)
    for _ in range(2):
        assert json.loads(ask(server.address, "198.51.100.7\nabout"))["client"] == ["198.51.100.7", 1]
    with server.connect() as sock:
        sock.sendall(b"198.51.100.7\ngone\n")
        assert sock.recv(1) == b"!"
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    assert outcomes(server) == [3, 0, 0, 0]


def test_a_child_that_a_servers_handler_forks_does_not_end_the_connection(prefork_server: Start) -> None:
    server = prefork_server("servers:plain", folder=HANDLERS, workers=1)
    assert ask(server.address, "fork") == b"still open"
    assert outcomes(server) == [1, 0, 0, 0]


def test_each_listeners_workers_have_its_address(prefork_server: Start) -> None:
    server = prefork_server("servers:noted", folder=HANDLERS, workers=1, bind=["127.0.0.1:0", "[::1]:0"])
    for listener in server.status()["listeners"]:
        host, _, port = listener["address"].rpartition(":")
        told = json.loads(ask((host.strip("[]"), int(port)), "about"))
        assert told["server"][:2] == told["socket"][:2] == [host.strip("[]"), int(port)]


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("serve_forever", "prefork accepts connections and calls the handler"),
        ("handle_request", "prefork accepts connections and calls the handler"),
        ("get_request", "prefork accepts connections and calls the handler"),
        ("shutdown", "`prefork stop` ends the daemon"),
        ("server_close", "`prefork stop` ends the daemon"),
    ],
)
def test_a_server_does_not_accept_or_stop_anything(prefork_server: Start, name: str, instead: str) -> None:
    server = prefork_server("servers:plain", folder=HANDLERS, workers=1)
    assert instead in ask(server.address, name).decode()
    assert outcomes(server) == [1, 0, 0, 0]


# -- what is refused, with the way out

REFUSED = {
    "bound": "it listens on 127.0.0.1:",
    "datagrams": "UDPServer answers datagrams; prefork serves connections",
    "tls": "its listening socket would speak TLS, and is not the one that clients come to: wrap each connection in its get_request",
    "wrapping": "server_bind or server_activate raised",
    "elsewhere": "Elsewhere.server_bind or server_activate makes a socket of its own: the listening socket is prefork's",
    "Noted": "Noted is a server class",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_server_that_would_serve_otherwise_than_it_says_is_refused(name: str) -> None:
    options: dict[str, Any] = {"environment": {"BOUND": "1"}} if name == "bound" else {}
    with pytest.raises(StartError, match=re.escape(REFUSED[name])) as caught, serve(f"servers:{name}", folder=HANDLERS, **options):
        pass
    assert caught.value.exit_status == 78
    assert "internal error" not in str(caught.value)


SOURCE = """
import socketserver

def app(environ, start_response):
    start_response("200 OK", [])
    return [b"HELLO"]

class Application:
    wsgi_app = app
    def __call__(self, environ, start_response):
        return app(environ, start_response)

flask_like = Application()

class Shout(socketserver.StreamRequestHandler):
    def handle(self):
        self.wfile.write(self.rfile.readline().upper())

class Shouting(socketserver.ThreadingTCPServer):
    pass

class Ready(socketserver.TCPServer):
    def __init__(self, address, bind_and_activate=True):
        super().__init__(address, Shout, bind_and_activate)

class Binding(socketserver.TCPServer):
    def __init__(self, host, port):
        super().__init__((host, port), Shout)

class Any(socketserver.TCPServer):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)

async def loop(sock):
    import asyncio
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, (await loop.sock_recv(sock, 64)).upper())

async def about(sock, conn):
    assert conn.peer
    await loop(sock)

async def streams(reader, writer):
    writer.write((await reader.readline()).upper())
    await writer.drain()
    writer.close()

class Awaited:
    async def __call__(self, sock):
        await loop(sock)

awaited = Awaited()

async def asgi(scope, receive, send):
    pass

class Starlette:
    async def __call__(self, scope, receive, send):
        pass

starlette_like = Starlette()
"""
WAYS_OUT = {
    "app": "a WSGI application",
    "flask_like": "a WSGI application",
    "Shouting": "a server class",
    "Ready": "a server class",
    "Binding": "a server class",
    "Any": "a server class",
    "loop": "a coroutine function",
    "about": "a coroutine function",
    "streams": "a coroutine function",
    "awaited": "a coroutine function",
}


@pytest.mark.parametrize("name", WAYS_OUT)
def test_what_is_no_handler_is_refused_with_lines_that_serve_it(prefork_server: Start, module: Module, name: str) -> None:
    folder = module(SOURCE)
    command = [sys.executable, "-m", "prefork", "check", f"--module=mine:{name}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 78
    assert WAYS_OUT[name] in done.stderr
    lines = re.findall("`(.*?)`", done.stderr)
    [handler] = re.findall(r"and serve mine:(\w+)", done.stderr)
    source = "\n".join([SOURCE, *lines])
    folder = module(source.replace("HANDLER", "Shout").replace("ARGUMENTS", "'127.0.0.1', 0"))
    server = prefork_server(f"mine:{handler}", folder=folder, workers=1)
    if "WSGI" in WAYS_OUT[name]:
        assert get(server.address) == b"HELLO"
    else:
        assert ask(server.address, "hello") == b"HELLO\n"
    assert outcomes(server) == [1, 0, 0, 0]


@pytest.mark.parametrize("name", ["asgi", "starlette_like"])
def test_an_asgi_application_is_refused(module: Module, name: str) -> None:
    message = f"mine:{name}: an ASGI application, which is called by an event loop: `uvicorn mine:{name}` serves it"
    with pytest.raises(StartError, match=message), serve(f"mine:{name}", folder=module(SOURCE)):
        pass


def test_check_says_what_binding_raises(module: Module) -> None:
    source = "import socketserver\nclass Own(socketserver.TCPServer):\n    def server_bind(self):\n        1 / 0\n"
    source += "server = Own(('', 0), socketserver.StreamRequestHandler, bind_and_activate=False)\n"
    command = [sys.executable, "-m", "prefork", "check", "--module=mine:server"]
    done = subprocess.run(command, cwd=module(source), capture_output=True, text=True, check=False)
    assert done.returncode == 78
    assert "mine:server: server_bind or server_activate raised\nTraceback" in done.stderr
    assert "request.py" not in done.stderr


def test_an_object_is_no_name_for_a_daemon() -> None:
    target: Any = object()
    with pytest.raises(ValueError, match="an object of type object has no name"), serve(target):
        pass
