"""The daemon as a Python object: what `prefork serve` runs, with its options as keywords.

    from prefork import Server

    Server("echo:loop", bind="127.0.0.1:7000", workers=8).run()

The process that calls `run` becomes the master: it handles signals and waits in it until it is stopped. The handler is imported
elsewhere, in the fork server, and from its module's file, so that a reload sees new code.
"""

import gc
import itertools
import sys
import threading
from typing import Any

from prefork.config import Sources, environment, variable
from prefork.errors import ConfigError, RefusedError
from prefork.system import process, signals


class Server:
    """A daemon that has not been started yet.

    ``module`` is MODULE:ATTR. Options are those of the configuration, under the same names and of the same types (a number, text
    as on the command line, a list of addresses for ``bind``); they beat the environment (``PREFORK_*``), which beats the file
    that ``config`` (or ``PREFORK_CONFIG``) names. Raises ConfigError, at once, for an option or a value that can't be.
    """

    def __init__(self, module: str | None = None, *, config: str | None = None, **options: Any) -> None:
        if module is not None:
            options["module"] = module
        given = environment()
        self._sources = Sources(environment=given, file=config or given.get(variable("config")), keywords=options)
        self._sources.load()

    def run(self) -> int:
        """Serve until stopped, and return 0; 70 after an error of prefork's own.

        Raises PreforkError when the start fails, RefusedError where a daemon can't live: not in the main thread, beside other
        threads (a fork copies none of them); ConfigError in a process that has imported the handler's module already. Signal
        handlers and mask are afterwards what they were before.
        """
        from prefork.commands import obey  # noqa: PLC0415 - a process that only builds a Server needs none of it
        from prefork.master import HANDLED, Master  # noqa: PLC0415

        if threading.current_thread() is not threading.main_thread() or threading.active_count() > 1:
            raise RefusedError("Server.run() needs a process without other threads: a fork copies none of them")
        module = self._sources.load().module.partition(":")[0]
        if not sys.modules.keys().isdisjoint(itertools.accumulate(module.split("."), "{}.{}".format)):
            raise ConfigError(
                f"module = {module!r}, or its package, is imported in this process already; a reload would not see new code: call "
                'Server.run() from a file that does not import the handler, or below `if __name__ == "__main__":`'
            )
        process.open_standard_descriptors()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()  # else every fork would write it once more
        gc.collect()  # what is garbage here would close, in the forks, descriptors that are others by then
        with signals.kept(HANDLED), process.private():
            master = Master(self._sources, obey)
            try:
                master.start()
                return master.run()
            finally:
                master.daemon.let_go()
