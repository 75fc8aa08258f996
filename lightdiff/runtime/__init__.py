"""What every stage runs on: processes, devices, signals, progress, work in other threads."""
