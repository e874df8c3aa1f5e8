"""Error types, each with the exit code that the command line ends with.

A message names the value, where it came from, and what would be right. Whose fault it is decides the type: the
configuration's or handler's (78), the machine's (69, 77), the moment's (1), ours (70).
"""


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
