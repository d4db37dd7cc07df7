"""A config that names no preset."""

from dvinv.config import default_config


def get_config():
    """All defaults."""
    return default_config()
