"""The standard library's functions, as they were before user code.

gevent and eventlet put functions of their own into `os`, `signal`, `select`, `time`, `socket` and `threading`, and take some away
(``select.poll``). Supervision and the accept loop must go on with the kernel's: a fork server that waits in a patched poll never
hears of its workers' deaths. So before user code is imported, each of our modules is given copies of those modules, as they are
then. User code finds the real ones, and changes those.

What this does not reach: functions of the standard library that call each other, like `traceback` reading a source file.
"""

import sys
from types import ModuleType

_CHANGED = ("_thread", "os", "select", "selectors", "signal", "socket", "threading", "time")
_OURS = __name__.partition(".")[0]
# The bundled examples are handlers.
_USER_CODE = f"{_OURS}.examples"


def keep() -> None:
    """Whatever is put into those modules from now on, prefork's own modules do not see it."""
    copies = {sys.modules[name]: _copy(sys.modules[name]) for name in _CHANGED if name in sys.modules}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != _OURS or name.startswith(_USER_CODE):
            continue
        names = vars(module)
        names.update({key: copies[value] for key, value in names.items() if isinstance(value, ModuleType) and value in copies})


def _copy(module: ModuleType) -> ModuleType:
    copy = ModuleType(module.__name__, module.__doc__)
    vars(copy).update(vars(module))
    return copy
