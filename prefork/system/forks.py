"""What runs in the child of a fork: less in a worker, which is forked from a process of one thread, than in a handler's child.

Whatever a child touches becomes memory of its own, page by page. Functions that `os.register_at_fork` knows run in each child;
those of `threading` and `logging`, which is to say of every program, give it fresh locks, because a thread that was not copied may
hold the old ones. Where there is one thread nobody does, and that would cost each worker 270 KiB (measured: a quarter of what an
idle one has). So they are left out at the birth of a worker, and are there again for what its handler forks.
"""

import gc
import logging
import os
import threading
from collections.abc import Callable

# CPython's own, by the names it has for them. The list that it keeps them in is found by what is in it; where it is not found,
# everything runs in every child, as anywhere.
_LOCK_RESETS = (getattr(threading, "_after_fork", None), getattr(logging, "_after_at_fork_child_reinit_locks", None))
_logging_lock: threading.RLock = logging._lock  # type: ignore[attr-defined]

_in_any_child: list[Callable[[], object]] = []
_bearing = False
_logging_is_spared = False


def in_child(function: Callable[[], object]) -> None:
    """From now on call this in the child of each fork, but for a worker at its birth."""
    if not _in_any_child:
        os.register_at_fork(after_in_child=_after_fork)
    _in_any_child.append(function)


def bear_workers() -> None:
    """From now on this process, which has one thread, forks workers, and they whatever they like."""
    global _bearing, _logging_is_spared
    _bearing = True
    try:
        threads = len(os.listdir("/proc/self/task"))
    except OSError:  # without /proc nobody knows
        return
    if threads > 1:
        return
    for hooks in gc.get_referrers(_after_fork):
        if type(hooks) is not list:
            continue
        resets = [hook for hook in hooks if hook in _LOCK_RESETS]
        hooks[:] = [_after_fork, *(hook for hook in hooks if hook not in resets and hook is not _after_fork)]
        _in_any_child[:0] = resets
        _logging_is_spared = _LOCK_RESETS[1] in resets


def _after_fork() -> None:
    global _bearing
    if not _bearing:
        for function in _in_any_child:
            function()
        return
    _bearing = False
    if _logging_is_spared:
        _logging_lock.release()  # taken before the fork, for the parent and the child
