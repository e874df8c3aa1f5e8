"""What prefork and gunicorn serve here."""

import select
import socket
import time
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler
from typing import Any

LATE_SECONDS = 0.005
COMPUTE = b"compute"


def late(sock: socket.socket) -> None:
    """An echo that has to wait for something."""
    while data := sock.recv(4096):
        time.sleep(LATE_SECONDS)
        sock.sendall(data)


def computing(sock: socket.socket) -> None:
    """An echo, but for whoever sends COMPUTE: they get a byte, and then it computes until they leave."""
    while data := sock.recv(4096):
        if data == COMPUTE:
            sock.sendall(b"!")
            gone = select.poll()
            gone.register(sock, select.POLLIN)
            while not gone.poll(0):
                sum(range(100_000))
        sock.sendall(data)


class Http(BaseHTTPRequestHandler):
    """The path without its slash is the answer."""

    wbufsize = 1 << 16  # head and body leave together

    def do_GET(self) -> None:
        """Answer."""
        body = self.path[1:].encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Nobody else logs each request either."""


def application(environ: dict[str, Any], start_response: Callable[[str, list[tuple[str, str]]], Any]) -> Iterable[bytes]:
    """The same as a WSGI application."""
    body = environ["PATH_INFO"][1:].encode()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]
