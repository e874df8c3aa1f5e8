"""Libraries that others have written, as handlers, each with a client that others have written. What they need is `.[compat]`."""
