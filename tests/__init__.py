"""The tests. `pytest` runs the suite; `python -m tests.faults` the long campaigns."""
