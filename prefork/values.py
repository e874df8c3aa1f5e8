"""The types of settings: from text or a TOML value to a Python value, and back to the text that a user would write.

A parser takes what stands in the file, in the environment or on the command line, and raises ValueError with what would be
right. Pure: nothing is looked up, opened or resolved here.
"""

import re
import resource
from collections.abc import Callable
from typing import Any

from prefork.net import address
from prefork.net.address import Address

# Each address has workers of its own, and is looked at by the master in turn. As many can be passed by systemd.
ADDRESSES_LIMIT = 1024
# Thirty years: everything longer is a mistake, and a float stays exact to the microsecond.
SECONDS_LIMIT = 1e9
# An exabyte: more than any kernel counts, and still an exact number of bytes.
BYTES_LIMIT = 1 << 60
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
_SIZES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SWITCH = {"on": True, "true": True, "yes": True, "1": True, "off": False, "false": False, "no": False, "0": False}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
# setrlimit(2), by the names that Python has for them: nofile, as, cpu, ...
RLIMITS = {name.removeprefix("RLIMIT_").lower(): getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")}
# A worker needs its standard descriptors, listener, doorbell, connection, and the files that an import opens one by one.
NOFILE_LEAST = 16


def text(value: Any) -> str:
    """Any text that is not empty."""
    if not isinstance(value, str) or not value:
        raise ValueError("must not be empty" if value == "" else "must be text")
    return value


def whole(low: int, high: int) -> Callable[[Any], int]:
    """A whole number within bounds, which are both allowed."""

    def parse(value: Any) -> int:
        if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,10}", value):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return value

    return parse


def seconds(value: Any) -> float:
    """A duration."""
    if isinstance(value, str) and (match := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smh]?)", value)):
        value = float(match[1]) * _UNITS[match[2]]
    # Not a number (nan) fails both comparisons.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= SECONDS_LIMIT:
        raise ValueError("must be a duration, 0 to 1e9 seconds: 1.5, 30s, 5m or 1h")
    return float(value)


def positive_seconds(value: Any) -> float:
    """A duration that is not nothing."""
    found = seconds(value)
    if found == 0:
        raise ValueError("must be more than 0 seconds")
    return found


def size(value: Any) -> int:
    """Bytes."""
    if isinstance(value, str) and (match := re.fullmatch(r"([0-9]{1,19})([KMGT]?)", value)):
        value = int(match[1]) * _SIZES[match[2]]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= BYTES_LIMIT:
        raise ValueError("must be a size in bytes: 1048576, 512K, 256M or 2G")
    return value


def switch(value: Any) -> bool:
    """On or off."""
    word = str(value).lower() if isinstance(value, str | bool) else ""
    if word not in _SWITCH:
        raise ValueError("must be on or off")
    return _SWITCH[word]


def choice(*choices: str) -> Callable[[Any], str]:
    """One of these words."""

    def parse(value: Any) -> str:
        value = value.lower() if isinstance(value, str) else value
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return str(value)

    return parse


def target(value: Any) -> str:
    """Something to import and call: MODULE:ATTR."""
    module, colon, attribute = text(value).partition(":")
    if not colon or not all(part.isidentifier() for part in [*module.split("."), *attribute.split(".")]):
        raise ValueError("must be MODULE:ATTR, like echo:loop")
    return str(value)


def addresses(value: Any) -> tuple[Address, ...]:
    """Where to listen; in text several are separated by commas."""
    texts = value.split(",") if isinstance(value, str) else list(value) if isinstance(value, list | tuple) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError("must be an address, or a list of addresses")
    if len(texts) > ADDRESSES_LIMIT:
        raise ValueError(f"{len(texts)} addresses: at most {ADDRESSES_LIMIT}, as each has workers of its own")
    found: list[Address] = []
    claims = address.Claims()
    for written in texts:
        try:
            parsed = address.parse(written)
        except ValueError as error:
            raise ValueError(f"{written!r}: {error}") from None
        if (other := claims.add(parsed)) is not None:
            clash = "is named twice" if parsed.place == other.place else f"needs the port of {str(other)!r}"
            raise ValueError(f"{written!r} {clash}")
        found.append(parsed)
    return tuple(found)


