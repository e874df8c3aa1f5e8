"""Echo: what a client sends comes back, until it stops sending."""

import socket


def loop(sock: socket.socket) -> None:
    """Send back everything that arrives on ``sock``."""
    while data := sock.recv(4096):
        sock.sendall(data)
