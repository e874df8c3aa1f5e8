"""prefork: run a blocking Python network handler in production.

You write ``loop(sock)``; ``prefork serve --module echo:loop`` is everything between the socket and that function.
"""

__version__ = "0.1.0"
