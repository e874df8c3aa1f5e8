"""``python -m prefork`` is the same program as ``prefork``."""

from prefork.cli import entry

if __name__ == "__main__":
    entry()
