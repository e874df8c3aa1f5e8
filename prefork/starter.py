"""`prefork init`: a configuration and a handler to begin with. Never overwrites what is there."""

import os
import shlex
from pathlib import Path

from prefork.errors import RefusedError

CONFIGURATION = """\
# A daemon's configuration. Command line (--workers 16) and environment (PREFORK_WORKERS=16) beat it; a reload reads it again.
# Every option: prefork serve --help, or prefork man. What holds: prefork check --config prefork.toml

# The handler: MODULE:ATTR, imported with the working directory first on the path.
module = "mine:loop"

# Where to listen; ":7000" is every address of this machine. A socket unit of systemd has the same address, or leave this out.
bind = ["127.0.0.1:7000"]

# Processes kept waiting in accept(), for each address.
workers = 8
"""
HANDLER = '''\
"""A handler: prefork calls loop(sock) with each connection, which is closed when it returns."""


def loop(sock):
    while data := sock.recv(4096):
        sock.sendall(data)
'''
FILES = {"prefork.toml": CONFIGURATION, "mine.py": HANDLER}


def start(folder: str) -> str:
    """Write both files into ``folder``, which is made if need be. Returns what to type next.

    Raises RefusedError when one of them is there already, OSError when they can't be written.
    """
    place = Path(folder)
    in_the_way = [str(place / name) for name in FILES if os.path.lexists(place / name)]
    if in_the_way:
        raise RefusedError(f"nothing written: {' and '.join(in_the_way)} in the way; name another directory: prefork init DIR")
    place.mkdir(parents=True, exist_ok=True)
    for name, text in FILES.items():
        with (place / name).open("x") as file:
            file.write(text)
    lines = [
        f"wrote {place / 'prefork.toml'} and {place / 'mine.py'}; now:",
        *([] if folder == "." else [f"  cd {shlex.quote(folder)}"]),
        "  prefork serve --config prefork.toml",
        "and in another terminal:",
        "  echo hello | nc -N 127.0.0.1 7000",
        "  prefork reload mine     after a change of mine.py",
        "  prefork status mine",
        "  prefork stop mine",
    ]
    return "\n".join(lines)
