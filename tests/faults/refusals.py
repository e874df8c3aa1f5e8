"""accept() and fork() that fail as ordered, or are late: refuse.c, compiled on the spot, preloaded, and told by a shared file."""

import mmap
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests import watch

SOURCE = Path(__file__).with_name("refuse.c")
# struct orders of refuse.c: so many ints.
_ACCEPT_ERRNO, _ACCEPTS, _FORK_ERRNO, _FORKS, _FORK_PID, _LATE, _HELD = range(7)
_INTS = 7


@dataclass(frozen=True, slots=True)
class Refusals:
    """What is refused. ``environment`` preloads it into a daemon."""

    environment: dict[str, str]
    _orders: memoryview

    def accepts(self, errno: int, count: int) -> None:
        """The next so many accepts fail, whosever they are."""
        self._orders[_ACCEPT_ERRNO] = errno
        self._orders[_ACCEPTS] = count

    def forks(self, pid: int, errno: int, count: int) -> None:
        """The next so many forks of this process fail."""
        self._orders[_FORK_ERRNO] = errno
        self._orders[_FORK_PID] = pid
        self._orders[_FORKS] = count

    def late(self, milliseconds: int) -> None:
        """From now on accepts are entered so much later, and what signals come meanwhile is not seen by the kernel's part."""
        self._orders[_LATE] = milliseconds

    def held(self, milliseconds: int) -> None:
        """From now on accepts come back with a connection so much later than they have got it."""
        self._orders[_HELD] = milliseconds

    @property
    def left(self) -> int:
        """Refusals that nobody has met yet."""
        return int(self._orders[_ACCEPTS] + self._orders[_FORKS])


def compiled(source: Path, folder: Path) -> Path:
    """The shared library, to be preloaded."""
    watch.needs("cc")
    library = folder / source.with_suffix(".so").name
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", library, source, "-ldl"], check=True)
    return library


@contextmanager
def refusals(folder: Path) -> Iterator[Refusals]:
    """A daemon that is started with this environment is refused nothing, until it is ordered."""
    library, file = compiled(SOURCE, folder), folder / "orders"
    file.write_bytes(bytes(4 * _INTS))
    with (
        file.open("r+b") as opened,
        mmap.mmap(opened.fileno(), 4 * _INTS) as orders,
        memoryview(orders) as view,
        view.cast("i") as ints,
    ):
        yield Refusals({"LD_PRELOAD": str(library), "REFUSE_FILE": str(file)}, ints)
