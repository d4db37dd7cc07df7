"""The work directory: one run, one process, one config; results and time survive a kill."""

import contextlib
import json

import jax
import pytest

from dvinv.runtime import workdir as workdir_module
from dvinv.runtime.errors import DvinvError
from dvinv.runtime.workdir import Workdir, holds_work


def config(**changes):
    return {
        'seed': 0,
        'tasks': ('teacher',),
        'devices': 1,
        'logging': {'every': 5},
        'teacher': {'width': 1.0, 'mean': (0.5,)},
        'stages': ({'iterations': 5},),
        **changes,
    }


def begun(path):
    """A run has made something in this folder."""
    (path / 'networks').mkdir()
    (path / 'networks' / 'teacher.safetensors').touch()


def refusal(path, config):
    with pytest.raises(DvinvError) as caught:
        Workdir(path, config)
    return str(caught.value)


def files(path):
    return {str(file): file.read_bytes() for file in path.rglob('*') if file.is_file()}


# Config


def test_another_config_is_refused_and_its_keys_named(tmp_path):
    Workdir(tmp_path, config()).close()
    begun(tmp_path)
    before = files(tmp_path)
    message = refusal(tmp_path, config(seed=1, stages=({'iterations': 6},)))
    assert 'seed (0 there, 1 here)' in message
    assert 'stages[0].iterations (5 there, 6 here)' in message
    assert 'teacher' not in message
    assert 'Choose another --workdir' in message
    assert files(tmp_path) == before


def test_a_key_that_only_one_config_has_is_named(tmp_path):
    Workdir(tmp_path, config()).close()
    begun(tmp_path)
    assert "pool ('absent' there, 'x' here)" in refusal(tmp_path, config(pool='x'))


@pytest.mark.parametrize(
    ('name', 'value', 'words'),
    [
        ('jax_enable_x64', True, 'jax_enable_x64 False there, True here'),
        ('jax_default_prng_impl', 'rbg', 'JAX_DEFAULT_PRNG_IMPL=threefry2x32 in the environment'),
        ('jax_threefry_partitionable', False, 'JAX_THREEFRY_PARTITIONABLE=True in the environment'),
        ('jax_default_matmul_precision', 'high', 'no JAX_DEFAULT_MATMUL_PRECISION in the environment'),
        ('jax_numpy_dtype_promotion', 'strict', 'JAX_NUMPY_DTYPE_PROMOTION=standard in the environment'),
    ],
)
def test_a_run_does_not_go_on_under_settings_of_jax_that_change_its_images(tmp_path, name, value, words):
    Workdir(tmp_path, config()).close()
    begun(tmp_path)
    before, usual = files(tmp_path), getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        message = refusal(tmp_path, config())
    finally:
        jax.config.update(name, usual)
    assert words in message
    assert files(tmp_path) == before
    Workdir(tmp_path, config()).close()


def test_what_an_older_run_did_not_record_is_no_difference(tmp_path, capsys):
    Workdir(tmp_path, config()).close()
    recorded = json.loads((tmp_path / 'versions.json').read_text())
    (tmp_path / 'versions.json').write_text(json.dumps({key: recorded[key] for key in ('dvinv', *workdir_module.PACKAGES)}))
    Workdir(tmp_path, config()).close()
    assert capsys.readouterr().err == ''
    assert json.loads((tmp_path / 'versions.json').read_text()) == recorded


def test_flags_of_xla_that_change_bits_are_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('XLA_FLAGS', '--xla_dump_to=a --xla_force_host_platform_device_count=4')
    Workdir(tmp_path, config()).close()
    monkeypatch.setenv('XLA_FLAGS', '--xla_dump_to=b')
    Workdir(tmp_path, config()).close()
    assert capsys.readouterr().err == ''
    monkeypatch.setenv('XLA_FLAGS', '--xla_cpu_enable_fast_math=true')
    Workdir(tmp_path, config()).close()
    assert (
        'goes on under other versions: XLA_FLAGS none there, --xla_cpu_enable_fast_math=true here' in capsys.readouterr().err
    )


def test_many_differing_keys_are_counted(tmp_path):
    Workdir(tmp_path, config(**{f'k{i}': 0 for i in range(12)})).close()
    begun(tmp_path)
    assert 'and 4 more' in refusal(tmp_path, config(**{f'k{i}': 1 for i in range(12)}))


