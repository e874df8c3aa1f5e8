"""The README's page for operators, from top to bottom, as printed, on a machine that has nothing of it yet."""

import os
import re
import shutil
from pathlib import Path

import pytest

from tests import watch
from tests.systemd.machine import Machine, booted, missing

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
# Packages are the machine's own, which is not ours to change.
NOT_HERE = "apt-get "


def page() -> list[str]:
    """The commands of the page, in its order."""
    [section] = re.findall(r"^## As a service$(.*?)^## ", README, re.MULTILINE | re.DOTALL)
    return re.findall(r"^    (\S.*)$", section, re.MULTILINE)


def checkout(machine: Machine) -> None:
    """A checkout there; what is tested is a wheel in CI, and then that is installed."""
    place = machine.root / "root/prefork"
    place.mkdir(parents=True)
    for name in ("conf", "systemd", "prefork", "README.md", "LICENSE", "pyproject.toml"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, place / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, place / name)
    if wheel := os.environ.get("WHEEL"):
        shutil.copy(wheel, place)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_page_for_operators_from_top_to_bottom(tmp_path: Path) -> None:
    if (reason := missing()) is not None:
        assert os.environ.get("CI") != "true", reason
        pytest.skip(reason)
    for port in (7000, 7001):
        if not watch.is_free(port):
            assert os.environ.get("CI") != "true", port
            pytest.skip(f"somebody has port {port}")
    ran = []
    with booted(tmp_path, install=False) as machine:
        checkout(machine)
        for command in page():
            if command.startswith(NOT_HERE):
                continue
            if "WHEEL" in os.environ:
                command = command.replace("pip install .", "pip install ./*.whl").replace("-U .", "-U ./*.whl")  # noqa: PLW2901
            done = machine.run(f"cd /root/prefork && PATH=$PATH:/usr/local/bin && {command}")
            ran.append(command)
            if " nc " in command:
                assert done.stdout == "hello\n", command
            if command == "systemctl status prefork@echo":
                assert 'Status: "8 acceptors, 0 busy, 0.' in done.stdout, done.stdout
            if command == "prefork status echo":
                assert "echo  running  echo:loop" in done.stdout
            if "prefork upgrade" in command:
                assert "upgraded: " in done.stdout
        shown = machine.show("prefork@echo", "ActiveState", "NRestarts", "Result")
        assert shown == {"ActiveState": "inactive", "NRestarts": "0", "Result": "success"}
    assert len(ran) == 17
