"""Clients that are programs: run again and again, in threads, until the block ends."""

import subprocess
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self


class Programs:
    """``clients`` threads that call ``use``, which makes connections and gives their number, or raises."""

    def __init__(self, use: Callable[[], int], clients: int = 2) -> None:
        self.connections = 0
        self.failures: list[str] = []
        self._use = use
        self._count = threading.Lock()
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(clients)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                made = self._use()
            except (OSError, ValueError) as error:
                self.failures.append(str(error))
                return
            with self._count:
                self.connections += made


def output(*command: str) -> str:
    """What a program has written. Raises ValueError when it has failed."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise ValueError(f"{command} ended with {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout
