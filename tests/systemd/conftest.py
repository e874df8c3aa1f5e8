"""One systemd for all tests of a process, and a service of its own for each."""

import itertools
import os
from collections.abc import Callable, Iterator

import pytest

from tests import watch
from tests.systemd.machine import Machine, Service, booted, missing

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory, _own_scratch: object) -> Iterator[Machine]:
    """A running systemd with prefork and its units."""
    if (reason := missing()) is not None:
        assert os.environ.get("CI") != "true", reason
        pytest.skip(reason)
    with booted(tmp_path_factory.mktemp("systemd")) as running:
        yield running


@pytest.fixture
def service(machine: Machine) -> Iterator[Service]:
    """An instance that is configured (echo, two workers, a free port) and not started."""
    made = Service(machine, f"t{next(_numbers)}", watch.free_port())
    made.configure(bind=[f"127.0.0.1:{made.port}"])
    yield made
    made.remove()


@pytest.fixture
def handler(machine: Machine) -> Iterator[Callable[[str], None]]:
    """A function that writes the module ``mine``, which every service finds."""
    [packages] = machine.root.glob("opt/prefork/venv/lib/python*/site-packages")

    def write(code: str) -> None:
        (packages / "mine.py").write_text(code)

    yield write
    (packages / "mine.py").unlink(missing_ok=True)
