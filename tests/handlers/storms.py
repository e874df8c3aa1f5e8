"""Workers that end as soon as they have become acceptors, as the environment says, and one that kills its fork server."""

import os
import signal
import threading
import time

from prefork import worker
from prefork.pool import scoreboard

HOW = os.environ["HOW"]


def start() -> None:
    """The hook on_worker_start: a background thread, like that of a C library that crashes as soon as it runs."""
    threading.Thread(target=end, args=(os.getppid(),), daemon=True).start()


def end(fork_server: int) -> None:
    """Once it waits in accept(): a generation whose workers end before it is committed is refused."""
    here = worker._here
    assert here is not None
    while here.board.states[here.slot] != scoreboard.IDLE:
        time.sleep(0.001)
    time.sleep(0.01)
    match HOW:
        case "signal":
            os.kill(os.getpid(), signal.SIGKILL)
        case "status 0":
            os._exit(0)
        case "status 1":
            os._exit(1)
        case "fork server":
            os.kill(fork_server, signal.SIGKILL)


def loop(_sock: object) -> None:
    """It comes to no connection."""
