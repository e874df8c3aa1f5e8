"""Every setting: its default, its type, its help, its validation. The one place where an option is added.

A field of `Config` is an option: ``max_workers`` in the TOML file, ``--max-workers`` on the command line,
``PREFORK_MAX_WORKERS`` in the environment. Command line beats environment beats file beats default.

The file is flat TOML, at most 1 MB (tomllib took 6.6 s for 10 MB, and the master reads it at a reload while it should be
supervising). Parsing asks nobody and opens nothing but that file.
"""

import difflib
import os
import re
import stat
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from prefork.errors import ConfigError
from prefork.net import address
from prefork.net.address import Address

FILE_LIMIT = 1_000_000
# A slot number has to fit in 32 bits on the wire; a machine's pid_max is at most 2**22.
WORKERS_LIMIT = 1 << 20
# Thirty years: everything longer is a mistake, and a float stays exact to the microsecond.
SECONDS_LIMIT = 1e9
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True)
class Option:
    """How an option is read and explained. ``parse`` takes text or a TOML value and raises ValueError with what would be right."""

    parse: Callable[[Any], Any]
    help: str
    metavar: str
    reloadable: bool = True
    short: str | None = None
    multiple: bool = False


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("must be text")
    return value


def _whole(low: int, high: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return value

    return parse


def _seconds(value: Any) -> float:
    if isinstance(value, str) and (match := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smh]?)", value)):
        value = float(match[1]) * _UNITS[match[2]]
    # Not a number (nan) fails both comparisons.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= SECONDS_LIMIT:
        raise ValueError("must be a duration, 0 to 1e9 seconds: 1.5, 30s, 5m or 1h")
    return float(value)


def _positive_seconds(value: Any) -> float:
    seconds = _seconds(value)
    if seconds == 0:
        raise ValueError("must be more than 0 seconds")
    return seconds


def _module(value: Any) -> str:
    module, colon, attribute = _text(value).partition(":")
    if not colon or not all(part.isidentifier() for part in [*module.split("."), *attribute.split(".")]):
        raise ValueError("must be MODULE:ATTR, like echo:loop")
    return str(value)


def _addresses(value: Any) -> tuple[Address, ...]:
    # In the environment several are separated by commas.
    texts = value.split(",") if isinstance(value, str) else list(value) if isinstance(value, list | tuple) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError("must be an address, or a list of addresses")
    found: list[Address] = []
    for text in texts:
        try:
            parsed = address.parse(text)
        except ValueError as error:
            raise ValueError(f"{text!r}: {error}") from None
        if any(parsed.same_place(other) for other in found):
            raise ValueError(f"{text!r} is named twice")
        found.append(parsed)
    return tuple(found)


def _name(value: Any) -> str:
    if not _NAME.fullmatch(_text(value)):
        raise ValueError("must be letters, digits, '.', '_' and '-', at most 64")
    return str(value)


def _control(value: Any) -> str:
    text = _text(value)
    if text != "off":
        try:
            address.check_path(text)
        except ValueError as error:
            raise ValueError(f"must be an absolute path, or off ({error})") from None
    return text


