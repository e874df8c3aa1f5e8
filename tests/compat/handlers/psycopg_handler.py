"""psycopg: a connection to PostgreSQL for each worker.

A connection that the import makes would be shared by all workers; prefork refuses it. So each worker connects in
`on_worker_start`, and closes in `on_worker_exit`. The database has to allow as many connections as there can be workers:
`max_workers`, and `workers` more for a reload.
"""

import os

import psycopg


def create():
    """`on_boot`: the connection is closed again before there are workers."""
    with psycopg.connect(os.environ["DSN"]) as database:
        database.execute("CREATE TABLE IF NOT EXISTS visits (client text, backend integer)")


def connect():
    """`on_worker_start`."""
    global database
    database = psycopg.connect(os.environ["DSN"], autocommit=True)


def disconnect():
    """`on_worker_exit`."""
    database.close()


def loop(sock):
    """Note what the client says, and send it back as the database has it."""
    client = sock.recv(64).hex()
    row = database.execute("INSERT INTO visits VALUES (%s, pg_backend_pid()) RETURNING client", [client]).fetchone()
    sock.sendall(bytes.fromhex(row[0]))
    sock.recv(1)  # the client ends the connection
