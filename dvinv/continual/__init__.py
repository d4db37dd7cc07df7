"""The task `continual`: class-incremental learning without real images of old classes."""
