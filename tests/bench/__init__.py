"""What prefork costs, beside what a user would take instead; see `tests/bench/__main__.py`."""
