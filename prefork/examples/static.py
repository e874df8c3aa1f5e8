"""Static files over HTTP, by the handler that Python has for it: any request handler class of socketserver is served so.

    prefork serve --module static:Files --bind 127.0.0.1:8000
    curl http://127.0.0.1:8000/

STATIC_ROOT names the folder; else it is the working directory. Symbolic links in it are followed, and folders without an
index.html are listed. A client that keeps its connection keeps a worker, so `timeout` is short.
"""

import os
from http.server import SimpleHTTPRequestHandler
from typing import Any

import prefork


class Files(SimpleHTTPRequestHandler):
    """GET and HEAD."""

    protocol_version = "HTTP/1.1"  # several requests on a connection
    timeout = 5  # seconds of silence
    wbufsize = 1 << 16  # head and body leave together

    def __init__(self, *args: Any) -> None:
        super().__init__(*args, directory=os.environ.get("STATIC_ROOT"))

    def end_headers(self) -> None:
        """A worker that was asked to leave says so to clients that would stay."""
        if prefork.current().stopping:
            self.send_header("Connection", "close")
        super().end_headers()

    def address_string(self) -> str:
        """For the log: the client of a Unix socket has no address."""
        return prefork.current().peer
