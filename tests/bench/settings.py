"""How much of everything: the full counts, and those of a smoke test, which shows only that everything runs."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Settings:
    """``seconds`` is one server's turn; in a round each server has one. ``peers``: those beside prefork; None for all."""

    rounds: int = 5
    seconds: float = 2.0
    reset: bool = False
    peers: tuple[str, ...] | None = None
    # Sizes in the names of workloads are what they say when this is 1.
    shrink: int = 1
    held: int = 10_000
    restored: int = 200
    events: int = 50
    starts: int = 20
    storms: int = 5
    # The default, as the master looks so often while there are more workers than wanted.
    spare_timeout: float = 10.0
    watch_seconds: float = 20.0
    idle_seconds: float = 60.0
    steady_seconds: float = 60.0

    def size(self, full: int) -> int:
        """A number of clients or of their connections."""
        return max(1, full // self.shrink)


FULL = Settings()
SMOKE = replace(
    FULL,
    rounds=1,
    seconds=0.2,
    shrink=20,
    held=100,
    restored=2,
    events=2,
    starts=1,
    storms=1,
    spare_timeout=0.5,
    watch_seconds=0.3,
    idle_seconds=0.5,
    steady_seconds=0.5,
)
