"""The tests. `pytest` runs the suite; `python -m tests.faults` and `python -m tests.bench` the long campaigns."""
