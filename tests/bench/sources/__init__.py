"""Programs that the benchmarks run beside prefork, and handlers. None is imported by name from here but `handlers`."""
