"""RPyC: its servers are none of `socketserver`'s, and bind when they are made: serve the connection by a function.

`conn.serve_all()` returns when the client closes, and closes the socket. What the service remembers is each worker's own.
"""

import rpyc
from rpyc.core.stream import SocketStream


class Shouting(rpyc.Service):
    """One function to be called."""

    def exposed_upper(self, text):
        return text.upper()


def loop(sock):
    """Serve one client."""
    rpyc.connect_stream(SocketStream(sock), Shouting).serve_all()
