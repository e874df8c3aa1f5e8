"""Request handlers of socketserver and http.server, as people have them, and what they see."""

import functools
import http.server
import json
import os
import socket
import socketserver
import threading
from typing import Any

import prefork


class Lines(socketserver.StreamRequestHandler):
    """Answer each line, from the documentation of socketserver."""

    def handle(self) -> None:
        """Answer until the client ends."""
        for line in self.rfile:
            self.wfile.write(line.upper())


class Tuned(Lines):
    """Everything that StreamRequestHandler can be told; the answer leaves in finish()."""

    rbufsize = 0
    wbufsize = -1
    timeout = 0.2
    disable_nagle_algorithm = True

    def handle(self) -> None:
        """Say what the socket is like; then wait for somebody who says nothing."""
        nodelay = self.request.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        told = [nodelay, self.request.gettimeout(), type(self.rfile).__name__, type(self.wfile).__name__]
        self.wfile.write(json.dumps(told).encode())
        try:
            self.rfile.read(1)
        except TimeoutError:
            self.wfile.write(b" late")


class Flood(socketserver.StreamRequestHandler):
    """Leaves a write to finish() whose peer has gone by then."""

    wbufsize = 1 << 20

    def handle(self) -> None:
        """Wait for the end, then answer."""
        self.rfile.read()
        self.wfile.write(b"x" * 1000)


class About(socketserver.BaseRequestHandler):
    """Tell what a handler can know."""

    def handle(self) -> None:
        """One line of JSON, then `stopping` for each line."""
        server: Any = self.server
        server.served = getattr(server, "served", 0) + 1
        try:
            server.serve_forever()
        except AttributeError as error:
            refused = str(error)
        told = {
            "client_address": self.client_address,
            "server_address": server.server_address,
            "server_name": server.server_name,
            "server_port": server.server_port,
            "family": server.address_family.name,
            "type": server.socket_type.name,
            "is_class": server.RequestHandlerClass is About,
            "timeout": server.timeout,
            "queue": server.request_queue_size,
            "refused": refused,
            "served": server.served,
            "peer": prefork.current().peer,
            "pid": os.getpid(),
        }
        self.request.sendall(json.dumps(told).encode() + b"\n")
        while self.request.recv(4096):
            self.request.sendall(json.dumps(prefork.current().stopping).encode() + b"\n")


class Closing(socketserver.BaseRequestHandler):
    """Closes as some handlers do."""

    def handle(self) -> None:
        """Answer and close through the server."""
        self.request.sendall(b"bye")
        self.server.shutdown_request(self.request)


class Raising(socketserver.BaseRequestHandler):
    """Raises."""

    def handle(self) -> None:
        """Raise."""
        raise RuntimeError("raised in a class")


class Datagrams(socketserver.DatagramRequestHandler):
    """Not for connections."""


class Choosy(socketserver.BaseRequestHandler):
    """Wants more than it gets."""

    def __init__(self, request: Any, client_address: Any, server: Any, root: str) -> None:
        self.root = root
        super().__init__(request, client_address, server)


class Other:
    """A class, and no request handler."""


rooted = functools.partial(Choosy, root="/")
files = functools.partial(http.server.SimpleHTTPRequestHandler, directory=os.path.dirname(__file__))


def same(sock: socket.socket, conn: prefork.Connection) -> None:
    """Compare what current() gives here and elsewhere."""
    outcomes: list[object] = []

    def ask() -> None:
        try:
            outcomes.append(prefork.current().peer)
        except RuntimeError as error:
            outcomes.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    sock.sendall(json.dumps([conn is prefork.current(), *outcomes]).encode())


def deep(sock: socket.socket) -> None:
    """A function without ``conn``, which closes its socket first."""
    channel, kept = sock.dup(), prefork.current()
    sock.close()
    with channel:
        now = prefork.current()
        channel.sendall(json.dumps([now is kept, now.id, now.peer, now.local]).encode())


def late(sock: socket.socket) -> None:
    """The same, but asks only after the close."""
    channel = sock.dup()
    sock.close()
    with channel:
        channel.sendall(json.dumps([prefork.current().local]).encode())
