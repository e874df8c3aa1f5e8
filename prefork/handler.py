"""From ``echo:loop`` to something to call. Runs in the fork server (and its workers), never in the master: it imports user code.

Nothing the import or a hook does may end this process or slip through: whatever it raises, SystemExit included, becomes a
HandlerError with the traceback that its author needs, without our own frames.
"""

import difflib
import functools
import importlib
import inspect
import os
import socket
import sys
import threading
import traceback
import zipimport
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType
from typing import Any

import prefork.examples
from prefork.config import Config
from prefork.errors import HandlerError
from prefork.net import left_open
from prefork.system import process, readable

MEGABYTE = 1 << 20
HOOKS = ("on_boot", "on_worker_start", "on_worker_exit")
WANTED = "a handler is a function loop(sock) or a socketserver.BaseRequestHandler subclass, or a socketserver.BaseServer instance"


@dataclass(frozen=True, slots=True)
class Connection:
    """What a handler ``loop(sock, conn)`` can ask about its connection. ``accepted_at`` is in monotonic seconds.

    ``client_address`` is what `socket.accept` gives, an IPv4 client of a listener for both families as IPv4 has it.
    """

    id: str
    peer: str
    client_address: Any
    local: str
    listener: str
    worker: int
    generation: int
    accepted_at: float
    asked_to_stop: Callable[[], bool] = field(repr=False)

    @property
    def stopping(self) -> bool:
        """True once the worker was asked to retire, or the daemon to stop: finish soon."""
        return self.asked_to_stop()


class Shape(Enum):
    """How a handler is called."""

    SOCKET = "loop(sock)"
    CONNECTION = "loop(sock, conn)"
    REQUEST = "Class(request, client_address, server)"
    SERVER = "server.finish_request(request, client_address)"


@dataclass(frozen=True, slots=True)
class Hook:
    """A function that is called at a turn of a process' life. ``label`` is how its user wrote it: ``on_boot = mine:boot``."""

    label: str
    call: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Handler:
    """A loaded handler and its hooks, by option."""

    call: Callable[..., Any]
    shape: Shape
    hooks: Mapping[str, Hook]

    def run_hook(self, option: str) -> None:
        """Call that hook, if there is one. Whatever it raises is a HandlerError with its traceback."""
        hook = self.hooks.get(option)
        if hook is not None:
            run(hook.label, hook.call)


def run(label: str, call: Callable[[], Any]) -> Any:
    """Call user code. Whatever it raises is a HandlerError with its traceback, which begins with ``label``."""
    try:
        return call()
    except HandlerError:
        raise
    except BaseException as error:
        raise HandlerError(f"{label} raised\n{what_was_raised(error)}") from None


# Set where workers are forked: what gives the connection that a worker serves, and None in any other process.
_look: Callable[[], Connection | None] | None = None
# The thread that calls handlers, there and in their children. gevent's main thread has another number.
_thread = -1


def current() -> Connection:
    """The connection being served, from anywhere inside the handler: the object that ``loop(sock, conn)`` is given.

    Raises RuntimeError where there is none: outside a handler, or in another thread than its own.
    """
    if _look is not None and threading.get_ident() != _thread:
        raise RuntimeError("prefork.current(): this is not the handler's thread; call it in the handler and hand the object over")
    connection = _look() if _look is not None else None
    if connection is None:
        raise RuntimeError(
            "prefork.current(): this process is not a worker of prefork; only a handler that it calls has a connection"
        )
    return connection


def serve_current(look: Callable[[], Connection | None]) -> None:
    """From now on `current` asks ``look``."""
    global _look, _thread
    _look, _thread = look, threading.get_ident()


def _here() -> str:
    """Where we are, for people."""
    return "the working directory, which was removed," if process.is_nowhere() else os.getcwd()


# Of the path, what was there at the start and is not any more.
_removed: list[str] = []


