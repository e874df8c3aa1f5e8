"""What libraries need beside their packages."""

import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import watch

POSTGRES = os.pathsep.join([os.environ.get("PATH", ""), *map(str, Path("/").glob("usr/lib/postgresql/*/bin"))])


def package(name: str) -> None:
    """Skip a test of a package that is not installed; in CI that is a failure."""
    if importlib.util.find_spec(name) is None:
        watch.lacks(f"{name} is not installed (pip install '.[compat]')")


@pytest.fixture
def postgresql() -> Iterator[str]:
    """A database server of this test's own, and how psycopg connects to it. It is another user's where we are root."""
    package("psycopg")
    initdb, postgres = (watch.program(name, "postgresql", POSTGRES) for name in ("initdb", "postgres"))
    # It refuses to be root's. pytest's folders are private, and a socket's path is short.
    with tempfile.TemporaryDirectory(prefix="prefork-", dir="/tmp") as folder:
        user = ["--reuid=nobody", "--regid=nogroup", "--clear-groups"] if os.geteuid() == 0 else []
        if user:
            shutil.chown(folder, "nobody", "nogroup")
        # It ends with whoever started it.
        starter = ["setpriv", *user, "--pdeathsig=INT", "--"]
        data = f"{folder}/data"
        create = [initdb, "--pgdata", data, "--auth=trust", "--username=prefork", "--encoding=UTF8", "--no-locale", "--no-sync"]
        subprocess.run([*starter, *create], cwd="/", capture_output=True, check=True, timeout=60)
        options = {"listen_addresses": "", "fsync": "off", "dynamic_shared_memory_type": "mmap", "max_connections": "40"}
        command = [postgres, "-D", data, "-k", folder, *(f"--{key}={value}" for key, value in options.items())]
        log = Path(folder) / "log"
        with log.open("wb") as file:
            server = subprocess.Popen([*starter, *command], cwd="/", stdout=file, stderr=file)
        try:
            watch.until(
                "PostgreSQL accepts connections or has ended",
                lambda: "ready to accept connections" in log.read_text() or server.poll() is not None,
            )
            assert server.poll() is None, log.read_text()
            yield f"host={folder} user=prefork dbname=postgres"
        finally:
            if server.poll() is None:
                server.send_signal(signal.SIGINT)
            server.wait(30)
