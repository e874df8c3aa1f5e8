"""Servers of socketserver, wsgiref, xmlrpc and http.server, which do not bind, and are handlers themselves."""

import functools
import http.server
import json
import os
import select
import socket
import socketserver
import ssl
import sys
import xmlrpc.server
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import prefork

UNBOUND = functools.partial(socketserver.TCPServer, ("", 0), bind_and_activate=False)


def app(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
    """A WSGI application."""
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [json.dumps([environ[key] for key in ("REMOTE_ADDR", "SERVER_NAME", "SERVER_PORT")]).encode()]


wsgi = WSGIServer(("", 0), WSGIRequestHandler, bind_and_activate=False)
wsgi.set_app(app)
closed = make_server("127.0.0.1", 0, app)
closed.server_close()
rpc = xmlrpc.server.SimpleXMLRPCServer(("", 0), bind_and_activate=False, logRequests=False)
rpc.register_function(lambda text: text.upper(), "upper")
rpc.register_function(lambda: prefork.current().peer, "peer")
files = http.server.ThreadingHTTPServer(
    ("", 0), functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(Path(__file__).parent)), bind_and_activate=False
)


class Line(socketserver.StreamRequestHandler):
    """Do as the client's line says."""

    def handle(self) -> None:
        """Answer, or raise."""
        server: Any = self.server
        match self.rfile.readline().strip().decode():
            case "raise":
                raise ValueError("of the request handler")
            case "exit":
                sys.exit(3)
            case "gone":
                self.wfile.write(b"!")
                poll = select.poll()
                poll.register(self.request, 0)
                poll.poll(10_000)  # until the client has reset it
                self.request.getpeername()
            case "fork":
                if os.fork() == 0:
                    return
                os.wait()
                self.wfile.write(b"still open")
            case "about":
                told = {
                    "client": self.client_address,
                    "server": server.server_address,
                    "socket": server.socket.getsockname(),
                    "family": server.address_family.name,
                    "served": server.served,
                }
                self.wfile.write(json.dumps(told).encode())
            case name:
                try:
                    getattr(server, name)()
                except RuntimeError as error:
                    self.wfile.write(str(error).encode())


class Noted(socketserver.ThreadingTCPServer):
    """Note which of its methods are called with what; refuse who says "no" at once."""

    served = 0

    def get_request(self) -> tuple[socket.socket, Any]:
        """Note it."""
        request, client_address = super().get_request()
        print("get_request", json.dumps(client_address), flush=True)
        return request, client_address

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Not who says no."""
        print("verify_request", json.dumps(client_address), flush=True)
        first = request.recv(1, socket.MSG_PEEK)
        if first == b"v":
            raise ValueError("of verify_request")
        self.served += first != b"n"
        return bool(first != b"n")

    def process_request(self, *_: Any) -> None:
        """Never called: it would begin a thread."""
        raise AssertionError

    def handle_error(self, _: Any, client_address: Any) -> None:
        """Say nothing of what has happened."""
        print("handle_error", type(sys.exc_info()[1]).__name__, json.dumps(client_address), flush=True)

    def close_request(self, request: Any) -> None:
        """Note it."""
        print("close_request", flush=True)
        super().close_request(request)


noted = Noted(("", 0), Line, bind_and_activate=False)
plain = UNBOUND(Line)


class Relaying(socketserver.TCPServer):
    """Gets the client's real address from its first line, on a socket object of its own, as one that speaks TLS would."""

    def get_request(self) -> tuple[socket.socket, Any]:
        """Read one line, byte by byte."""
        request, _ = super().get_request()
        own, line = socket.socket(fileno=request.detach()), b""
        while not line.endswith(b"\n"):
            line += own.recv(1)
        return own, (line.decode().strip(), 1)


relaying = Relaying(("", 0), Line, bind_and_activate=False)
relaying.served = 0  # type: ignore[attr-defined]


# -- what can't be served

bound = socketserver.TCPServer(("127.0.0.1", 0), Line) if "BOUND" in os.environ else None
datagrams = socketserver.UDPServer(("", 0), socketserver.DatagramRequestHandler, bind_and_activate=False)
tls = UNBOUND(Line)
tls.socket = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).wrap_socket(tls.socket, server_side=True)


class Wrapping(socketserver.TCPServer):
    """Makes TLS of its listening socket when it is activated, as http.server's HTTPSServer does."""

    def server_activate(self) -> None:
        """Listen, and wrap."""
        super().server_activate()
        self.socket = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).wrap_socket(self.socket, server_side=True)


class Elsewhere(socketserver.TCPServer):
    """Makes its own listening socket."""

    def server_bind(self) -> None:
        """Make it."""
        self.socket = socket.create_server(("127.0.0.1", 0))


wrapping = Wrapping(("", 0), Line, bind_and_activate=False)
elsewhere = Elsewhere(("", 0), Line, bind_and_activate=False)