def test_what_no_result_depends_on_may_change(tmp_path):
    Workdir(tmp_path, config()).close()
    begun(tmp_path)
    verifiers = ({'network': 'resnet32', 'weights': 'w.npz'},)
    changes = {'tasks': ('synthesis', 'report'), 'devices': 8, 'logging': {'every': 7}, 'verifiers': verifiers}
    Workdir(tmp_path, config(synthesis={'controls': ('noise',)}, **changes)).close()  # older runs have no such key
    assert json.loads((tmp_path / 'config.json').read_text())['tasks'] == ['synthesis', 'report']
    Workdir(tmp_path, config(synthesis={'controls': ()})).close()
    assert 'synthesis.controls_of' in refusal(tmp_path, config(synthesis={'controls_of': ()}))


@pytest.mark.parametrize('name', ['config.json', 'times.json', 'results.json'])
def test_a_damaged_file_is_named(tmp_path, name):
    Workdir(tmp_path, config()).close()
    begun(tmp_path)
    (tmp_path / name).write_text('{"seed": 0')
    with pytest.raises(DvinvError, match=rf'{name} is damaged'), contextlib.closing(Workdir(tmp_path, config())) as workdir:
        workdir.results  # noqa: B018


@pytest.mark.parametrize('name', ['file', 'file/below'])
def test_a_file_is_no_work_directory(tmp_path, name):
    (tmp_path / 'file').write_text('mine')
    assert f'--workdir {tmp_path / name} cannot be written to' in refusal(tmp_path / name, config())
    assert (tmp_path / 'file').read_text() == 'mine'


def test_the_folder_of_several_seeds_is_no_work_directory(tmp_path):
    (tmp_path / 'seed-0').mkdir()
    (tmp_path / 'seed-0' / 'results.json').write_text('{}')
    assert 'holds the runs of several seeds' in refusal(tmp_path, config())
    assert [path.name for path in tmp_path.iterdir()] == ['seed-0']


@pytest.mark.parametrize('left', ['', 'pool/.shard-000000.npz.tmp', 'metrics.jsonl', 'notes.txt'])
def test_a_start_that_made_nothing_does_not_lock_its_folder(tmp_path, left):
    first = Workdir(tmp_path, config())
    first.start_clock('teacher')
    first.wall_seconds('teacher')
    first.close()
    if left:
        (tmp_path / left).parent.mkdir(exist_ok=True)
        (tmp_path / left).write_text('{"task": "teacher", "series": "teacher", "step": 5}\n')
    assert not holds_work(tmp_path)
    with contextlib.closing(Workdir(tmp_path, config(seed=1))) as workdir:
        assert workdir.read_json('config.json', None)['seed'] == 1
        assert not [*workdir.metrics.lines('teacher', 'teacher')]
        assert workdir.read_json('times.json', None) is None
        workdir.add_results('teacher', {})
    assert holds_work(tmp_path)
    assert 'seed (1 there, 2 here)' in refusal(tmp_path, config(seed=2))


# Lock


def test_a_second_process_is_refused_until_the_first_is_done(tmp_path):
    first = Workdir(tmp_path, config())
    assert f'Another run is under way in {tmp_path}' in refusal(tmp_path, config())
    first.close()
    Workdir(tmp_path, config()).close()


# Results and clock


def test_results_of_earlier_tasks_are_kept(tmp_path):
    workdir = Workdir(tmp_path, config())
    workdir.add_results('teacher', {'test_accuracy': 0.5})
    workdir.close()
    workdir = Workdir(tmp_path, config())
    workdir.add_results('synthesis', {'images': 3})
    workdir.close()
    assert (
        json.loads((tmp_path / 'results.json').read_text())
        == workdir.results
        == {'teacher': {'test_accuracy': 0.5}, 'synthesis': {'images': 3}}
    )


def test_time_spent_before_a_kill_counts(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(workdir_module.time, 'monotonic', lambda: now[0])
    killed = Workdir(tmp_path, config())
    killed.start_clock('teacher')
    now[0] += 7
    killed.metrics.append('teacher', 'teacher', [{'step': 1, 'loss': 0.5}])  # a measurement remembers the time
    killed.close()
    now[0] = 5000.0
    workdir = Workdir(tmp_path, config())
    workdir.start_clock('teacher')
    now[0] += 3
    assert workdir.wall_seconds('teacher') == 10
    workdir.close()
