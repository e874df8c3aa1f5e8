"""Echo, with the deeds of `bad` and the orders of `hostile`: what all faults together strike at. They serve copies of the three."""

import importlib
import socket

bad, hostile = importlib.import_module("bad"), importlib.import_module("hostile")  # beside this copy


def loop(sock: socket.socket) -> None:
    """Send back everything that arrives on ``sock``; an order is carried out first, and answered with what it returns."""
    while data := sock.recv(4096):
        if data.startswith(hostile.ORDER):
            name, *arguments = data.removeprefix(hostile.ORDER).decode().split()
            data = hostile.DEEDS[name](*arguments).encode()
        elif deed := bad.DEEDS.get(data.decode("latin-1")):
            deed(sock)
            if sock.fileno() == -1:
                return
        sock.sendall(data)
