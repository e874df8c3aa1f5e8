"""Handlers that work out of the box: ``prefork serve --module echo:loop``."""
