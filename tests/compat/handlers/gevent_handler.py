"""gevent: greenlets within a connection.

The worker serves one connection at a time, whatever gevent replaces, and hands the handler an ordinary blocking socket. A
`gevent.socket.socket` of the same descriptor is cooperative. Detach it at the end: then prefork closes the connection, and sees
whether the client had gone. Greenlets that the handler has started have to end before it returns.
"""

from gevent import monkey

monkey.patch_all()

import gevent
import gevent.socket


def loop(sock):
    """Send back what comes, in greenlets that wait for each other."""
    peer = gevent.socket.socket(fileno=sock.fileno())
    try:
        while data := peer.recv(4096):
            waiting = [gevent.spawn(gevent.sleep, 0.001) for _ in range(3)]
            gevent.joinall(waiting, raise_error=True)
            peer.sendall(data)
    finally:
        peer.detach()