def prepare_path(folder: str) -> None:
    """The working directory first on the path; the bundled examples last, so that nothing of theirs hides anybody's module."""
    global _removed
    # The master has found something there.
    _removed = [place for place in sys.path if sys.path_importer_cache.get(place) is not None and not os.path.exists(place)]
    sys.path[:] = [folder, *[entry for entry in sys.path if entry not in ("", folder)], *prefork.examples.__path__]
    # A .pyc is trusted by second and size: with one written by the last generation, a reload within the second of the edit
    # would serve the old code.
    sys.dont_write_bytecode = True
    _look_anew()


def _look_anew() -> None:
    """Forget what this process, or the master before its fork, has found on the path: a reload finds what a fresh start finds.

    Remembered are listings of folders (as long as a folder's time stamp stays), folders that were not there, and what an archive
    holds. What is loaded stays so, and so do path entries of .pth files: the interpreter's start has made these.
    """
    # Not importlib.invalidate_caches(): in newer Pythons it imports importlib.metadata, 1.2 MB in each fork server.
    sys.path_importer_cache.clear()
    zipimport._zip_directory_cache.clear()  # type: ignore[attr-defined] # its docstring names it; all importers of an archive share it


def load(config: Config) -> Handler:
    """Import the handler and its hooks. Raises HandlerError."""
    target = config.module
    found = _find(target, target)
    shape = run(f"{target}: a look at it", functools.partial(_shape, target, found))
    given = {option: getattr(config, option) for option in HOOKS}
    return Handler(found, shape, {option: _load_hook(f"{option} = {hook}", hook) for option, hook in given.items() if hook})


def refuse_threads(target: str) -> None:
    """Raise HandlerError when import or on_boot have started threads."""
    if threading.active_count() > 1:
        names = ", ".join(sorted(t.name for t in threading.enumerate() if t is not threading.main_thread()))
        raise HandlerError(
            f"{target}: the import or on_boot started threads ({names}); a fork copies none of them: start them in the handler, or "
            "in on_worker_start"
        )


def files_in_memory(config: Config) -> int:
    """Bytes of files that this process has in RAM, before the import (`refuse_size`). Raises HandlerError where none can tell."""
    try:
        return process.memory_parts()[1] if config.max_memory else 0
    except OSError as error:
        raise HandlerError(f"max_memory: memory can't be seen here ({error.strerror}): mount /proc, or leave it out") from None


def refuse_size(config: Config, mapped: int) -> None:
    """Raise HandlerError when a worker would be larger than max_memory with its first connection, whatever that allocates.

    ``mapped``: `files_in_memory` before the import. A fork gets all that is its parent's own; of files it has what it touches, the
    interpreter's before all else. (A worker of `echo` has 19.3 MiB after its first connection, by this sum 19.4; one that has
    imported ssl and asyncio 22.7, by the sum 22.8, and its fork server 27.6.)
    """
    if not config.max_memory:
        return
    own, _ = process.memory_parts()
    if own + mapped >= config.max_memory:
        raise HandlerError(
            f"max_memory = {config.max_memory / MEGABYTE:.1f}M: after the import of {config.module} a worker has "
            f"{(own + mapped) / MEGABYTE:.1f}M before it serves, and would be recycled after each connection: raise it by what a "
            "connection may take on top of that"
        )


def refuse_connections(config: Config, before: Container[int]) -> left_open.LeftOpen:
    """Raise HandlerError when import or on_boot have left a connection open. Returns what else they have left open.

    ``before``: the sockets that there were before the import.
    """
    found = left_open.since(before)
    if found.connections and config.shared_connections == "refuse":
        raise HandlerError(
            f"{config.module}: the import or on_boot left connections open ({', '.join(found.connections)}), which all workers "
            'would share and get each other\'s answers from: connect in on_worker_start, or set shared_connections = "allow"'
        )
    return found


