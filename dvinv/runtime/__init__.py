"""The services that all tasks use: devices, processes, the work directory, checkpoints, metrics and progress."""
