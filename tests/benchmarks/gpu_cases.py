"""What the tests of gpu.py have in common; conftest.py imports it first, so that tests can import what is in benchmarks/."""

import sys
import time
from pathlib import Path

import pytest
from smoke import ROOT

sys.path.append(str(ROOT / 'benchmarks'))
import gpu_stage
from gpu_report import Report, nulls, place_of
from gpu_stage import Context, Settings

read_by_flags = pytest.mark.filterwarnings('ignore:the load_module')  # ml_collections reads config files by it


def context_of(settings: Settings, stage: str, seconds: float = 60.0) -> Context:
    """Returns what a stage measures with."""
    return Context(stage, settings, settings.report(stage), time.monotonic() + seconds)


def reasons(entry: dict) -> dict[str, str | None]:
    """Returns the reason of every figure of an item that is null."""
    places = {path: place_of(path, entry['missing']) for path in nulls(entry['figures'])}
    return {path: None if place is None else entry['missing'][place] for path, place in places.items()}


def measured(folder: Path, stage: str = 'peak', card: str = 'NVIDIA X100', rehearsal: bool = False) -> Path:
    """Writes a stage's file as an earlier call left it."""
    folder.mkdir(parents=True, exist_ok=True)
    report = Report([folder / f'{stage}.json'], stage, gpu_stage.items_of(stage, False), card, rehearsal)
    name = report.names()[0]
    report.begin(name)
    report.record(name, {})
    report.excuse(name, 'a stand-in')
    report.finish(name)
    return folder / f'{stage}.json'
