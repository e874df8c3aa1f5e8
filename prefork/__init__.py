"""prefork: run a blocking Python network handler in production.

You write ``loop(sock)``; ``prefork serve --module echo:loop`` is everything between the socket and that function.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefork.errors import (
        AddressError,
        ConfigError,
        HandlerError,
        InUseError,
        NotPermittedError,
        PreforkError,
        RefusedError,
    )
    from prefork.handler import Connection, current
    from prefork.log.records import LogHandler
    from prefork.server import Server

__version__ = "0.1.0"
__all__ = [
    "AddressError",
    "ConfigError",
    "Connection",
    "HandlerError",
    "InUseError",
    "LogHandler",
    "NotPermittedError",
    "PreforkError",
    "RefusedError",
    "Server",
    "__version__",
    "current",
]


def __getattr__(name: str) -> Any:
    # Imported when asked for: the commands import this package and have no use for what belongs to handlers.
    if name in ("Connection", "current"):
        from prefork import handler  # noqa: PLC0415

        return getattr(handler, name)
    if name == "LogHandler":
        from prefork.log.records import LogHandler  # noqa: PLC0415

        return LogHandler
    if name == "Server":
        from prefork.server import Server  # noqa: PLC0415

        return Server
    if name.endswith("Error") and name in __all__:
        from prefork import errors  # noqa: PLC0415

        return getattr(errors, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
