"""What a process finishes at its end, as an interpreter does: what was registered for it, its children, logs, and files.

Libraries register once for the process (weakref.finalize, multiprocessing, the executors, logging), and a fork inherits that as
well as what was registered. So there are two borders: from the master to a fork server, which calls `begin`, and from this to its
workers, for which it calls `set_aside` before it forks them. Beyond each, libraries register anew, and what is there already is the
parent's alone; `finish` runs what belongs to this process, and no more.

What this must not do: import a library for its sake (whatever is not imported has registered nothing), wait for threads, or touch a
file that others wait for. CPython has no public way to most of this: each private name is looked up where it may be missing.
"""

import _io
import atexit
import gc
import logging
import os
import stat
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

# Classes of the standard library that finish a file when an object of theirs is destroyed: an interpreter's end does that.
_FINISHED_BY_DELETION = (
    ("tempfile", "_TemporaryFileCloser"),
    ("shelve", "Shelf"),
    ("dbm.dumb", "_Database"),
    ("zipfile", "ZipFile"),
    ("wave", "Wave_write"),
)
_NAME_LIMIT = 100
_FINALIZE: Any = weakref.finalize

# Weak references to what the import has made, which workers flush only: the fork server closes it.
_handlers: list[Any] = []
_files: list[Any] = []
# What has to be destroyed for its file to be whole, or gone: in this process, and in another one.
_ours: list[Any] = []
_theirs: list[Any] = []
# Weak references to handlers of the master's process, which are the master's.
_foreign: list[Any] = []


@dataclass(slots=True)
class Aside:
    """What `set_aside` has found."""

    registered: list[str]  # in words
    finalizers: list[Any]
    children: set[Any]
    threading: list[Callable[[], object]]
    owners: list[Any]  # of files that are whole only once these are destroyed


def begin() -> None:
    """In a fork's child, before user code: what is registered, and what waits in buffers, is the parent's."""
    files, owners = _unfinished()
    _reset(owners)
    atexit._clear()
    _theirs.extend([*files, *owners])
    _foreign[:] = logging._handlerList  # type: ignore[attr-defined]


def set_aside(failed: Callable[[str], None]) -> Aside:
    """Have libraries register anew in children. atexit's own functions stay: `atexit._clear` is for the child.

    ``failed``: as of `finish`.
    """
    files, owners = _unfinished()
    aside = _reset(owners)
    _theirs.extend(owners)
    _handlers[:] = logging._handlerList  # type: ignore[attr-defined]
    _files[:] = [weakref.ref(file) for file in files]
    for file in files:
        _flush(file, failed)  # else each worker would write it once more
    return aside


def _reset(owners: list[Any]) -> Aside:
    aside = Aside(_registered(owners), _finalizers(), set(), _threading_functions(), owners)
    for finalizer in aside.finalizers:
        finalizer.atexit = False
    _FINALIZE._registered_with_atexit = False
    if (processes := _module("multiprocessing.process")) is not None:
        aside.children, processes._children = processes._children, set()
    getattr(threading, "_threading_atexits", []).clear()
    return aside


def put_back(aside: Aside, is_child: Callable[[int], bool]) -> None:
    """Let `finish` run what was set aside, in the process that it was registered in."""
    for finalizer in aside.finalizers:
        finalizer.atexit = True
    if (processes := _module("multiprocessing.process")) is not None:
        # Those that have ended were reaped without it, and their numbers may be another process' by now. Those that are no daemons
        # would be waited for.
        processes._children |= {child for child in aside.children if child.daemon and is_child(child.pid)}
    getattr(threading, "_threading_atexits", []).extend(aside.threading)
    _ours[:] = aside.owners
    _handlers.clear()


def finish(failed: Callable[[str], None]) -> None:
    """Run what was registered here, in an interpreter's order. ``failed`` is called while the exception of a step is handled."""
    steps: Iterable[tuple[str, Callable[[], object]]] = (
        *(("threading", function) for function in reversed(_threading_functions()) if not _is_an_executors(function)),
        ("concurrent.futures", getattr(_module("concurrent.futures.process"), "_python_exit", _nothing)),
        ("atexit", atexit._run_exitfuncs),
        ("multiprocessing", getattr(_module("multiprocessing.util"), "_exit_function", _nothing)),
        ("logging", _finish_logging),
        ("files", partial(_finish_files, failed)),
    )
    for what, step in steps:
        try:
            step()
        except BaseException:
            failed(what)


def _nothing() -> None:
    """Nothing."""


def _module(name: str) -> Any:
    return sys.modules.get(name)


# -- what is registered


def _registered(owners: Iterable[Any]) -> list[str]:
    """What was registered here for the end, in words; nothing of what libraries register for themselves alone."""
    named = [f"atexit {_name(function)}" for function in _exit_functions() if not _is_a_librarys(function)]
    for finalizer in _finalizers():
        found = finalizer.peek()
        named += [f"weakref.finalize {_name(found[1])} of {type(found[0]).__name__}"] if found else []
    for (priority, _), finalizer in list(getattr(_module("multiprocessing.util"), "_finalizer_registry", {}).items()):
        if priority is not None and getattr(finalizer, "_pid", None) == os.getpid():
            named.append(f"multiprocessing {_name(getattr(finalizer, '_callback', finalizer))}")
    named += [f"threading {_name(function)}" for function in _threading_functions() if not _is_an_executors(function)]
    temporary = getattr(_module("tempfile"), "_TemporaryFileCloser", None)
    named += [f"temporary file {file.name}" for file in owners if type(file) is temporary and file.delete]
    return named


