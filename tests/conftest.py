"""What every test is held to: it leaves no process, no descriptor and no file behind."""

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from prefork.system import process
from tests import watch

HANDLERS = Path(__file__).parent / "handlers"


@pytest.fixture(scope="session", autouse=True)
def _own_scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Temporary files of the code under test go to a directory of this process', so that leftovers are seen."""
    before, tempfile.tempdir = tempfile.tempdir, str(tmp_path_factory.mktemp("scratch"))
    # Orphans of a killed daemon become ours and not init's: none can slip away.
    process.become_subreaper()
    yield Path(tempfile.tempdir)
    tempfile.tempdir = before


@pytest.fixture(autouse=True)
def _leaves_nothing_behind(_own_scratch: Path) -> Iterator[None]:
    before = watch.descriptors(os.getpid())
    yield
    watch.release_ports()
    try:
        watch.until("no process is left behind", _no_children)
    except AssertionError as error:
        alive = [(p.pid, p.ppid(), p.status(), p.cmdline()) for p in psutil.Process().children(recursive=True)]
        raise AssertionError(f"{error}: {alive}") from None
    opened = {fd: what for fd, what in watch.descriptors(os.getpid()).items() if fd not in before}
    assert not opened, f"descriptors left open: {opened}"
    files = list(_own_scratch.iterdir())
    assert not files, f"files left behind: {files}"


def _no_children() -> bool:
    children = watch.children()
    for child in children:
        try:
            if child.status() == psutil.STATUS_ZOMBIE and child.ppid() == os.getpid():
                os.waitpid(child.pid, os.WNOHANG)
        except (psutil.NoSuchProcess, ChildProcessError):
            continue  # it has gone meanwhile
    return not children


@dataclass(frozen=True, slots=True)
class Gate:
    """What imports of the handler `gated` wait for, and whatever else locks the file: `fcntl.flock(file, fcntl.LOCK_SH)`."""

    file: Path

    @property
    def environment(self) -> dict[str, str]:
        """Tells a daemon of it."""
        return {"GATE": str(self.file)}

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Who comes there during the block waits for its end."""
        with self.file.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    """One that is open."""
    file = tmp_path / "gate"
    file.touch()
    return Gate(file)


@pytest.fixture
def module(tmp_path: Path) -> Callable[[str], Path]:
    """A function that writes ``mine.py`` (a handler module, and again to change it) and returns its folder."""

    def write(source: str) -> Path:
        (tmp_path / "mine.py").write_text(source)
        return tmp_path

    return write
