"""Reloads, upgrades and restarts of a socket-activated service under load, counted by its clients.

``python -m tests.systemd`` runs it with full counts, as root, and prints what they saw.
"""

import time
from dataclasses import dataclass

from tests import watch
from tests.load import Load
from tests.systemd.machine import Service


@dataclass(frozen=True, slots=True)
class Figures:
    """What clients saw of it. ``worst``: the longest wait for an answer, in seconds."""

    reloads: int
    upgrades: int
    restarts: int
    connections: int
    failures: dict[str, int]
    refused: int
    worst: float
    took: float


def run(service: Service, reloads: int, upgrades: int, restarts: int, clients: int = 4) -> Figures:
    """All of them, one after the other; ``service`` has its socket and no other address."""
    # Restarts come faster here than the unit allows starts.
    service.drop_in("service", "[Unit]\nStartLimitIntervalSec=0\n")
    begun = time.monotonic()
    steps = {"systemctl reload": reloads, "prefork upgrade": upgrades, "systemctl restart": restarts}
    assert service.says() == b"hello"
    with Load(("127.0.0.1", service.port), clients=clients) as load:
        for step, count in steps.items():
            program, verb = step.split()
            for _ in range(count):
                before = load.connections
                watch.until("clients are served", lambda before=before: load.connections > before + clients)  # type: ignore[misc]
                (service.systemctl if program == "systemctl" else service.prefork)(verb)
                after = load.connections
                watch.until("clients are served", lambda after=after: load.connections > after + clients)  # type: ignore[misc]
    return Figures(
        reloads,
        upgrades,
        restarts,
        load.connections,
        load.classes,
        load.refused,
        round(load.worst, 3),
        round(time.monotonic() - begun, 1),
    )
