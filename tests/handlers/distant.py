"""What `tests.faults.distance` serves: messages of 64 bytes are sent back; one that does not begin with m is the last."""

import os
import signal
import socket


def loop(sock: socket.socket) -> None:
    """Serve one connection."""
    while len(data := sock.recv(64, socket.MSG_WAITALL)) == 64:
        if data.startswith(b"crash"):
            os.kill(os.getpid(), signal.SIGKILL)
        sock.sendall(data)
        if data[:1] != b"m":
            return
