"""What the operating system does for us: processes, signals, the service manager."""
