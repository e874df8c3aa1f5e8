"""eventlet: green threads within a connection.

`monkey_patch()` makes a hub, whose epoll all workers would share: each is then woken for the others' clients. `use_hub()` after it
forgets that hub, and each worker makes its own. The socket is an ordinary blocking one; a `GreenSocket` of it is cooperative, and
prefork still closes the connection.
"""

import warnings

warnings.filterwarnings("ignore", message="\nEventlet is deprecated")

import eventlet
import eventlet.greenio
import eventlet.hubs

eventlet.monkey_patch()
eventlet.hubs.use_hub()


def loop(sock):
    """Send back what comes, in green threads that wait for each other."""
    peer = eventlet.greenio.GreenSocket(sock)
    while data := peer.recv(4096):
        for waiting in [eventlet.spawn(eventlet.sleep, 0.001) for _ in range(3)]:
            waiting.wait()
        peer.sendall(data)
