"""A policy service for Postfix that greylists: a stranger's mail is deferred once, and taken when it is sent again.

    prefork serve --module policy:loop --bind 127.0.0.1:10023 --on-boot policy:create --on-worker-start policy:connect

main.cf: smtpd_recipient_restrictions = reject_unauth_destination, check_policy_service inet:127.0.0.1:10023

The protocol is that of https://www.postfix.org/SMTPD_POLICY_README.html; the workers share a database.
"""

import os
import socket
import sqlite3
import time
from typing import BinaryIO

DELAY = float(os.environ.get("GREYLIST_SECONDS", "60"))
FORGET = 35 * 86400  # seconds
LINE, ATTRIBUTES = 4096, 100  # more is not Postfix
SEEN = "INSERT INTO seen VALUES (?1, ?2, ?2) ON CONFLICT DO UPDATE SET latest = excluded.latest RETURNING first"
db: sqlite3.Connection


def create() -> None:
    """In the fork server, once: the table, without those who have not come back."""
    connect()
    db.execute("CREATE TABLE IF NOT EXISTS seen (triplet TEXT PRIMARY KEY, first REAL, latest REAL)")
    db.execute("DELETE FROM seen WHERE latest < ?", (time.time() - FORGET,))
    db.close()


def connect() -> None:
    """In each worker: a connection of its own, which no fork has copied."""
    global db
    db = sqlite3.connect(os.environ.get("GREYLIST_FILE", "greylist.db"), timeout=30, isolation_level=None)


def loop(sock: socket.socket) -> None:
    """Answer requests: Postfix sends many on one connection."""
    with sock.makefile("rb") as requests:
        while (request := read(requests)) is not None:
            sock.sendall(f"action={decide(request)}\n\n".encode())


def read(requests: BinaryIO) -> dict[str, str] | None:
    """The next request: lines of name=value, then an empty one. None at the end."""
    request: dict[str, str] = {}
    while (line := requests.readline(LINE)).endswith(b"\n") and len(request) < ATTRIBUTES:
        name, _, value = line[:-1].decode("utf-8", "replace").partition("=")
        if not name:
            return request
        request[name] = value
    return None


def decide(request: dict[str, str]) -> str:
    """Defer until this sender has written to this recipient before, from this client, DELAY seconds ago."""
    triplet = " ".join(request.get(name, "") for name in ("client_address", "sender", "recipient")).lower()
    [(first,)] = db.execute(SEEN, (triplet, now := time.time()))
    return "DUNNO" if now >= first + DELAY else f"DEFER_IF_PERMIT greylisted for {first + DELAY - now:.0f} seconds"
