"""dnslib: `DNSServer` is a wrapper that binds, and its attribute `server` is the `socketserver.BaseServer`. DNS over TCP only.

Its request handler answers one question for each connection.
"""

from dnslib import RR
from dnslib.server import BaseResolver, DNSLogger, DNSServer


class Fixed(BaseResolver):
    """Every name has one address."""

    def resolve(self, request, handler):
        reply = request.reply()
        reply.add_answer(*RR.fromZone(f"{request.q.qname} 60 A 192.0.2.1"))
        return reply


server = DNSServer(Fixed(), address="127.0.0.1", port=0, tcp=True, logger=DNSLogger("error")).server
server.server_close()
