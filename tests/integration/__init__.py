"""The real command line and real processes."""