def _find(label: str, target: str) -> Any:
    """Import ``MODULE:ATTR``. Raises HandlerError, which begins with ``label``."""
    module_name, _, attribute = target.partition(":")
    found: Any = None
    name = ""
    try:
        found = importlib.import_module(module_name)
        for name in attribute.split("."):
            owner, found = found, getattr(found, name)
            if (
                isinstance(owner, type)
                and inspect.isfunction(found)
                and not isinstance(inspect.getattr_static(owner, name), staticmethod)
            ):
                raise HandlerError(f"{label}: {name} is a method of {owner.__name__}, and there is no object to call it on")
    except HandlerError:
        raise
    except ModuleNotFoundError as error:
        if isinstance(error.name, str) and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise HandlerError(
                f"{label}: no module {error.name!r} in {_here()} or on the Python path"
                f"{_near(module_name)}{_closed()}{_what_was_removed()}"
            ) from None
        raise HandlerError(f"{label}: the import raised{_closed()}\n{what_was_raised(error)}{_what_was_removed()}") from None
    except AttributeError as error:
        if found is not None and error.obj is found and inspect.ismodule(found) and found.__name__ == module_name:
            raise HandlerError(f"{label}: {_lacks(found, name)}") from None
        raise HandlerError(f"{label}: the import raised\n{what_was_raised(error)}") from None
    except BaseException as error:
        raise HandlerError(f"{label}: the import raised\n{what_was_raised(error)}") from None
    return found


def _what_was_removed() -> str:
    """Of a release that was the current one at the start, say: the interpreter's own path does not follow a link."""
    if not _removed:
        return ""
    return f"\nremoved from the Python path since the start: {', '.join(_removed)}: an upgrade or a restart finds it anew"


