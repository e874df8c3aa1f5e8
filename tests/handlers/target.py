"""Echo, and what `bad` does for who asks by its name: what faults strike at. They serve copies of both."""

import importlib
import socket

bad = importlib.import_module("bad")  # beside this copy


def loop(sock: socket.socket) -> None:
    """Send back everything that arrives on ``sock``."""
    while data := sock.recv(4096):
        if deed := bad.DEEDS.get(data.decode("latin-1")):
            deed(sock)
            if sock.fileno() == -1:
                return
        sock.sendall(data)
