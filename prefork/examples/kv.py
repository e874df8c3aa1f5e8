"""A key-value server for redis-cli and its like, over RESP2: a command is an SQL statement, and the workers share the database.

prefork serve --module kv:loop --bind 127.0.0.1:6379 --on-worker-start kv:connect
"""

import os
import socket
import sqlite3
from typing import BinaryIO

SIZE, WORDS = 1 << 20, 8  # of a word in bytes, and of a command, at most
SQL = {
    b"PING": "SELECT 'PONG'",
    b"GET": "SELECT value FROM kv WHERE key = ?",
    b"SET": "REPLACE INTO kv VALUES (?, ?) RETURNING 'OK'",
    b"DEL": "DELETE FROM kv WHERE key = ? RETURNING 1",
    b"INCR": """INSERT INTO kv VALUES (?, CAST(1 AS BLOB)) ON CONFLICT DO UPDATE SET value = CAST(value + 1 AS BLOB)
                WHERE CAST(value + 0 AS BLOB) = value RETURNING value + 0""",
}
db: sqlite3.Connection


def connect() -> None:
    """In each worker: a connection of its own, which no fork has copied."""
    global db
    db = sqlite3.connect(os.environ.get("KV_FILE", "kv.db"), timeout=30, isolation_level=None)
    db.executescript("PRAGMA synchronous = OFF; CREATE TABLE IF NOT EXISTS kv (key BLOB PRIMARY KEY, value BLOB)")


def loop(sock: socket.socket) -> None:
    """Answer each command, in order. What is no command ends the connection."""
    with sock.makefile("rb") as file:
        try:
            while command := _read(file):
                sock.sendall(_answer(command[0].upper(), command[1:]))
        except ValueError as error:
            sock.sendall(f"-ERR {error}\r\n".encode())


def _read(file: BinaryIO) -> list[bytes]:
    line = file.readline(SIZE)
    if not line.startswith(b"*"):
        return line.split() if line.endswith(b"\n") else []
    command: list[bytes] = []
    for _ in range(int(line[1:])):
        size = int(file.readline(32)[1:])
        if not 0 <= size <= SIZE or len(command) == WORDS or len(data := file.read(size + 2)) < size + 2:
            raise ValueError(f"Protocol error: a command has at most {WORDS} words of {SIZE} bytes")
        command.append(data[:-2])
    return command


def _answer(name: bytes, arguments: list[bytes]) -> bytes:
    try:
        [reply] = db.execute(SQL[name], arguments).fetchone() or [0 if name == b"DEL" else None]
    except (KeyError, sqlite3.Error) as error:
        return f"-ERR {type(error).__name__}: {error}\r\n".encode()
    text = "$-1" if reply is None else f":{reply}" if isinstance(reply, int) else f"+{reply}"
    return b"$%d\r\n%b\r\n" % (len(reply), reply) if isinstance(reply, bytes) else f"{text}\r\n".encode()
