"""The loop that anybody would write: processes that block in accept(), and nobody who looks after them.

bare.py PORT WORKERS BACKLOG [SECONDS]: with SECONDS the handler sleeps so long before each answer.
"""

import os
import signal
import socket
import sys
import time


def loop(sock: socket.socket) -> None:
    """The handler: what prefork's bundled example does."""
    while data := sock.recv(4096):
        sock.sendall(data)


def late(sock: socket.socket) -> None:
    """A handler that has to wait for something."""
    while data := sock.recv(4096):
        time.sleep(SECONDS)
        sock.sendall(data)


PORT, WORKERS, BACKLOG = map(int, sys.argv[1:4])
SECONDS = float(sys.argv[4]) if sys.argv[4:] else 0.0
listener = socket.create_server(("127.0.0.1", PORT), backlog=BACKLOG)
handler = late if SECONDS else loop
for _ in range(WORKERS):
    if os.fork() == 0:
        while True:
            client, _ = listener.accept()
            with client:
                try:
                    handler(client)
                except ConnectionError:
                    pass  # the client's way of ending
signal.pause()
