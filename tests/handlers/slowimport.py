"""Echo whose import takes as long as $IMPORT_SECONDS says."""

import os
import time

from prefork.examples.echo import loop

__all__ = ["loop"]
time.sleep(float(os.environ.get("IMPORT_SECONDS", "0")))
