"""The servers of Python's library: library.py forking|threading|asyncio PORT BACKLOG."""

import asyncio
import socketserver
import sys


class Echo(socketserver.BaseRequestHandler):
    """The handler."""

    def handle(self) -> None:
        """Send back everything that arrives."""
        try:
            while data := self.request.recv(4096):
                self.request.sendall(data)
        except ConnectionError:
            pass  # the client's way of ending


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The same for asyncio."""
    try:
        while data := await reader.read(4096):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass  # the client's way of ending
    writer.close()


async def serve(port: int, backlog: int) -> None:
    """Until the process ends."""
    server = await asyncio.start_server(echo, "127.0.0.1", port, backlog=backlog)
    await server.serve_forever()


def main(which: str, port: int, backlog: int) -> None:
    """Be one of the three."""
    if which == "asyncio":
        asyncio.run(serve(port, backlog))
        return
    base = {"forking": socketserver.ForkingTCPServer, "threading": socketserver.ThreadingTCPServer}[which]
    base.allow_reuse_address = True
    base.request_queue_size = backlog
    base(("127.0.0.1", port), Echo).serve_forever()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
