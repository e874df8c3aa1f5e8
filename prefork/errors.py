"""Error types, each with the exit code that the command line ends with.

A message names the value, where it came from, and what would be right. Whose fault it is decides the type: the
configuration's or handler's (78), the machine's (69, 77), the moment's (1), ours (70).

What the kernel answers has one table, too: `explained`.
"""

import errno

_MEMORY = "see the memory that is left, memory.max and vm.overcommit_memory"
_SANDBOX = "a sandbox forbids {call}: allow it (SystemCallFilter= in a unit, seccomp in a container)"
_FAMILY = "a sandbox forbids sockets of that family: allow it (RestrictAddressFamilies= in a unit)"
# What helps where a system call has failed; a message that knows more of the place says that. What can be meant in this program:
# EAGAIN is fork(2)'s, EPERM and EACCES without a path are a sandbox's (or a capability's), ENOSPC epoll_ctl(2)'s or a disk's.
REMEDIES: dict[int | None, str] = {
    errno.EAGAIN: "see RLIMIT_NPROC (ulimit -u), pids.max and kernel.threads-max",
    errno.ENOMEM: _MEMORY,
    errno.ENOBUFS: _MEMORY,
    errno.EMFILE: "see RLIMIT_NOFILE (ulimit -n)",
    errno.ENFILE: "see fs.file-max",
    errno.ENOSPC: "see the room on the disk, and fs.epoll.max_user_watches",
    errno.EDQUOT: "see the user's quota",
    errno.EFBIG: "see RLIMIT_FSIZE (ulimit -f)",
    errno.EROFS: "the file system is mounted read-only there",
    errno.EPERM: _SANDBOX,
    errno.EACCES: _SANDBOX,
    errno.ENOSYS: _SANDBOX,
    errno.EAFNOSUPPORT: _FAMILY,
    errno.EPROTONOSUPPORT: _FAMILY,
}
# Functions of Python whose system call has another name.
_NAMES = {
    "register": "epoll_ctl",
    "modify": "epoll_ctl",
    "nice": "setpriority",
    "part": "setpgid or setsid",
    "getrlimit": "prlimit64",
}


def explained(error: OSError, otherwise: str | None = None) -> str:
    """What the kernel has said, and what helps; ``otherwise`` where the table does not know."""
    remedy = REMEDIES.get(error.errno)
    if error.filename is not None and error.errno in (errno.EPERM, errno.EACCES):
        remedy = None  # of a path it is the mode that forbids it
    remedy = otherwise if remedy is None else remedy.format(call=call_of(error) or "it")
    reason = error.strerror or str(error)
    return reason if remedy is None else f"{reason}: {remedy}"


def call_of(error: OSError) -> str | None:
    """The function that prefork had called when this was raised: an OSError does not say which system call it was.

    By the bytecode, as the source may be another version's by now. None where that has no columns (``-X no_debug_ranges``).
    """
    where, found = error.__traceback__, None
    while where is not None:
        if where.tb_frame.f_globals.get("__name__", "").startswith("prefork."):
            found = where
        where = where.tb_next
    if found is None:
        return None
    import dis  # noqa: PLC0415 - 0.3 MB that only errors need

    code, at, name = found.tb_frame.f_code, found.tb_lasti, None
    line, _, column, _ = list(code.co_positions())[at // 2]  # one for each two bytes (PEP 657)
    steps = [step for step in dis.get_instructions(code) if step.offset <= at]
    if not steps[-1].opname.startswith("CALL"):
        return code.co_name.strip("_")  # it has raised this itself, of a call by ctypes
    for step in steps:
        begin = step.positions is not None and (step.positions.lineno, step.positions.col_offset)
        if step.opname.startswith("LOAD_") and begin == (line, column) and column is not None:
            name = _NAMES.get(step.argval, str(step.argval))
    return name


class PreforkError(Exception):
    """Any error that prefork raises on purpose; itself where the process that reads the command line had a bug (70)."""

    exit_code = 70


class RefusedError(PreforkError):
    """A command was understood and refused, or failed: nothing has changed."""

    exit_code = 1


class AddressError(PreforkError):
    """An address can't be bound, or belongs to another process."""

    exit_code = 69


class InUseError(AddressError):
    """A live process has it."""


class NotPermittedError(PreforkError):
    """The operating system does not allow it to this user."""

    exit_code = 77


class ConfigError(PreforkError):
    """A setting is unusable. The message names key, value, place and remedy."""

    exit_code = 78


class HandlerError(PreforkError):
    """The handler can't be imported or used; the message ends with its traceback when it raised one."""

    exit_code = 78