def _choice(*choices: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        value = value.lower() if isinstance(value, str) else value
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return str(value)

    return parse


def _option(default: Any, parse: Callable[[Any], Any], help: str, metavar: str, **more: Any) -> Any:  # noqa: A002 - click's word
    return field(default=default, metadata={"option": Option(parse, help, metavar, **more)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The effective configuration. Durations are seconds. Made by `load`; every value has been validated."""

    module: str = _option(
        "", _module, "The handler: MODULE:ATTR, imported with the working directory first on the path.", "MODULE:ATTR"
    )
    bind: tuple[Address, ...] = _option(
        (Address(2, "127.0.0.1", 7000),),
        _addresses,
        "Where to listen: HOST:PORT, :PORT, [IPV6]:PORT or unix:/path?mode=0660. Repeatable; port 0 is a free port.",
        "ADDRESS",
        short="-b",
        multiple=True,
    )
    workers: int = _option(8, _whole(1, WORKERS_LIMIT), "Processes kept waiting in accept(), for each listener.", "N", short="-w")
    max_workers: int = _option(
        256, _whole(1, WORKERS_LIMIT), "Ceiling on worker processes of this daemon; at it, clients wait in the queue.", "N"
    )
    spare_timeout: float = _option(10.0, _positive_seconds, "How long surplus acceptors are kept.", "SECONDS")
    backlog: int = _option(2048, _whole(1, (1 << 31) - 1), "The listen queue (the kernel cuts it to net.core.somaxconn).", "N")
    boot_timeout: float = _option(
        60.0, _positive_seconds, "How long the handler's import, and a worker's start, may take.", "SECONDS"
    )
    drain_timeout: float = _option(
        0.0, _seconds, "How long workers retired by a reload or scaling may finish; 0 is as long as they take.", "SECONDS"
    )
    graceful_timeout: float = _option(30.0, _seconds, "How long connections may finish at stop.", "SECONDS")
    name: str = _option("", _name, "The instance's name; the handler's module unless said.", "NAME", reloadable=False)
    control: str = _option(
        "", _control, "Path of the control socket; off for none; in the runtime directory unless said.", "PATH", reloadable=False
    )
    log_level: str = _option("info", _choice(*LOG_LEVELS), f"The least that is logged: {', '.join(LOG_LEVELS)}.", "LEVEL")

    @property
    def instance(self) -> str:
        """The instance's name."""
        return self.name or self.module.partition(":")[0]


OPTIONS: dict[str, Option] = {f.name: f.metadata["option"] for f in fields(Config)}


def flag(key: str) -> str:
    """The option's name on the command line."""
    return "--" + key.replace("_", "-")


def variable(key: str) -> str:
    """The option's name in the environment."""
    return "PREFORK_" + key.upper()


@dataclass(frozen=True, slots=True)
class Sources:
    """Where settings are read from: kept by the master, so that a reload reads the same places again."""

    command_line: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    file: str | None = None

    def load(self) -> Config:
        """The effective configuration. Raises ConfigError naming key, value, place and remedy."""
        values: dict[str, Any] = {}
        if self.file is not None:
            for key, raw in _read_file(self.file).items():
                values[key] = _parse(key, raw, f"in {self.file}", tuple(OPTIONS))
        for key in OPTIONS:
            if (raw := self.environment.get(variable(key))) is not None:
                values[key] = _parse(key, raw, f"in the environment ({variable(key)})", tuple(OPTIONS))
        for key, raw in self.command_line.items():
            values[key] = _parse(key, raw, f"on the command line ({flag(key)})", tuple(OPTIONS))
        config = Config(**values)
        _check(config)
        return config


def _read_file(path: str) -> dict[str, Any]:
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ConfigError(f"{path}: can't read the configuration: not a regular file")
            data = os.read(fd, FILE_LIMIT + 1)
        finally:
            os.close(fd)
        if len(data) > FILE_LIMIT:
            raise ConfigError(f"{path}: larger than {FILE_LIMIT} bytes; a configuration is a few lines of TOML")
        return tomllib.loads(data.decode())
    except OSError as error:
        raise ConfigError(f"{path}: can't read the configuration: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 (byte {error.start}); TOML is UTF-8 text") from None
    except ValueError as error:  # TOMLDecodeError is one; a number of thousands of digits is another
        raise ConfigError(f"{path}: not TOML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply; the configuration is flat") from None


def _parse(key: str, raw: Any, place: str, known: tuple[str, ...]) -> Any:
    option = OPTIONS.get(key)
    if option is None:
        near = difflib.get_close_matches(key, known, 1)
        remedy = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        raise ConfigError(f"unknown option {key!r} {place}: {remedy}")
    try:
        return option.parse(raw)
    except ValueError as error:
        raise ConfigError(f"{key} = {_shown(raw)} {place}: {error}") from None


def _shown(raw: Any) -> str:
    try:
        text = repr(raw)
    except (ValueError, RecursionError):  # a number of thousands of digits, a table thousands deep
        return f"(a huge {type(raw).__name__})"
    return text if len(text) <= 200 else text[:200] + "..."


def _check(config: Config) -> None:
    if not config.module:
        raise ConfigError("no handler: give --module MODULE:ATTR, like --module echo:loop, or module in the configuration file")
    least = config.workers * len(config.bind)
    if config.max_workers < least:
        raise ConfigError(
            f"max_workers = {config.max_workers} is less than workers x listeners = {config.workers} x {len(config.bind)} = "
            f"{least}: raise max_workers to at least {least}, or lower workers"
        )


def needs_restart(old: Config, new: Config) -> str | None:
    """The first option that a reload can't change and that differs; None when a reload will do."""
    for key, option in OPTIONS.items():
        if not option.reloadable and getattr(old, key) != getattr(new, key):
            return key
    return None


def unknown_variables(variables: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Names in the environment that look like options and are none, each with what may have been meant."""
    known = [variable(key) for key in (*OPTIONS, "config")]
    for name in variables:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            yield name, f"did you mean {near[0]}?" if near else "prefork serve --help shows all"


def environment() -> dict[str, str]:
    """The part of this process's environment that is configuration."""
    return {key: value for key, value in os.environ.items() if key.startswith("PREFORK_")}
