"""fakeredis: its server is a `socketserver.BaseServer`, and a handler if it does not listen itself.

Each worker has data of its own, which ends with it. What several clients are to see belongs into one process: a real Redis.
"""

from fakeredis import TcpFakeServer

server = TcpFakeServer(("", 0), bind_and_activate=False)
