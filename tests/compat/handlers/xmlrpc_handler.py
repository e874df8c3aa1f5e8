"""xmlrpc: the server is made with `bind_and_activate=False`."""

from xmlrpc.server import SimpleXMLRPCServer

server = SimpleXMLRPCServer(("", 0), bind_and_activate=False, logRequests=False)
server.register_function(lambda text: text.upper(), "upper")
