"""``python -m prefork`` is the same program as ``prefork``."""

import os
import sys


def _leave_the_working_directory_to_handlers() -> None:
    """Python puts it first on the path for ``-m``: a json.py of the user's would be the master's, which runs no user code."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return  # it was removed, and Python has put nothing there
    here, first = os.path.dirname(os.path.dirname(os.path.abspath(__file__))), sys.path[0]
    if not sys.flags.safe_path and not (os.path.isdir(first) and os.path.samefile(first, here)):
        del sys.path[0]


if __name__ == "__main__":
    _leave_the_working_directory_to_handlers()
    from prefork.entry import entry

    entry()
