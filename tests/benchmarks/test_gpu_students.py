"""benchmarks/gpu_students.py: its plan, and which runs are scored on test images."""

import time
from pathlib import Path

import gpu_students
import pytest
from gpu_cases import read_by_flags
from gpu_report import read_json

from dvinv.config import parse


@read_by_flags
@pytest.mark.parametrize('name', gpu_students.runs())
def test_the_flags_of_every_student_are_a_config(config_of, name):
    plan = gpu_students.runs()
    tried = plan[name].best_of
    chosen = gpu_students.LARGE[tried[0]] if tried else ()
    config = config_of(gpu_students.flags_of(plan[name], Path('data'), Path('runs'), chosen))
    parse(config)
    assert ('test1000' in config.data.path or 'test_jpeg' in config.data.path) == (plan[name].data != 'validation')
    assert not set(tried) - {each for each, planned in plan.items() if planned.data == 'validation'}
    assert {plan[name].pool_of, plan[name].network_of} <= {'', *plan}
    assert config.pool == (f'runs/{plan[name].pool_of}/pool' if plan[name].pool_of else '')


class StandInRun:
    """Ends at once; every work directory reads more of the images than the one before it. 'gn' fails."""

    def __init__(self, workdir: Path, flags: list[str], memory_share: float):
        """Takes what `gpu_runs.Run` takes."""
        self.flags, self.seconds, self.status = flags, 1.0, 1 if workdir.name == 'gn' else 0
        (workdir / 'pool').mkdir(parents=True, exist_ok=True)
        self.results = {'distillation': {'test_accuracy': len(list(workdir.parent.iterdir())) / 100}}

    def explain(self) -> str:
        """Says why it ended."""
        return 'it failed'


def test_the_best_on_validation_images_is_scored_on_test_images(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_students, 'Run', StandInRun)
    monkeypatch.setattr(gpu_students, 'LEAST', 0.0)
    plan = gpu_students.runs()
    queue = gpu_students.Queue(plan, tmp_path / 'runs', tmp_path, Path('data'), 16)
    (tmp_path / 'runs').mkdir()
    queue.run(time.monotonic() + 60)
    assert set(plan) - set(queue.done) == {'gn_free'}  # its teacher could not be trained
    best = gpu_students.best_of(tuple(gpu_students.LARGE), queue.done)
    assert {f'--config.{flag}' for flag in gpu_students.LARGE[best]} < set(queue.done['resnet8_seed1']['command'].split())
    assert 'Not started: gn_free.' in capsys.readouterr().out
    assert read_json(tmp_path / 'students.json') == queue.done
