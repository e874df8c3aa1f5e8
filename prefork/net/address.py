"""Addresses as users write them, and back: ``HOST:PORT``, ``:PORT``, ``[::1]:PORT``, ``unix:/path?mode=0660``.

Parsing asks nobody: a host is numeric or ``localhost``. A name could mean another machine at each reload, and looking it up
would block the master.
"""

import ipaddress
import re
import socket
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

# sun_path is 108 bytes with its NUL (unix(7)); a socket is bound under a temporary name that is TEMPORARY_NAME bytes longer.
UNIX_PATH_LIMIT = 107
TEMPORARY_NAME = 5
DEFAULT_MODE = 0o600
_MAPPED = "::ffff:"


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen. For a Unix socket ``host`` is its path and ``mode`` its permission bits."""

    family: int
    host: str
    port: int = 0
    mode: int = DEFAULT_MODE

    def same_place(self, other: "Address") -> bool:
        """Whether both can't be listened on at once; two free ports (0) can."""
        here, there = (self.family, self.host, self.port), (other.family, other.host, other.port)
        return here == there and (self.port != 0 or self.family == socket.AF_UNIX)

    @property
    def text(self) -> str:
        """As a user writes it, parameters included."""
        return f"{self}?mode={self.mode:04o}" if self.family == socket.AF_UNIX and self.mode != DEFAULT_MODE else str(self)

    def __str__(self) -> str:
        if self.family == socket.AF_UNIX:
            return f"unix:{self.host}"
        if self.family == socket.AF_INET6:
            return f"[{self.host}]:{self.port}" if self.host != "" else f":{self.port}"
        return f"{self.host}:{self.port}"


def parse(text: str) -> Address:
    """The address that ``text`` names. Raises ValueError saying what would be right."""
    if text.startswith("unix:"):
        return _parse_unix(text)
    host, colon, port_text = text.rpartition(":")
    if not colon:
        meant = f"; did you mean :{text}?" if text.isdigit() else ""
        raise ValueError(f"an address is HOST:PORT, :PORT, [IPV6]:PORT or unix:/path{meant}")
    if not re.fullmatch(r"[0-9]{1,5}", port_text) or int(port_text) > 65535:
        raise ValueError(f"the port must be a number from 0 to 65535, not {port_text[:40]!r}")
    port = int(port_text)
    if host == "":
        return Address(socket.AF_INET6, "", port)
    if host == "*":
        raise ValueError(f"every address of this machine is written :{port}, without the *")
    if host == "localhost":
        return Address(socket.AF_INET, "127.0.0.1", port)
    if host.startswith("[") and host.endswith("]"):
        return Address(socket.AF_INET6, str(_ip(host[1:-1], 6)), port)
    return Address(socket.AF_INET, str(_ip(host, 4)), port)


def _ip(host: str, version: int) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        if not (host.isascii() and host.isprintable()):
            raise ValueError
        ip = ipaddress.ip_address(host)
    except ValueError:
        raise ValueError(f"the host must be a numeric address or localhost, not {host[:80]!r}") from None
    if ip.version != version:
        raise ValueError(f"an IPv6 address is written in brackets: [{host}]" if ip.version == 6 else f"not IPv6: {host}")
    return ip


def _parse_unix(text: str) -> Address:
    path, _, query = text.removeprefix("unix:").partition("?")
    check_path(path)
    mode = DEFAULT_MODE
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key != "mode":
            raise ValueError(f"unknown parameter {key!r}; there is mode, as in unix:/path?mode=0660")
        try:
            mode = int(value, 8)
        except ValueError:
            mode = -1
        if not 0 <= mode <= 0o777:
            raise ValueError(f"mode is octal, 0 to 0777, not {value!r}")
    return Address(socket.AF_UNIX, path, mode=mode)


def check_path(path: str) -> None:
    """Raise ValueError when no Unix socket can be bound at ``path``."""
    if not path.startswith("/"):
        raise ValueError("a Unix socket's path is absolute: unix:/path")
    try:
        length = len(path.encode())
    except UnicodeEncodeError:
        raise ValueError("a Unix socket's path must be UTF-8 here") from None
    if "\0" in path or length > UNIX_PATH_LIMIT - TEMPORARY_NAME:
        raise ValueError(f"a Unix socket's path has at most {UNIX_PATH_LIMIT - TEMPORARY_NAME} bytes")


def peer_text(family: int, address: Any) -> str:
    """A peer as people read it; a mapped IPv4 address as IPv4. ``address`` is what accept(2) gave; Unix clients have none."""
    if family == socket.AF_UNIX:
        return "unix"
    host, port = address[0], address[1]
    if family == socket.AF_INET6:
        if host.startswith(_MAPPED):
            return f"{host[len(_MAPPED) :]}:{port}"
        return f"[{host}]:{port}"
    return f"{host}:{port}"