class _Listener:
    """Compared with each function of atexit, it is equal to none, and remembers them: there is no other way to see them."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def __eq__(self, other: object) -> bool:
        self.heard.append(other)
        return False

    __hash__ = None  # type: ignore[assignment]


def _exit_functions() -> list[Any]:
    listener = _Listener()
    atexit.unregister(listener)  # type: ignore[arg-type]
    return listener.heard


def _is_a_librarys(function: Any) -> bool:
    """Whether it only runs what else was registered with a library."""
    known = [logging.shutdown, _FINALIZE._exitfunc, getattr(_module("multiprocessing.util"), "_exit_function", None)]
    return any(type(function) is type(one) and function == one for one in known)


def _finalizers() -> list[Any]:
    return [finalizer for finalizer in list(_FINALIZE._registry) if finalizer.atexit]


def _threading_functions() -> list[Callable[[], object]]:
    return list(getattr(threading, "_threading_atexits", []))


def _is_an_executors(function: Any) -> bool:
    """Whether it waits for the threads of executors: those that manage processes are waited for by name, others are not."""
    inner = _inner(function)
    executors = ("concurrent.futures.thread", "concurrent.futures.process")
    return any(inner is getattr(_module(name), "_python_exit", _nothing) for name in executors)


def _inner(function: Any) -> Any:
    """What a partial calls, or what threading has registered: a partial there, from 3.13 on a function of its own."""
    if type(function) is partial:
        return function.func
    if type(function) is FunctionType and function.__qualname__ == "_register_atexit.<locals>.<lambda>":
        return dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))["func"].cell_contents
    return function


def _name(function: Any) -> str:
    """Of user code's object, which may lie or raise."""
    try:
        inner = _inner(function)
        name = getattr(inner, "__qualname__", None) or type(inner).__qualname__
        return f"{getattr(inner, '__module__', None) or type(inner).__module__}.{name}"[:_NAME_LIMIT]
    except BaseException:
        return type(function).__name__


# -- logs and files


def _finish_logging() -> None:
    """As `logging.shutdown`, but what was inherited is flushed and stays open, and a thread that is writing is not waited for."""
    inherited, foreign = {id(reference) for reference in _handlers}, {id(reference) for reference in _foreign}
    for reference in reversed(list(logging._handlerList)):  # type: ignore[attr-defined]
        handler = reference()
        lock = getattr(handler, "lock", None)
        if handler is None or id(reference) in foreign or (lock is not None and not lock.acquire(blocking=False)):
            continue
        try:
            if getattr(handler, "flushOnClose", True):
                handler.flush()
            if id(reference) not in inherited:
                handler.close()
        except (OSError, ValueError):
            pass  # its stream was closed before, as logging.shutdown has it
        finally:
            if lock is not None:
                lock.release()


def _finish_files(failed: Callable[[str], None]) -> None:
    """Write what waits in buffers. Of files on disk: a pipe can have us wait."""
    own_files, own = _unfinished()
    files = [*own_files, *(reference() for reference in _files)]
    # Outer ones first: what they hold goes to the inner ones.
    for file in (file for file in files if issubclass(type(file), _io._TextIOBase)):
        _flush(file, failed)
    for owner in (*_ours, *own):
        try:
            owner.__del__()
        except BaseException:
            failed("files")
    for file in files:
        _flush(file, failed)


def _flush(file: Any, failed: Callable[[str], None]) -> None:
    try:
        if file is not None and not file.closed:
            file.flush()
    except ValueError:
        return  # the file under it was closed
    except OSError:  # a full disk: what waits in the buffer is lost
        failed("files")


def _unfinished() -> tuple[list[Any], list[Any]]:
    """Files on disk that may have something in their buffers, and what has to be destroyed for its file to be whole, or gone:
    archives, compressed and temporary files.

    As far as the collector sees them: not what was there before the fork (`gc.freeze`).
    """
    objects = gc.get_objects()
    classes = list(map(type, objects))
    known = dict(zip(map(id, classes), classes, strict=True))  # a class may have an __eq__ of its own
    deleted = [getattr(_module(module), name, None) for module, name in _FINISHED_BY_DELETION]
    files = {number for number, cls in known.items() if _io._IOBase in cls.__mro__ and cls is not _io.FileIO}
    wanted = files | {number for number, cls in known.items() if any(one in cls.__mro__ for one in deleted)}
    found = [one for one, number in zip(objects, map(id, classes), strict=True) if number in wanted]
    found = [one for one in found if not any(one is other for other in _theirs)]
    on_disk = [one for one in found if id(type(one)) in files and _is_on_disk(one)]
    # Classes of Python finish their files when they are closed, which their deletion does.
    owners = [one for one in found if id(type(one)) not in files] + [one for one in on_disk if type(one).__module__ != "_io"]
    return [one for one in on_disk if type(one).__module__ == "_io"], owners


def _is_on_disk(file: Any) -> bool:
    """Whether it can be written, and to a file."""
    try:
        return file.writable() and stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    except Exception:
        return False  # closed, or made of no file
