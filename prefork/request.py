"""What a `socketserver` request handler finds in ``self.server``: the facts that a server of the library would have there.

One object for each worker, or the user's own server, which is the handler then. It accepts nothing and stops nothing, that is
prefork's business; whoever asks it to is told what to do instead. Which attributes handlers use, and what a server does with a
connection, was read in socketserver and http.server of CPython 3.11 to 3.13.
"""

import os
import socket
import sys
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, NoReturn

from prefork.errors import HandlerError
from prefork.net.address import Address
from prefork.net.listener import Listener

BINDING = "server_bind or server_activate"
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


def name_of(listener: Listener) -> Any:
    """What the library has in ``server_address``."""
    # A Unix socket was bound under another name and renamed: getsockname would give that one.
    return listener.address.host if listener.address.family == socket.AF_UNIX else listener.sock.getsockname()


def name_at(address: Address) -> tuple[int, Any]:
    """The family and name of a listener that is not there yet; of an inherited one, an example."""
    match address.family:
        case socket.AF_UNIX:
            return address.family, address.host
        case socket.AF_INET6:
            return address.family, (address.host or "::", address.port, 0, 0)
        case socket.AF_INET:
            return address.family, (address.host, address.port)
    return socket.AF_INET, ("127.0.0.1", 0)


class RequestServer:
    """``self.server``. Handlers may set attributes of their own: each worker has its own object, for as long as it lives."""

    timeout = None

    def __init__(self, listener: Listener, handler: Callable[..., Any], backlog: int) -> None:
        self.address_family = socket.AddressFamily(listener.address.family)
        self.socket_type = socket.SOCK_STREAM
        self.server_address = name_of(listener)
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


# -- a server that is the handler


class RejectedError(Exception):
    """The server's `verify_request` has refused the client."""


class ListeningSocket:
    """``server.socket``: says where the listener is, and gives `get_request` the connection that the worker has accepted."""

    type, proto = socket.SOCK_STREAM, 0

    def __init__(self, family: int, name: Any) -> None:
        self.family = socket.AddressFamily(family)
        self.pending: tuple[socket.socket, Any] | None = None
        self._name = name

    def getsockname(self) -> Any:
        """As a listening socket has it."""
        return self._name

    def accept(self) -> tuple[socket.socket, Any]:
        """The connection that is being served, once."""
        pending, self.pending = self.pending, None
        if pending is None:
            raise RuntimeError(f"self.server.socket.accept: {_ACCEPTING}")
        return pending

    def _is_done(self, *_: Any) -> None:
        """The listener is bound, listens, and has the options that the configuration says."""

    bind = listen = setsockopt = setblocking = settimeout = close = _is_done

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"self.server.socket.{name}: {_LISTENING}", name=name, obj=self)


def bind(server: Any, family: int, name: Any) -> dict[str, Any]:
    """Have a server be as if it listened where a listener does. Returns its attributes, for where it serves another one meanwhile.

    Its own `server_bind` and `server_activate` do it, so that it gets what a subclass makes there: http.server's ``server_name``,
    wsgiref's ``base_environ``. Raises HandlerError, and whatever they raise.
    """
    listening, own = ListeningSocket(family, name), vars(server).get("socket")
    if own is not None:
        own.close()
    vars(server).update(socket=listening, address_family=listening.family, server_address=name)
    for step in ("server_bind", "server_activate"):
        getattr(server, step, lambda: None)()
    if server.socket is not listening:
        raise HandlerError(f"{type(server).__name__}.{BINDING} makes a socket of its own: {_LISTENING}")
    vars(server).update({method: _refusing(method) for method in ("serve_forever", "handle_request", "shutdown", "server_close")})
    return dict(vars(server))


def _refusing(name: str) -> Callable[..., NoReturn]:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(f"self.server.{name}: {INSTEAD[name]}")

    return refuse


def serving(
    server: Any, client_address: Callable[[], Any], note: Callable[[BaseException, int], object]
) -> Callable[[socket.socket], None]:
    """What serves a connection through ``server``, as its own loop would, but for the threads or processes that this might start.

    It raises what the server's methods raise, also where `handle_error` has been told of it, and RejectedError. ``note`` is given
    each error, and the connection's descriptor, before `shutdown_request` closes that.
    """

    def serve(sock: socket.socket) -> None:
        fd, pid = sock.fileno(), os.getpid()
        request, client, verified = sock, client_address(), False
        server.socket.pending = request, client
        try:
            if hasattr(server, "get_request"):
                request, client = server.get_request()
            verified = bool(server.verify_request(request, client))
            if verified:
                server.finish_request(request, client)
        except Exception as error:
            note(error, fd)
            if verified and _reports_itself(server):
                server.handle_error(request, client)
            raise
        finally:
            if os.getpid() == pid:  # a child that the handler forked and that comes back must not end its parent's connection
                server.shutdown_request(request)
        if not verified:
            raise RejectedError

    return serve


def _reports_itself(server: Any) -> bool:
    """Whether its `handle_error` is another one than the library's, which only prints the traceback that the worker logs."""
    return getattr(server.handle_error, "__func__", None) is not sys.modules["socketserver"].BaseServer.handle_error
