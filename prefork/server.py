"""The daemon as a Python object: what `prefork serve` runs, with its options as keywords.

    from prefork import PreforkError, Server

    try:
        status = Server("echo:loop", bind="127.0.0.1:7000", workers=8).run()
    except PreforkError as error:
        print(f"prefork: {error}", file=sys.stderr)
        status = error.exit_code
    sys.exit(status)

The process that calls `run` becomes the master: it handles signals and waits in it until it is stopped. The handler is imported
elsewhere, in the fork server, and from its module's file, so that a reload sees new code.
"""

import gc
import itertools
import sys
import threading
from types import ModuleType
from typing import Any

from prefork.config import Sources, environment, variable
from prefork.errors import ConfigError, RefusedError, explained
from prefork.system import process, signals


class Server:
    """A daemon that has not been started yet.

    ``module`` is MODULE:ATTR, as text: no function, which would be imported here. Options are those of the configuration, under the
    same names and of the same types (a number, text as on the command line, a list of addresses for ``bind``); they beat the
    environment (``PREFORK_*``), which beats the file that ``config`` (or ``PREFORK_CONFIG``) names. Raises ConfigError, at once,
    for an option or a value that can't be.
    """

    def __init__(self, module: str | None = None, *, config: str | None = None, **options: Any) -> None:
        if module is not None:
            options["module"] = module
        if not isinstance(options.get("module", ""), str):
            raise ConfigError(_no_name(options["module"]))
        given = environment()
        self._sources = Sources(environment=given, file=config or given.get(variable("config")), keywords=options)
        self._sources.load()

    def run(self) -> int:
        """Serve until stopped, and return the exit status that `prefork serve` has: 0, and 70 after an error of prefork's own.

        Raises a PreforkError, whose ``exit_code`` is that of `prefork serve`, when the start fails: ConfigError for a setting (also
        in a process that has imported the handler's module already), HandlerError for a handler that can't be imported or used,
        AddressError for an address that can't be bound (InUseError: another process has it), NotPermittedError for what the
        operating system does not allow, RefusedError where a daemon can't live: not in the main thread, beside other threads (a
        fork copies none of them), or where the kernel refuses a process or a descriptor. Signal handlers and mask are afterwards
        what they were before.
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
            except OSError as error:  # as a command of the kernel's refusal is told
                raise RefusedError(explained(error) + (f": {error.filename}" if error.filename else "")) from error
            finally:
                master.daemon.let_go()


def _no_name(found: Any) -> str:
    """What is to be given instead of an object: its name, where it has one by which another process can import it."""
    module, name = getattr(found, "__module__", None), getattr(found, "__qualname__", None)
    if isinstance(found, ModuleType):
        what = f'"{found.__name__}:ATTR"'
    elif not isinstance(module, str) or not isinstance(name, str) or "<" in name:
        what = 'MODULE:ATTR as text, like "mine:loop", of a file of its own (mine.py) that has it at the top'
    elif module == "__main__":
        what = f'"mine:{name}", with {name} in a file of its own (mine.py), not in the program itself'
    else:
        what = f'"{module}:{name}", and do not import it here'
    return f"prefork.Server was given a {type(found).__name__}, and the fork server imports the handler by its name: pass {what}"