def _near(module_name: str) -> str:
    """A module that may have been meant: a slip of the finger, or a file's name (mine.py:loop)."""
    top, *inner = module_name.removesuffix(".py").split(".")
    folders = [] if inner or process.is_nowhere() else [os.getcwd(), *prefork.examples.__path__]
    near = difflib.get_close_matches(top, [name for folder in folders for name in _modules_in(folder)], 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _modules_in(folder: str) -> list[str]:
    """Not by pkgutil: where an import has failed, the next one may fail, too."""
    try:
        names = os.listdir(folder)
    except OSError:  # not ours to read, or gone: then nothing there was meant
        return []
    found = [name.removesuffix(".py") for name in names if name.endswith(".py") or os.path.exists(f"{folder}/{name}/__init__.py")]
    return [name for name in found if name.isidentifier()]


def _closed() -> str:
    """Of the places where modules are looked for those that this user can't read: an import takes such a one for empty."""
    closed = {readable.closed_at(entry, os.R_OK | os.X_OK) for entry in sys.path if entry}
    named = ", ".join(sorted(path for path in closed if path is not None))
    return f"; user {os.geteuid()} can't read {named}, which the Python path leads to" if named else ""


def _lacks(module: ModuleType, name: str) -> str:
    file = getattr(module, "__file__", None)
    where = file if isinstance(file, str) and file else _without_file(module)
    near = difflib.get_close_matches(name, [known for known in list(vars(module)) if isinstance(known, str)], 1)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    file = os.path.join(_here(), *module.__name__.split(".")) + ".py"
    if os.path.exists(file) and not (os.path.exists(where) and os.path.samefile(file, where)):
        meant += f"; {file} is hidden by it, which prefork has loaded before: rename yours"
    return f"{where} has no {name!r}{meant}"


def _without_file(module: ModuleType) -> str:
    """What a module is that no file has been read for."""
    if not hasattr(module, "__path__"):
        return "a built-in module"
    folders = ", ".join(map(str, module.__path__))
    return f"{module.__name__} is a namespace package (folders without __init__.py: {folders}), which"


def _load_hook(label: str, target: str) -> Hook:
    found = _find(label, target)
    if not callable(found):
        raise HandlerError(f"{label}: {type(found).__name__} is not callable; a hook is a function without arguments")
    if _makes_a_coroutine(found):
        raise HandlerError(f"{label}: calling it only makes a coroutine or generator; a hook is a plain function")
    signature = _signature(found)
    if signature is not None and not _accepts(signature, 0):
        raise HandlerError(f"{label}{signature}: a hook is called without arguments")
    return Hook(label, found)


def _shape(target: str, found: Any) -> Shape:
    if _is_server(target, found):
        return Shape.SERVER
    return Shape.REQUEST if _is_request_handler(target, found) else _shape_of_function(target, found)


def _is_server(target: str, found: Any) -> bool:
    """Whether it is a server of socketserver's. Raises HandlerError for one that can't be served, and for its class."""
    cls, socketserver = _class_of(found), sys.modules.get("socketserver")
    if socketserver is None:
        return False
    if isinstance(cls, type) and issubclass(cls, socketserver.BaseServer):
        raise HandlerError(
            f"{target}: {cls.__name__} is a server class, and a handler is one server, which does not listen itself: add "
            f"{_making(target.partition(':')[2], _signature(found))}, and serve {_beside(target, 'server')}"
        )
    if not issubclass(type(found), socketserver.BaseServer):
        return False
    if getattr(found, "socket_type", socket.SOCK_STREAM) == socket.SOCK_DGRAM:
        raise HandlerError(f"{target}: {type(found).__name__} answers datagrams; prefork serves connections: a TCPServer")
    own = getattr(found, "socket", None)
    if hasattr(own, "do_handshake"):
        raise HandlerError(
            f"{target}: its listening socket would speak TLS, and is not the one that clients come to: wrap each connection in "
            "its get_request"
        )
    if where := _bound_to(own):
        raise HandlerError(
            f"{target}: it listens on {where} itself, where nobody would answer: make it with bind_and_activate=False, or add "
            f"`{target.partition(':')[2]}.server_close()` after it"
        )
    return True


def _making(name: str, signature: inspect.Signature | None) -> str:
    """The line that makes such a server, which does not listen."""
    arguments = list(signature.parameters.values()) if signature is not None else []
    takes_any = any(argument.kind is inspect.Parameter.VAR_POSITIONAL for argument in arguments)
    if signature is not None and not takes_any and _accepts(signature, 1, bind_and_activate=False):
        return f'`server = {name}(("", 0), bind_and_activate=False)`'
    if signature is not None and _accepts(signature, 2, bind_and_activate=False):
        return f'`server = {name}(("", 0), HANDLER, bind_and_activate=False)` with its request handler class'
    return f"`server = {name}(ARGUMENTS); server.server_close()` with what it needs"


def _bound_to(own: Any) -> str:
    """The address of a server's own socket; empty when it has none."""
    try:
        name = own.getsockname()
    except (AttributeError, OSError):  # none at all, or closed
        return ""
    if isinstance(name, tuple):
        return f"{name[0]}:{name[1]}" if name[1] else ""
    return f"unix:{os.fsdecode(name)}" if name else ""


def _class_of(found: Any) -> Any:
    """The class or function that a partial is of."""
    while isinstance(found, functools.partial):
        found = found.func
    return found


def _beside(target: str, name: str) -> str:
    """Another name in the same module."""
    return f"{target.partition(':')[0]}:{name}"


def _is_request_handler(target: str, found: Any) -> bool:
    """Whether it is a request handler class of socketserver, or a partial of one. That module is not imported for the question."""
    cls, socketserver = _class_of(found), sys.modules.get("socketserver")
    if socketserver is None or not isinstance(cls, type) or not issubclass(cls, socketserver.BaseRequestHandler):
        return False
    if issubclass(cls, socketserver.DatagramRequestHandler):
        raise HandlerError(
            f"{target}: a DatagramRequestHandler answers datagrams; prefork serves connections: StreamRequestHandler"
        )
    signature = _signature(found)
    if signature is not None and not _accepts(signature, 3):
        raise HandlerError(f"{target}{signature}: it is called with (request, client_address, server), as socketserver does")
    return True


def _shape_of_function(target: str, found: Any) -> Shape:
    if not callable(found):
        raise HandlerError(f"{target}: {type(found).__name__} is not callable; {WANTED}")
    if isinstance(found, type):
        raise HandlerError(f"{target}: a class of another kind; {WANTED}")
    signature = _signature(found)
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in signature.parameters.values() if p.kind in positional] if signature is not None else []
    _refuse_other_protocols(target, found, names)
    if signature is None:
        return Shape.SOCKET
    if _accepts(signature, 1) and names[1:2] != ["conn"]:
        return Shape.SOCKET
    if _accepts(signature, 2):
        return Shape.CONNECTION
    raise HandlerError(f"{target}{signature}: a handler is loop(sock) or loop(sock, conn)")


