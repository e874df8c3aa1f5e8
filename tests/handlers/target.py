"""Echo, and a segmentation fault for who asks: what faults strike at. They serve a copy: it imports no neighbour."""

import ctypes
import resource
import socket

SEGFAULT = b"segfault"
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def loop(sock: socket.socket) -> None:
    """Send back everything that arrives on ``sock``."""
    while data := sock.recv(4096):
        if data == SEGFAULT:
            ctypes.string_at(0)
        sock.sendall(data)
