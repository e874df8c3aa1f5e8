"""uModbus: `get_server` makes a `socketserver.TCPServer` that binds, so it is closed again; prefork listens.

Registers that live in the module are each worker's own: what a client writes, another worker's client does not read.
"""

from socketserver import TCPServer

from umodbus.server.tcp import RequestHandler, get_server

server = get_server(TCPServer, ("127.0.0.1", 0), RequestHandler)
server.server_close()


@server.route(slave_ids=[1], function_codes=[3], addresses=range(1000))
def read(slave_id, function_code, address):
    """A register holds twice its number."""
    return 2 * address