def _refuse_other_protocols(target: str, found: Any, names: list[str]) -> None:
    """Raise HandlerError for what others call with something else than a socket, or await; with a line that serves it."""
    attribute = target.partition(":")[2]
    awaited = any(map(inspect.iscoroutinefunction, _called(found)))
    if names == ["scope", "receive", "send"] or (awaited and len(names) == 3):
        raise HandlerError(f"{target}: an ASGI application, which is called by an event loop: `uvicorn {target}` serves it")
    if names[1:2] == ["start_response"] or (len(names) == 2 and names[0] in ("environ", "env") and names[1] != "conn"):
        raise HandlerError(
            f"{target}: a WSGI application, which is called with a request and not with a connection: add "
            f'`from wsgiref.simple_server import make_server; server = make_server("127.0.0.1", 0, {attribute}); '
            f"server.server_close()`, and serve {_beside(target, 'server')}"
        )
    if not _makes_a_coroutine(found):
        return
    if not awaited:
        raise HandlerError(f"{target}: calling it only makes a generator; a handler is a plain function loop(sock)")
    arguments, adapter, called = "sock", "", attribute
    if len(names) == 2 and names[1] == "conn":
        arguments = "sock, conn"
    elif len(names) == 2:  # asyncio.start_server's
        adapter = f"`async def connected(sock): import asyncio; await {attribute}(*await asyncio.open_connection(sock=sock))` and "
        called = "connected"
    raise HandlerError(
        f"{target}: a coroutine function, and prefork calls blocking ones: add {adapter}"
        f"`def serve({arguments}): import asyncio; asyncio.run({called}({arguments}))`, and serve {_beside(target, 'serve')}"
    )


def _makes_a_coroutine(found: Any) -> bool:
    """Whether calling it does nothing yet."""
    kinds = inspect.iscoroutinefunction, inspect.isasyncgenfunction, inspect.isgeneratorfunction
    return any(kind(called) for kind in kinds for called in _called(found))


def _called(found: Any) -> tuple[Any, Any]:
    """What a call of it may run: a function, or the method of an object's class."""
    return found, getattr(type(found), "__call__", None)  # noqa: B004 - it is looked at, not asked for


def _signature(found: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(found)
    except (TypeError, ValueError):
        return None  # a C function that tells nothing about itself


def _accepts(signature: inspect.Signature, arguments: int, **keywords: Any) -> bool:
    try:
        signature.bind(*[None] * arguments, **keywords)
    except TypeError:
        return False
    return True


def what_was_raised(error: BaseException) -> str:
    """The traceback from the user's first frame on."""
    ours = (__file__, importlib.__file__, os.path.join(os.path.dirname(__file__), "request.py"))
    tb = error.__traceback__
    while tb is not None and (tb.tb_frame.f_code.co_filename in ours or "importlib._bootstrap" in tb.tb_frame.f_code.co_filename):
        tb = tb.tb_next
    return "".join(traceback.format_exception(type(error), error, tb)).rstrip()
