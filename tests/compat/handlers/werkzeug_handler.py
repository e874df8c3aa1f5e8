"""Werkzeug: `make_server` binds, so its server is closed again; prefork listens. Flask's development server is the same one.

It serves HTTP/1.0, a connection for each request, unless the request handler says otherwise. What it logs, a line for each
request, is of the logger `werkzeug`.
"""

import logging

from werkzeug import Request, Response
from werkzeug.serving import make_server

logging.getLogger("werkzeug").setLevel(logging.WARNING)


@Request.application
def app(request):
    """Send back the path."""
    return Response(request.path)


server = make_server("127.0.0.1", 0, app)
server.server_close()
