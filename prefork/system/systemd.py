"""The service manager: telling it how we are (sd_notify(3)), and the sockets that it has opened for us (sd_listen_fds(3)).

Both are silent without one.
"""

import errno
import os
import socket
from collections.abc import Mapping, MutableMapping

from prefork.printable import one_line

# SD_LISTEN_FDS_START
_FIRST_DESCRIPTOR = 3
# As many as a process may have open by default: a number from the environment bounds a loop here.
_DESCRIPTORS_LIMIT = 1024
# USEC_INFINITY, in microseconds: no watchdog.
_FOREVER = (1 << 64) - 1


# Its queue is full, or descriptors or memory are short; the manager has not gone.
_LATER = (errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
# systemd ignores a datagram of more than PIPE_BUF bytes.
TEXT_LIMIT = 1024


class Notifier:
    """A sender to the service manager, or to a test that waits for readiness. Losing a message is never an error."""

    def __init__(self, path: str | None) -> None:
        """``path`` as in NOTIFY_SOCKET: with ``@`` first it is in the abstract namespace (unix(7))."""
        named = path if path and path[0] in "/@" and len(path) > 1 else None
        self._path = "\0" + named[1:] if named and named.startswith("@") else named

    @classmethod
    def from_environment(cls) -> "Notifier":
        return cls(os.environ.get("NOTIFY_SOCKET"))

    def __bool__(self) -> bool:
        """Whether there is anybody to tell."""
        return self._path is not None

    def send(self, **state: object) -> bool:
        """Send ``READY=1`` and the like: one datagram, never waiting. False when the same can be tried again later."""
        if self._path is None:
            return True
        message = "\n".join(f"{key}={value}" for key, value in state.items())
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:  # rarely enough not to keep one
                sock.setblocking(False)
                sock.sendto(message.encode(errors="backslashreplace"), self._path)
        except OSError as error:
            return error.errno not in _LATER
        return True


def line(text: str) -> str:
    """A text in one line, no longer than the service manager takes it: its first, and of a traceback the last, too.

    `systemctl status` prints it as it is.
    """
    first, _, rest = text.partition("\n")
    if rest.startswith("Traceback "):
        first = f"{first} {rest.rstrip().rpartition(chr(10))[2].strip()}"
    return one_line(first).encode(errors="backslashreplace")[:TEXT_LIMIT].decode(errors="ignore")


def watchdog(environment: Mapping[str, str]) -> float | None:
    """In how many seconds the service manager wants to hear of us at the latest (sd_watchdog_enabled(3)); None if it does not."""
    microseconds, pid = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
    if not microseconds.isdecimal() or not 0 < int(microseconds) < _FOREVER or pid not in ("", str(os.getpid())):
        return None
    return int(microseconds) / 1e6


def forget(environment: MutableMapping[str, str]) -> None:
    """In a child: what the service manager has told the master is nothing for user code, nor for what that starts."""
    for key in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        environment.pop(key, None)


def activated(environment: MutableMapping[str, str]) -> tuple[tuple[str, int], ...]:
    """The sockets that a service manager has passed to this process: name and descriptor (sd_listen_fds(3)).

    The variables are taken out of the environment: they are not meant for anybody that we start.
    """
    count, pid, names = (environment.pop(key, "") for key in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"))
    if not count.isdigit() or pid != str(os.getpid()):
        return ()
    told = names.split(":") if names else []
    found = []
    for place in range(min(int(count), _DESCRIPTORS_LIMIT)):
        fd = _FIRST_DESCRIPTOR + place
        try:
            os.set_inheritable(fd, False)
        except OSError:
            continue  # promised and not there: whoever names it is told
        found.append((told[place] if place < len(told) else "unknown", fd))
    return tuple(found)
