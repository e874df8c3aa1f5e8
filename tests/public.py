"""A copy of prefork that everybody can read, for daemons of other users, with the system's interpreter: one in somebody's home
is nobody else's.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from unittest import SkipTest, mock

PYTHON = "/usr/bin/python3"


def missing() -> str | None:
    """Why there can be none."""
    if os.geteuid() != 0:
        return "only root can run a daemon as several users"
    found = subprocess.run([PYTHON, "-c", "import sys; print(*sys.version_info[:2])"], capture_output=True, text=True, check=False)
    if found.stdout.split() != [str(part) for part in sys.version_info[:2]]:
        return f"{PYTHON} is not there, or of another version than this one: it can't run the packages of this environment"
    return None


@contextmanager
def copy() -> Iterator[Path]:
    """A folder that everybody can read, with prefork and what it needs in it. SkipTest, and in CI an error, where it can't be."""
    if (reason := missing()) is not None:
        assert os.environ.get("CI") != "true", reason
        raise SkipTest(reason)
    folder = Path(tempfile.mkdtemp(prefix="prefork-public-", dir="/tmp"))
    try:
        folder.chmod(0o755)
        for name in ("prefork", "click", "psutil", "setproctitle"):
            source = Path(str(import_module(name).__file__)).parent
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        yield folder
    finally:
        shutil.rmtree(folder)


@contextmanager
def interpreter() -> Iterator[tuple[Path, dict[str, str]]]:
    """Daemons of `prefork.testing.serve` run from such a copy. Gives the folder, and the environment that they need."""
    with copy() as folder, mock.patch.object(sys, "executable", PYTHON):
        yield folder, {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
