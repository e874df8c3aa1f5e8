"""wsgiref: `make_server` binds, so its server is closed again; prefork listens."""

from wsgiref.simple_server import WSGIRequestHandler, make_server


class Quiet(WSGIRequestHandler):
    """No line for each request."""

    def log_message(self, *args):
        pass


def app(environ, start_response):
    """Send back the path."""
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [environ["PATH_INFO"].encode()]


server = make_server("127.0.0.1", 0, app, handler_class=Quiet)
server.server_close()
