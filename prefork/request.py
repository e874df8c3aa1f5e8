"""What a `socketserver` request handler finds in ``self.server``: the facts that a server of the library would have there.

One object for each worker. It accepts nothing and stops nothing, that is prefork's business; whoever asks it to is told what
to do instead. Which attributes handlers use was read in socketserver and http.server of CPython 3.11 to 3.13.
"""

import socket
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from prefork.net.listener import Listener

_ACCEPTING = "prefork accepts connections and calls the handler; leave it out"
_ENDING = "`prefork stop` ends the daemon; to end this connection, return from handle()"
_LISTENING = "the listening socket is prefork's; the option bind says where it listens"
INSTEAD: Mapping[str, str] = {
    **dict.fromkeys(("serve_forever", "service_actions", "handle_request", "get_request"), _ACCEPTING),
    **dict.fromkeys(("process_request", "process_request_thread", "finish_request", "handle_timeout"), _ACCEPTING),
    **dict.fromkeys(("shutdown", "server_close"), _ENDING),
    **dict.fromkeys(("socket", "fileno", "server_bind", "server_activate"), _LISTENING),
    "verify_request": "look at self.client_address in the handler, and return",
    "handle_error": "raise: prefork logs the traceback and counts the connection as an error",
}


class RequestServer:
    """``self.server``. Handlers may set attributes of their own: each worker has its own object, for as long as it lives."""

    timeout = None

    def __init__(self, listener: Listener, handler: Callable[..., Any], backlog: int) -> None:
        self.address_family = socket.AddressFamily(listener.address.family)
        self.socket_type = socket.SOCK_STREAM
        # A Unix socket was bound under another name and renamed: getsockname would give that one.
        is_unix = listener.address.family == socket.AF_UNIX
        self.server_address: Any = listener.address.host if is_unix else listener.sock.getsockname()
        self.server_port = listener.address.port
        self.request_queue_size = backlog
        self.RequestHandlerClass = handler

    @cached_property
    def server_name(self) -> str:
        """As http.server has it. Asked for only when a handler does: it may take a look-up."""
        return socket.getfqdn("" if self.address_family == socket.AF_UNIX else self.server_address[0])

    def shutdown_request(self, request: socket.socket) -> None:
        """Tell the peer that nothing more comes, and close."""
        try:
            request.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the peer has gone already
        self.close_request(request)

    def close_request(self, request: socket.socket) -> None:
        """Close the connection."""
        request.close()

    def __getattr__(self, name: str) -> Any:
        instead = INSTEAD.get(name, "there is no such attribute; set it before, on this object (each worker has one) or your class")
        raise AttributeError(f"self.server.{name}: {instead}", name=name, obj=self)
