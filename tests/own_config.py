"""A config that names no preset."""

from dvinv.configuration import base_config


def get_config():
    """All defaults."""
    return base_config()
