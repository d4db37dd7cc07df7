"""The ground floor: devices, the work directory, checkpoints, metrics, progress, and the report page."""
