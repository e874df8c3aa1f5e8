"""RESP2, the protocol of Redis, as a server speaks it; `kv` is one.

https://redis.io/docs/latest/develop/reference/protocol-spec/
"""

import socket
from collections.abc import Callable
from typing import Any, BinaryIO

SIZE = 1 << 20  # bytes of one command, at most


def handler(answer: Callable[..., Any]) -> Callable[[socket.socket], None]:
    """A handler that sends ``answer(NAME, argument, ...)`` to each command, in order. What is no command ends the connection."""

    def loop(sock: socket.socket) -> None:
        with sock.makefile("rb") as file:
            try:
                while command := read(file):
                    sock.sendall(encode(answer(command[0].upper(), *command[1:])))
            except ValueError as error:
                sock.sendall(encode(error))

    return loop


def read(file: BinaryIO) -> list[bytes]:
    """The next command: an array of strings, or a line of words. Nothing at the end; raises ValueError for what is neither."""
    line = b"\n"
    while line.isspace():
        line = file.readline(SIZE)
    if not line.startswith(b"*"):
        return line.split() if line.endswith(b"\n") else []
    command: list[bytes] = []
    room = SIZE
    for _ in range(int(line[1:])):
        size = int(file.readline(32)[1:]) + 2
        if not 2 <= size <= room or len(data := file.read(size)) < size:
            raise ValueError(f"Protocol error: a command has at most {SIZE} bytes")
        command.append(data[:-2])
        room -= size
    return command


def encode(reply: Any) -> bytes:
    """Text is a status, bytes are a string, None is no string, an exception is an error."""
    match reply:
        case bytes():
            return b"$%d\r\n%b\r\n" % (len(reply), reply)
        case list():
            return b"*%d\r\n%b" % (len(reply), b"".join(map(encode, reply)))
        case int():
            return b":%d\r\n" % reply
        case None:
            return b"$-1\r\n"
        case str():
            return f"+{reply}\r\n".encode()
    return f"-ERR {type(reply).__name__}: {' '.join(str(reply).split())}\r\n".encode()
