"""A key-value server for redis-cli and its like: each command is an SQL statement, and the workers share the database.

prefork serve --module kv:loop --bind 127.0.0.1:6379 --on-worker-start kv:connect
"""

import os
import sqlite3
import time
from typing import Any

from prefork.examples import resp

ADD = """INSERT INTO kv VALUES (?1, CAST({0} AS BLOB), NULL) ON CONFLICT DO UPDATE SET value = CAST(value{0} AS BLOB)
         WHERE CAST(value+0 AS BLOB) = value RETURNING value+0"""
SQL = {
    b"PING": "SELECT 'PONG'",
    b"ECHO": "SELECT ?",
    b"GET": "SELECT value FROM kv WHERE key = ?",
    b"MGET": "SELECT value FROM kv WHERE key = ?",
    b"SET": "REPLACE INTO kv VALUES (?, ?, NULL) RETURNING 'OK'",
    b"SET EX": "REPLACE INTO kv VALUES (?, ?, now() + ?) RETURNING 'OK'",
    b"SET NX": "INSERT OR IGNORE INTO kv VALUES (?, ?, NULL) RETURNING 'OK'",
    b"DEL": "DELETE FROM kv WHERE key = ? RETURNING 1",
    b"EXISTS": "SELECT count(*) FROM kv WHERE key = ?",
    b"INCR": ADD.format("+1"),
    b"DECR": ADD.format("-1"),
    b"INCRBY": ADD.format("+?2"),
    b"EXPIRE": "UPDATE kv SET expires = now() + ?2 WHERE key = ?1 RETURNING 1",
    b"TTL": "SELECT ifnull(CAST(round(expires - now()) AS INTEGER), -1) FROM kv WHERE key = ?",
    b"DBSIZE": "SELECT count(*) FROM kv",
    b"FLUSHALL": "DELETE FROM kv",
}
ABSENT = {b"DEL": 0, b"EXPIRE": 0, b"TTL": -2, b"FLUSHALL": "OK"}  # the reply where there is no row
MANY: dict[bytes, Any] = {b"DEL": sum, b"EXISTS": sum, b"MGET": list}  # takes several keys; what is made of the replies for each
db: sqlite3.Connection


def connect() -> None:
    """In each worker: a connection of its own, which no fork has copied."""
    global db
    db = sqlite3.connect(os.environ.get("KV_FILE", "kv.db"), timeout=30, isolation_level=None)
    db.create_function("now", 0, time.time)
    db.executescript("""PRAGMA synchronous = OFF; CREATE TABLE IF NOT EXISTS kv (key BLOB PRIMARY KEY, value BLOB, expires REAL);
                        CREATE INDEX IF NOT EXISTS kv_expires ON kv (expires)""")


@resp.handler
def loop(name: bytes, *arguments: bytes) -> Any:
    """What a command replies; an exception is an error."""
    if name == b"SET" and len(arguments) > 2:
        name, arguments = b"SET " + arguments[2].upper(), arguments[:2] + arguments[3:]
    try:
        if db.execute("SELECT min(expires) < now() FROM kv").fetchone()[0]:
            db.execute("DELETE FROM kv WHERE expires < now()")
        parts = zip(arguments, strict=False) if name in MANY else [arguments]
        replies = [(db.execute(SQL[name], part).fetchone() or [ABSENT.get(name)])[0] for part in parts]
    except (KeyError, sqlite3.Error) as error:
        return error
    return MANY[name](replies) if name in MANY else replies[0]
