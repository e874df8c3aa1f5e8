"""``python -m prefork`` is the same program as ``prefork``."""

from prefork.cli import main

if __name__ == "__main__":
    main()
