"""The service manager: telling it how we are (sd_notify(3)), and the sockets that it has opened for us (sd_listen_fds(3)).

Both are silent without one.
"""

import os
import socket
from collections.abc import MutableMapping

# SD_LISTEN_FDS_START
_FIRST_DESCRIPTOR = 3
# As many as a process may have open by default: a number from the environment bounds a loop here.
_DESCRIPTORS_LIMIT = 1024


class Notifier:
    """A sender to the service manager, or to a test that waits for readiness. Losing a message is never an error."""

    def __init__(self, path: str | None) -> None:
        self._path = "\0" + path[1:] if path and path.startswith("@") else path
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if path else None
        self.lost = 0
        if self._sock is not None:
            self._sock.setblocking(False)

    @classmethod
    def from_environment(cls) -> "Notifier":
        return cls(os.environ.get("NOTIFY_SOCKET"))

    def send(self, **state: object) -> None:
        """Send ``READY=1`` and the like: one datagram, never waiting."""
        if self._sock is None or self._path is None:
            return
        message = "\n".join(f"{key}={value}" for key, value in state.items())
        try:
            self._sock.sendto(message.encode(), self._path)
        except OSError:
            self.lost += 1


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
