"""Telling a service manager how we are: sd_notify(3), a datagram to the socket named by $NOTIFY_SOCKET. Silent without one."""

import os
import socket


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
