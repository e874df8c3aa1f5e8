"""Records of `logging`: user code's messages, each one entry of the log, with its level and its logger.

`LogHandler` is what the package offers. A fork server puts one on the root logger before the import, where it is as good as none:
a record that another handler takes is not logged here, and ``logging.basicConfig`` does not see it. Else a module's own set-up
would do nothing, in silence, or each of its lines would come twice. `logging` is imported in any case, by `prefork.system.forks`.
What this must not do: raise into user code for what can't be formatted.
"""

import contextlib
import functools
import logging
import sys
import traceback
from collections.abc import Callable
from typing import Any

from prefork import log
from prefork.log import Level

# What the arguments of basicConfig say of where records go, or how they look. All others say which ones do.
_PLACES = frozenset({"filename", "filemode", "stream", "handlers", "format", "datefmt", "style"})


class LogHandler(logging.Handler):
    """A handler of `logging` that writes to prefork's log: level and logger are told apart from the message, a traceback is whole.

    A formatter words the message. In a process that is none of a daemon's it writes to ``sys.stderr``.
    """

    def __init__(self, level: int | str = logging.NOTSET) -> None:
        super().__init__(level)
        self.setFormatter(logging.Formatter())  # basicConfig would give one that says level and logger once more

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record. Raises nothing of what goes wrong with it."""
        level, logged = _level(record.levelno), log.hears_user_code()
        if logged and not log.takes(level):
            return
        try:
            if self._is_anothers(record):
                return
            name, message = str(record.name), str(self.format(record))
        except Exception:  # whatever arguments, formatter or objects in them have raised
            name = "logging"
            message = f"a record of {record.pathname}:{record.lineno} can't be formatted\n{traceback.format_exc()}"
        if logged:
            log.record(level, name, message)
        elif sys.stderr is not None:
            with contextlib.suppress(OSError, ValueError):  # full, broken or closed
                sys.stderr.write(f"{message}\n")

    def _is_anothers(self, _record: logging.LogRecord) -> bool:
        """Whether another handler takes it."""
        return False


class _Default(LogHandler):
    """The root logger's own, as long as user code has given it none."""

    def _is_anothers(self, record: logging.LogRecord) -> bool:
        found = logging.root.manager.loggerDict.get(record.name)
        logger: logging.Logger | None = found if isinstance(found, logging.Logger) else logging.root
        while logger is not None:
            if any(other is not self and not isinstance(other, logging.NullHandler) for other in logger.handlers):
                return True
            logger = logger.parent if logger.propagate else None
        return False


def _level(number: int) -> Level:
    """What a level of `logging` is here: the next lower one of its four, CRITICAL is ERROR."""
    return max((level for level in Level if level <= number), default=Level.DEBUG)


_default = _Default()


def install(level: Level) -> None:
    """Take the records of user code that is about to be imported, from this level on, unless it says otherwise."""
    logging.lastResort = LogHandler(logging.WARNING)  # for loggers that do not propagate
    if logging.root.handlers:
        return  # of the program that has made the daemon (`prefork.Server`)
    logging.root.addHandler(_default)
    if logging.root.level == logging.WARNING:
        logging.root.setLevel(level)
    logging.basicConfig = _basic_config(logging.basicConfig)


def give_way() -> None:
    """Be gone where user code has given the root logger a handler, or taken ours away. Its level is then what Python's is."""
    if logging.root.handlers != [_default]:
        _withdraw()


def _withdraw() -> None:
    logging.root.removeHandler(_default)
    if isinstance(logging.root.level, Level):  # ours: user code has set none
        logging.root.setLevel(logging.WARNING)


def _basic_config(original: Callable[..., None]) -> Callable[..., None]:
    """``logging.basicConfig``, which ``logging.warning`` and its like call, too. Given a level only, it sets that."""

    @functools.wraps(original)
    def basic_config(**how: Any) -> None:
        if how.keys().isdisjoint(_PLACES):
            logging.root.removeHandler(_default)
            how["handlers"] = [_default]
        else:
            _withdraw()
        original(**how)

    return basic_config


# -- what the standard library writes to standard error by itself


def take_http_messages() -> None:
    """Have the handlers of http.server log what they write to standard error, each request in a line: it would be a warning.

    What a subclass, or user code in their place, does instead stays.
    """
    handlers = getattr(sys.modules.get("http.server"), "BaseHTTPRequestHandler", None)
    for name, level in (("log_message", Level.INFO), ("log_error", Level.WARNING)):
        if getattr(getattr(handlers, name, None), "__module__", None) == "http.server":
            setattr(handlers, name, _http_logger(level))


def _http_logger(level: Level) -> Callable[..., None]:
    def write(self: Any, format: str, *args: Any) -> None:  # noqa: A002 - it is called so
        log.record(level, "http.server", f"{self.address_string()} - {format % args}")

    return write
