"""From ``echo:loop`` to something to call. Runs in the fork server (and its workers), never in the master: it imports user code.

Nothing the import does may end this process or slip through: whatever it raises, SystemExit included, becomes a HandlerError
with the traceback that its author needs, without our own frames.
"""

import importlib
import inspect
import os
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import prefork.examples
from prefork.errors import HandlerError


@dataclass(frozen=True, slots=True)
class Connection:
    """What a handler ``loop(sock, conn)`` can ask about its connection. ``accepted_at`` is in monotonic seconds."""

    id: str
    peer: str
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


@dataclass(frozen=True, slots=True)
class Handler:
    """A loaded handler. ``takes_connection``: it is called as ``call(sock, conn)`` and not as ``call(sock)``."""

    call: Callable[..., Any]
    takes_connection: bool


def prepare_path(folder: str) -> None:
    """The working directory first on the path; the bundled examples last, so that nothing of theirs hides anybody's module."""
    sys.path[:] = [folder, *[entry for entry in sys.path if entry not in ("", folder)], *prefork.examples.__path__]
    # A .pyc is trusted by second and size: with one written by the last generation, a reload within the second of the edit
    # would serve the old code.
    sys.dont_write_bytecode = True


def load(target: str) -> Handler:
    """Import ``MODULE:ATTR``. Raises HandlerError."""
    module_name, _, attribute = target.partition(":")
    found: Any = None
    try:
        found = importlib.import_module(module_name)
        for name in attribute.split("."):
            found = getattr(found, name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise HandlerError(f"{target}: no module {error.name!r} in {os.getcwd()} or on the Python path") from None
        raise HandlerError(f"{target}: the import raised\n{what_was_raised(error)}") from None
    except AttributeError as error:
        if found is not None and error.obj is found and inspect.ismodule(found) and found.__name__ == module_name:
            where = getattr(found, "__file__", None) or "a built-in module"
            raise HandlerError(f"{target}: {where} has no {error.name!r}") from None
        raise HandlerError(f"{target}: the import raised\n{what_was_raised(error)}") from None
    except BaseException as error:
        raise HandlerError(f"{target}: the import raised\n{what_was_raised(error)}") from None
    if threading.active_count() > 1:
        names = ", ".join(sorted(t.name for t in threading.enumerate() if t is not threading.main_thread()))
        raise HandlerError(f"{target}: the import started threads ({names}); a fork copies none of them: start them in the handler")
    return Handler(found, _takes_connection(target, found))


def _takes_connection(target: str, found: Any) -> bool:
    if not callable(found):
        raise HandlerError(f"{target}: {type(found).__name__} is not callable; a handler is a function loop(sock)")
    if isinstance(found, type):
        raise HandlerError(f"{target}: a class; a handler is a function loop(sock)")
    if inspect.iscoroutinefunction(found) or inspect.isasyncgenfunction(found) or inspect.isgeneratorfunction(found):
        raise HandlerError(f"{target}: calling it only makes a coroutine or generator; a handler is a plain function loop(sock)")
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):
        return False  # a C function that tells nothing about itself
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named_second = [p.name for p in signature.parameters.values() if p.kind in positional][1:2]
    if _accepts(signature, 1) and named_second != ["conn"]:
        return False
    if _accepts(signature, 2):
        return True
    raise HandlerError(f"{target}{signature}: a handler is loop(sock) or loop(sock, conn)")


def _accepts(signature: inspect.Signature, arguments: int) -> bool:
    try:
        signature.bind(*[None] * arguments)
    except TypeError:
        return False
    return True


def what_was_raised(error: BaseException) -> str:
    """The traceback from the user's first frame on."""
    ours = (__file__, importlib.__file__)
    tb = error.__traceback__
    while tb is not None and (tb.tb_frame.f_code.co_filename in ours or "importlib._bootstrap" in tb.tb_frame.f_code.co_filename):
        tb = tb.tb_next
    return "".join(traceback.format_exception(type(error), error, tb)).rstrip()
