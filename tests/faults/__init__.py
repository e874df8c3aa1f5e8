"""Kill, stop, starve, fill, lie: and count."""
