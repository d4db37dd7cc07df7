"""The task `continual`: a network learns new classes and never sees a real image of an old one again."""
