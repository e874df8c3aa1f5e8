"""paramiko: an SSH server that runs one command for each connection.

The host key is loaded by the import, once for all workers, and a reload reads it anew. A `Transport` is a thread of its own for
each connection, which reads from the socket: close and join it before the handler returns, as the descriptor's number is another
client's then.
"""

import logging
import os
import threading

import paramiko

logging.getLogger("paramiko").setLevel(logging.WARNING)
HOST_KEY = paramiko.Ed25519Key(filename=os.environ["SSH_HOST_KEY"])
with open(os.environ["SSH_AUTHORIZED_KEYS"]) as file:
    AUTHORIZED = {line.split()[1] for line in file}


class Shouting(paramiko.ServerInterface):
    """Lets those in whose key is known, and runs one command: say it loud."""

    def __init__(self):
        self.command = b""
        self.asked = threading.Event()

    def get_allowed_auths(self, username):
        return "publickey"

    def check_auth_publickey(self, username, key):
        return paramiko.AUTH_SUCCESSFUL if key.get_base64() in AUTHORIZED else paramiko.AUTH_FAILED

    def check_channel_request(self, kind, chanid):
        return paramiko.OPEN_SUCCEEDED if kind == "session" else paramiko.OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED

    def check_channel_exec_request(self, channel, command):
        self.command = command
        self.asked.set()
        return True


def loop(sock):
    """Serve one session."""
    transport = paramiko.Transport(sock)
    try:
        transport.add_server_key(HOST_KEY)
        session = Shouting()
        transport.start_server(server=session)
        channel = transport.accept(30)
        if channel is None or not session.asked.wait(30):
            return
        channel.sendall(session.command.upper())
        channel.send_exit_status(0)
        channel.close()
        transport.join(30)  # the client ends the connection
    finally:
        transport.close()
        transport.join()
