"""Addresses as users write them, and back: ``HOST:PORT``, ``:PORT``, ``[::1]:PORT``, ``unix:/path?mode=0660``, ``fd:3``,
``systemd:NAME``.

Parsing asks nobody: a host is numeric or ``localhost``. A name could mean another machine at each reload, and looking it up
would block the master.
"""

import errno
import ipaddress
import os
import re
import socket
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import parse_qsl

# sun_path is 108 bytes with its NUL (unix(7)); a socket is bound under a temporary name that is TEMPORARY_NAME bytes longer.
UNIX_PATH_LIMIT = 107
TEMPORARY_NAME = 5
INTERFACE_LIMIT = 15  # IFNAMSIZ, with its NUL (netdevice(7))
DEFAULT_MODE = 0o600
INHERITED = int(socket.AF_UNSPEC)
UNRESOLVED = -1
# useradd(8): what Debian allows, and numbers.
_ACCOUNT = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}\$?|[0-9]{1,10}")
# The number after it means "leave it as it is" (setresuid(2), chown(2)), which must never be taken for somebody.
ID_LIMIT = (1 << 32) - 2
_MAPPED = "::ffff:"
# Unix clients have no name.
_UNIX_PEER = "unix"


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen.

    For a Unix socket ``host`` is its path, ``mode`` its permission bits, and ``user`` and ``group`` its owners (empty: as
    created). For a socket that was inherited ``family`` is INHERITED, ``host`` how it was named, and ``port`` its descriptor
    (UNRESOLVED for a service manager's, until it is known which sockets it has passed).
    """

    family: int
    host: str
    port: int = 0
    mode: int = DEFAULT_MODE
    user: str = ""
    group: str = ""

    @property
    def place(self) -> tuple[int, str, int]:
        """What makes it another address than others."""
        return self.family, self.host, self.port

    @property
    def text(self) -> str:
        """As a user writes it, parameters included."""
        said = {"mode": f"{self.mode:04o}" if self.mode != DEFAULT_MODE else "", "user": self.user, "group": self.group}
        query = "&".join(f"{key}={value}" for key, value in said.items() if value)
        return f"{self}?{query}" if query else str(self)

    def __str__(self) -> str:
        if self.family == INHERITED:
            return self.host
        if self.family == socket.AF_UNIX:
            return f"unix:{self.host}"
        if self.family == socket.AF_INET6:
            return f"[{self.host}]:{self.port}" if self.host != "" else f":{self.port}"
        return f"{self.host}:{self.port}"


class Claims:
    """What addresses take of a machine, so that one more need not be held against each: that takes a second for 1,000.

    Two free ports (0) do not collide. An address of all hosts takes the port of each.
    """

    def __init__(self) -> None:
        self._taken: dict[tuple[int | str, ...], Address] = {}

    def add(self, address: Address) -> Address | None:
        """One that collides with this address; None when it is the first to take what it takes."""
        takes, needs = _claims(address)
        for claim in needs:
            if claim in self._taken:
                return self._taken[claim]
        for claim in takes:
            self._taken.setdefault(claim, address)
        return None


def _claims(address: Address) -> tuple[list[tuple[int | str, ...]], list[tuple[int | str, ...]]]:
    """What an address takes, and what nobody may have taken for it to be listened on."""
    family, host, port = address.place
    if family in (INHERITED, socket.AF_UNIX):
        return [address.place], [address.place]
    if port == 0:
        return [], []
    if host == "":  # the port as a whole: of both families
        return [(port,), (port, "all")], [(port,)]
    if host in ("0.0.0.0", "::"):  # noqa: S104
        return [(port,), (port, family), (port, family, "all")], [(port, "all"), (port, family)]
    return [(port,), (port, family), (port, family, host)], [(port, "all"), (port, family, "all"), (port, family, host)]


def parse(text: str) -> Address:
    """The address that ``text`` names. Raises ValueError saying what would be right."""
    if text.startswith("unix:"):
        return _parse_unix(text)
    if text.startswith(("fd:", "systemd:")):
        return _parse_inherited(text)
    host, colon, port_text = text.rpartition(":")
    if not colon:
        meant = f"; did you mean :{text}?" if text.isdigit() else ""
        raise ValueError(f"an address is HOST:PORT, :PORT, [IPV6]:PORT, unix:/path, fd:N or systemd:NAME{meant}")
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
        return Address(socket.AF_INET6, _ipv6(host[1:-1]), port)
    return Address(socket.AF_INET, str(_ip(host, 4)), port)


def _ipv6(host: str) -> str:
    ip = _ip(host, 6)
    text, percent, interface = str(ip).partition("%")
    if ip.is_link_local and not percent:  # bind(2) would say EINVAL
        raise ValueError(f"a link-local address needs its interface: [{text}%eth0]")
    if percent and not ip.is_link_local:  # the kernel would ignore it, and one address would have several names
        raise ValueError(f"only a link-local address (fe80::) has an interface: [{text}]")
    if len(interface) > INTERFACE_LIMIT:
        raise ValueError(f"an interface's name has at most {INTERFACE_LIMIT} characters, not {interface[:40]!r}")
    return str(ip)


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
    owners = {"user": "", "group": ""}
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key in owners:
            owners[key] = account(value)
            continue
        if key != "mode":
            raise ValueError(f"unknown parameter {key[:80]!r}; there are mode, user and group: unix:/path?mode=0660&group=www-data")
        try:
            mode = int(value, 8)
        except ValueError:
            mode = -1
        if not 0 <= mode <= 0o777:
            raise ValueError(f"mode is octal, 0 to 0777, not {value[:80]!r}")
    return Address(socket.AF_UNIX, path, mode=mode, user=owners["user"], group=owners["group"])


def account(value: str) -> str:
    """A user or group, by name or number; whether it exists is asked where it is used. Raises ValueError."""
    if not _ACCOUNT.fullmatch(value) or (value.isdigit() and int(value) > ID_LIMIT):
        raise ValueError(f"a user or group is a name or a number, like www-data or 33, not {value[:80]!r}")
    return value


def _parse_inherited(text: str) -> Address:
    kind, _, which = text.partition(":")
    if kind == "fd":
        if not re.fullmatch(r"[0-9]{1,7}", which) or int(which) <= 2:
            raise ValueError("a descriptor is a number from 3 on, as in fd:3: the first three are standard input, output and error")
        return Address(INHERITED, f"fd:{int(which)}", int(which))
    # systemd.socket(5): FileDescriptorName is at most 255 characters, without control characters and colons.
    if not which or len(which) > 255 or not which.isprintable() or ":" in which:
        raise ValueError("systemd:NAME takes a FileDescriptorName (systemd.socket(5))")
    return Address(INHERITED, text, UNRESOLVED)


def interface_of(address: Address) -> int:
    """The number of the interface that a link-local address names; 0 for any other. Raises OSError (ENODEV)."""
    _, _, name = address.host.partition("%") if address.family == socket.AF_INET6 else ("", "", "")
    if name == "" or (name.isdecimal() and int(name) < 1 << 31):
        return int(name or 0)
    try:
        return socket.if_nametoindex(name)
    except OSError:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV)) from None


def socket_address(address: Address) -> tuple[str, int] | tuple[str, int, int, int]:
    """What bind(2) takes for a TCP address: of ``fe80::1%eth0`` alone Python would leave the interface out. As `interface_of`."""
    host, interface = address.host.partition("%")[0], interface_of(address)
    return (host, address.port, 0, interface) if interface else (host, address.port)


def join(folder: str, path: str) -> str:
    """A path as it is written in a folder; one that is absolute stays."""
    return os.path.join(folder, path.removeprefix("./"))


def resolve(address: Address, folder: str) -> Address:
    """The address with a path that was written in ``folder`` made absolute. Raises ValueError when it is too long then."""
    return address if address.family != socket.AF_UNIX else replace(address, host=check_path(join(folder, address.host)))


def check_path(path: str) -> str:
    """The path. Raises ValueError when no Unix socket can be bound there."""
    if not path or path.startswith("@"):
        raise ValueError("a Unix socket has a path: unix:/path or unix:path")
    try:
        length = len(path.encode())
    except UnicodeEncodeError:
        raise ValueError("a Unix socket's path must be UTF-8 here") from None
    if "\0" in path or length > UNIX_PATH_LIMIT - TEMPORARY_NAME:
        raise ValueError(
            f"a Unix socket's path has at most {UNIX_PATH_LIMIT - TEMPORARY_NAME} bytes, and {path[:200]} has {length}"
        )
    return path


def peer_parts(family: int, address: Any) -> tuple[str, int]:
    """A peer's host, as people read it (a mapped IPv4 address as IPv4), and port, which is 0 for Unix clients: they have no name.

    ``address`` is what accept(2) gave.
    """
    if family == socket.AF_UNIX:
        return _UNIX_PEER, 0
    host: str = address[0]
    if family == socket.AF_INET6:
        host = host[len(_MAPPED) :] if host.startswith(_MAPPED) else f"[{host}]"
    return host, address[1]


def parts_text(host: str, port: int) -> str:
    """What `peer_parts` gives, as one text."""
    return host if host == _UNIX_PEER else f"{host}:{port}"


def peer_text(family: int, address: Any) -> str:
    """A peer as people read it. ``address`` is what accept(2) gave."""
    return parts_text(*peer_parts(family, address))


def client_address(address: Any) -> Any:
    """What accept(2) gave, as socketserver's handlers know it; a mapped IPv4 address as the pair that IPv4 has."""
    if isinstance(address, tuple) and address[0].startswith(_MAPPED):
        return address[0][len(_MAPPED) :], address[1]
    return address
