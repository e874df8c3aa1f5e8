"""Echo whose import waits as long as the file $GATE is locked (`tests.conftest.Gate`); without one it does not."""

import fcntl
import os

from prefork.examples.echo import loop

__all__ = ["loop"]
with open(os.environ.get("GATE", os.devnull)) as gate:
    fcntl.flock(gate, fcntl.LOCK_SH)
