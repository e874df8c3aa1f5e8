"""Handlers, each of a few lines, that tests serve."""
