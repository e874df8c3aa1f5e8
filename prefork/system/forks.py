"""What runs in the child of a fork: less in a worker, which is forked from a process of one thread, than in a handler's child.

Whatever a child touches becomes memory of its own, page by page. Functions that `os.register_at_fork` knows run in each child;
those of `threading` and `logging`, which is to say of every program, give it fresh locks, because a thread that was not copied may
hold the old ones. Where there is one thread nobody does, and that would cost each worker 270 KiB (measured; an idle one has 600
without). So they are left out at the birth of a worker, and are there again for what its handler forks.

CPython keeps these functions in a list that only the garbage collector shows. Where it is not found (another interpreter, an
import that has called `gc.freeze`), or there are more threads, everything runs in every child, as anywhere.
"""

import gc
import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

_THREADING: Any = getattr(threading, "_after_fork", None)
_LOGGING: Any = getattr(logging, "_after_at_fork_child_reinit_locks", None)

_in_any_child: list[Callable[[], object]] = []
_can_spare = _sparing = False
_logging_lock: Any = None  # taken by `logging` before a fork, for the parent and the child


def in_child(function: Callable[[], object]) -> None:
    """From now on call this in the child of each fork that spares nothing, in turn, before what user code has registered."""
    if not _in_any_child:
        os.register_at_fork(after_in_child=_after_fork)
    _in_any_child.append(function)


def prepare_to_spare() -> None:
    """Let forks of this process spare what they have no use for: it has one thread, and runs no user code any more."""
    global _can_spare, _logging_lock
    try:
        threads = len(os.listdir("/proc/self/task"))
    except OSError:  # without /proc nobody knows
        return
    if threads > 1:
        return
    for hooks in gc.get_referrers(_after_fork):
        if type(hooks) is not list or not any(hook is _THREADING for hook in hooks):
            continue
        resets = [hook for hook in hooks if hook is _THREADING or hook is _LOGGING]
        hooks[:] = [_after_fork, *(hook for hook in hooks if not any(hook is other for other in (*resets, _after_fork)))]
        _in_any_child[:0] = resets
        if _LOGGING in resets:
            _logging_lock = logging._lock  # type: ignore[attr-defined]
        _can_spare = True
        return


def spare(*, everything: bool) -> None:
    """Whether the next forks spare all that they can, or nothing. Their children's own forks spare nothing."""
    global _sparing
    _sparing = everything and _can_spare


def _after_fork() -> None:
    global _sparing
    if _sparing:
        _sparing = False
        if _logging_lock is not None:
            _logging_lock.release()
        return
    for function in _in_any_child:
        try:
            function()
        except BaseException:  # as CPython does: the others run nevertheless
            sys.excepthook(*sys.exc_info())
