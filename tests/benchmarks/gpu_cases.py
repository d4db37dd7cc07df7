"""What the tests of gpu.py have in common."""

import time

import pytest
from gpu_report import nulls, place_of
from gpu_stage import Context, Settings

read_by_flags = pytest.mark.filterwarnings('ignore:the load_module')  # ml_collections reads config files by it


def context_of(settings: Settings, stage: str, seconds: float = 60.0) -> Context:
    """Returns what a stage measures with."""
    return Context(stage, settings, settings.report(stage), time.monotonic() + seconds)


def reasons(entry: dict) -> dict[str, str | None]:
    """Returns the reason of every figure of an item that is null."""
    places = {path: place_of(path, entry['missing']) for path in nulls(entry['figures'])}
    return {path: None if place is None else entry['missing'][place] for path, place in places.items()}