def resolve_addresses(found: tuple[Address, ...], folder: str) -> tuple[Address, ...]:
    """With the paths of Unix sockets absolute that were given in a folder. Raises ValueError when one is too long then."""
    return tuple(address.resolve(one, folder) for one in found)


def name(value: Any) -> str:
    """An instance's name: it becomes a file name."""
    if not _NAME.fullmatch(text(value)):
        raise ValueError("must be letters, digits, '.', '_' and '-', at most 64")
    return str(value)


def account(value: Any) -> str:
    """A user or group, by name or number; whether it exists is asked at the start."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    try:
        return address.account(text(value))
    except ValueError:
        raise ValueError("must be a name or a number, like www-data or 33") from None


def path(*words: str) -> Callable[[Any], str]:
    """A path, or one of these words. Beside words a path has a slash in it: a mistyped word is none."""
    meant = " or ".join(["a path with a / in it (/log, ./log)", *words]) if words else "a path"

    def parse(value: Any) -> str:
        found = text(value)
        if found not in words and (not found.isprintable() or len(found) > 4095 or (words and "/" not in found)):
            raise ValueError(f"must be {meant}")
        return found

    return parse


def resolve_path(*words: str) -> Callable[[str, str], str]:
    """What makes a path absolute that was given in a folder; these words stay. It raises ValueError when that is no path then."""
    check = path(*words)

    def resolve(found: str, folder: str) -> str:
        return found if found in ("", *words) else check(address.join(folder, found))

    return resolve


def socket_path(value: Any) -> str:
    """Where a Unix socket can be bound, or off."""
    found = text(value)
    if found != "off":
        if "/" not in found:
            raise ValueError("must be a path with a / in it (/run/control, ./control), or off")
        address.check_path(found)
    return found


def resolve_socket_path(found: str, folder: str) -> str:
    """The same, absolute. Raises ValueError when it is too long then."""
    return found if found in ("", "off") else address.check_path(address.join(folder, found))


def umask(value: Any) -> int:
    """Permission bits, octal as everywhere in Unix. Only as text: TOML would read the number 27 as something else."""
    if not isinstance(value, str) or not re.fullmatch(r"[0-7]{1,4}", value) or int(value, 8) > 0o777:
        raise ValueError('must be octal text, "000" to "777", like "027"')
    return int(value, 8)


def rlimits(value: Any) -> tuple[tuple[str, int], ...]:
    """Limits of setrlimit(2), as ``nofile=1024,as=512M``: pairs of name and number, -1 for unlimited."""
    texts = value.split(",") if isinstance(value, str) else list(value) if isinstance(value, list | tuple) else []
    found: dict[str, int] = {}
    for one in texts:
        key, equals, limit = one.partition("=") if isinstance(one, str) else ("", "", "")
        if not equals or key not in RLIMITS:
            raise ValueError(f"must be like nofile=1024,as=512M,cpu=60; there are {', '.join(sorted(RLIMITS))}")
        if key in found:
            raise ValueError(f"{key} is named twice")
        try:
            found[key] = resource.RLIM_INFINITY if limit == "unlimited" else size(limit)
        except ValueError:
            raise ValueError(f"{key} must be a number, a size like 512M, or unlimited") from None
        if key == "nofile" and 0 <= found[key] < NOFILE_LEAST:
            raise ValueError(f"nofile must be at least {NOFILE_LEAST}: a worker needs that many to run at all")
    if not found:
        raise ValueError("must be like nofile=1024,as=512M,cpu=60")
    return tuple(found.items())


# -- and back


def seconds_text(value: float) -> str:
    """A duration as `seconds` takes it."""
    return f"{value:.15g}"


def size_text(value: int) -> str:
    """A size as `size` takes it, in the largest unit that divides it."""
    unit = next((unit for unit in "TGMK" if value and value % _SIZES[unit] == 0), "")
    return f"{value // _SIZES[unit]}{unit}"


def rlimits_text(value: tuple[tuple[str, int], ...]) -> str:
    """Limits as `rlimits` takes them."""
    return ",".join(f"{key}={'unlimited' if limit == resource.RLIM_INFINITY else size_text(limit)}" for key, limit in value)
