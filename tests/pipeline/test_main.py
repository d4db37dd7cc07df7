"""The whole chain from the command line and from Python: every task, once; what is finished is not done again."""

import contextlib
import json
import re
import shutil

import factories
import jax
import numpy as np
import pytest
from smoke import NAMES, flip, lasting, smoke_config, smoke_run
from tiny import IMAGE_SHAPE, trained_variables

import dvinv
from dvinv.config import parse
from dvinv.data.pool import ImagePool
from dvinv.distillation import task as distillation
from dvinv.distillation.student import hints_of, job_of, student_of
from dvinv.evaluation import top_accuracy
from dvinv.networks import create, load_classifier, load_network, save_network
from dvinv.pipeline import tasks
from dvinv.pipeline import tasks as pipeline
from dvinv.pipeline.run import Run
from dvinv.runtime.errors import DvinvError
from dvinv.synthesis import pools, synthesizer
from dvinv.training.step import rounds_of
from dvinv.training.trainer import train_network

STUDENTS = {'student', 'noise', 'prior_only', 'real'}
TEACHER_ALONE = {'tasks': ('teacher',)}
MODIFIED = ('pool', 'networks', 'controls', 'results.json', 'metrics.jsonl')


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run, to be changed."""
    return shutil.copytree(finished, tmp_path / 'run')


@pytest.fixture
def taught(run):
    """A copy of a run of which only the task teacher is finished."""
    for name in ('pool', 'controls', 'checkpoints', 'samples'):
        shutil.rmtree(run / name)
    for name in STUDENTS:
        (run / 'networks' / f'{name}.safetensors').unlink()
    (run / 'results.json').write_text(json.dumps({'teacher': json.loads((run / 'results.json').read_text())['teacher']}))
    return run


def results(workdir):
    return json.loads((workdir / 'results.json').read_text())


# What a run leaves


def test_results_have_the_fixed_names(finished):
    written = results(finished)
    assert set(written) == set(NAMES)
    for task, names in NAMES.items():
        assert names <= set(written[task])
        words = {'hints', 'hinted_stages', 'statistics'}  # and a table
        assert all(isinstance(value, int | float) for name, value in written[task].items() if name not in words)
    assert (written['distillation']['hints'], written['distillation']['hinted_stages']) == ('none', [])
    assert written['teacher']['test_images'] == 360
    assert written['synthesis']['images'] == written['distillation']['images'] == 40
    assert written['synthesis']['iterations'] == 5
    assert written['distillation']['updates'] == 20
    assert all(0 <= value <= 1 for figures in written.values() for name, value in figures.items() if 'accuracy' in name)


def test_every_network_is_there(finished):
    assert {path.stem for path in (finished / 'networks').iterdir()} == {'teacher', 'verifier', *STUDENTS}


def test_metrics_tell_every_training_and_sidecars_every_batch(finished):
    lines = [json.loads(line) for line in (finished / 'metrics.jsonl').read_text().splitlines()]
    steps = {}
    for line in lines:
        steps.setdefault((line['task'], line['series']), []).append(line['step'])
    trainings = [('teacher', name) for name in ('teacher', 'verifier')] + [('distillation', name) for name in STUDENTS]
    assert steps == {key: [5, 10, 15, 20] for key in trainings}
    for folder in ('pool', 'controls/prior_only'):
        for number in range(2):
            curve = json.loads((finished / folder / f'shard-{number:06d}.json').read_text())['curve']
            assert curve['step'] == [0, 2, 4]
            assert {'loss', 'cross_entropy', 'feature', 'total_variation', 'l2'} <= set(curve)


def test_the_pool_is_read_by_numpy(finished):
    labels = []
    for number in range(2):
        with np.load(finished / 'pool' / f'shard-{number:06d}.npz', allow_pickle=False) as shard:
            assert shard['images'].shape == (20, 8, 8, 1)
            assert shard['images'].dtype == np.uint8
            assert shard['logits'].shape == (20, 10)
            labels += shard['labels'].tolist()
    assert np.bincount(labels).tolist() == [4] * 10


def test_sidecars_tell_how_the_images_were_made(finished):
    told = {
        folder: json.loads((finished / folder / 'shard-000000.json').read_text())['config']
        for folder in ('pool', 'controls/prior_only', 'controls/noise')
    }
    assert [config['method'] for config in told.values()] == ['deepinversion', 'prior_only', 'noise']
    assert told['pool']['weights']['feature'] > told['controls/prior_only']['weights']['feature'] == 0


def test_logits_in_the_pool_are_those_of_the_stored_pixels(finished):
    network = load_classifier(finished / 'networks' / 'teacher.safetensors')
    pool = ImagePool(finished / 'pool', network.digest())
    images, labels, logits = (pool.rows(name)[:] for name in ('images', 'labels', 'logits'))
    again = network.apply_fn(network.variables, network.normalise(images))
    np.testing.assert_allclose(logits, again, rtol=1e-4, atol=1e-4)
    assert results(finished)['synthesis']['teacher_accuracy'] == top_accuracy(logits, labels)


def test_the_report_is_one_page_that_needs_no_other_file(finished):
    page = (finished / 'report.html').read_text().replace('xmlns="http://www.w3.org/2000/svg"', '')
    assert not re.search(r'https?://|url\(|@import|<script|<link', page)
    assert all(source.startswith('data:image/png;base64,') for source in re.findall(r'src="([^"]*)"', page))
    links = [link for link in re.findall(r'href="([^"]*)"', page) if not link.startswith('#')]
    assert 'networks/student.safetensors' in links
    assert all((finished / link).exists() for link in links)
    assert page.count('<img') == 4
    assert page.count('</h2>\n<div class="text"><p>') == page.count('</h2>') - 2  # of Quality and of Networks and time
    assert 'Teacher (rows) and student (columns)' in page
    assert '–' not in page.split('<details')[0]
    assert len(json.loads((finished / 'by_class.json').read_text())['accuracy']['student']) == 10
    quality = json.loads((finished / 'quality.json').read_text())
    assert list(quality) == ['synthesized', 'prior_only', 'noise', 'real']
    assert quality['real']['frechet_distance'] == 0
    assert quality['noise']['frechet_distance'] > 0
    assert 'Fréchet distance' in page
    assert f'{100 * results(finished)["distillation"]["test_accuracy"]:.1f}%' in page


def test_a_loaded_student_scores_what_the_results_say(finished):
    apply_fn, variables = dvinv.load(finished, 'distillation')
    student = load_classifier(finished / 'networks' / 'student.safetensors')
    test = smoke_run().data.test
    x = student.normalise(test.images)
    logits = np.asarray(apply_fn(variables, x))
    np.testing.assert_array_equal(logits, student.apply_fn(student.variables, x))
    assert top_accuracy(logits, test.labels) == pytest.approx(results(finished)['distillation']['test_accuracy'], abs=0.003)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables['params'])) == results(finished)['distillation']['parameters']


def test_controls_are_loaded_by_their_names(tmp_path):
    """Each from a file of its own; which files belong to a task follows from their names."""
    other = {
        'verifier': 'teacher',
        'noise': 'distillation',
        'student_of_20': 'distillation',
        'real_after_5': 'distillation',
        'untuned': 'pruning',
    }
    other |= {'pruned_by_noise': 'pruning', 'pruned_1': 'pruning', 'joint': 'continual', 'finetune_1': 'continual'}
    (tmp_path / 'networks').mkdir()
    for seed, name in enumerate([*other, 'student', 'pruned']):
        module = create('small_convnet', 3, 0.25)
        variables = trained_variables(module, seed=seed)
        about = {'network': 'small_convnet', 'width': 0.25, 'num_classes': 3}
        about |= {'image_shape': IMAGE_SHAPE, 'mean': (0.5, 0.5), 'std': (0.2, 0.2)}
        save_network(tmp_path / 'networks' / f'{name}.safetensors', variables, about)
        other.setdefault(name, {'student': 'distillation', 'pruned': 'pruning'}.get(name))
    for name, task in other.items():
        found = dvinv.load(tmp_path, task, name)[1]
        jax.tree.map(np.testing.assert_array_equal, found, load_network(tmp_path / 'networks' / f'{name}.safetensors')[0])
    pruned, by_noise = (dvinv.load(tmp_path, 'pruning', name)[1] for name in ('', 'noise'))
    jax.tree.map(np.testing.assert_array_equal, by_noise, dvinv.load(tmp_path, 'pruning', 'pruned_by_noise')[1])
    jax.tree.map(np.testing.assert_array_equal, pruned, dvinv.load(tmp_path, 'pruning', 'pruned')[1])
    assert not np.array_equal(jax.tree.leaves(pruned)[0], jax.tree.leaves(by_noise)[0])
    sentence = "The task distillation has no network 'real' in .*; besides .* are noise, real_after_5, student_of_20."
    with pytest.raises(DvinvError, match=sentence):
        dvinv.load(tmp_path, 'distillation', 'real')
    with pytest.raises(DvinvError, match='there are finetune_1, joint'):
        dvinv.load(tmp_path, 'continual', '../student')


def test_what_makes_no_network_cannot_be_loaded(finished, tmp_path):
    with pytest.raises(
        DvinvError,
        match="'synthesis' makes no network; choose one of teacher, distillation, pruning, continual, quantization, option.*"
        r"controls, as in dvinv\.load\(workdir, 'distillation', 'noise'\)",
    ):
        dvinv.load(finished, 'synthesis')
    with pytest.raises(DvinvError, match='is not there'):
        dvinv.load(tmp_path, 'distillation')
    with pytest.raises(DvinvError, match=r'has no teacher of its own: .*teacher\.weights'):
        dvinv.load(tmp_path, 'teacher')


# What is finished, and what is lost


@pytest.mark.slow
def test_the_same_command_does_nothing_again(run, command):
    before = {path: path.stat().st_mtime_ns for name in MODIFIED for path in [run / name, *(run / name).rglob('*')]}
    status, out, err = command('--workdir', run)
    assert status == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    banner = [f'dvinv {dvinv.__version__} with JAX {jax.__version__}', '  devices  8 virtual devices of the CPU']
    banner += [
        '  tasks    teacher, synthesis, distillation, report',
        '  done     teacher, synthesis, distillation: not run again',
    ]
    lines = [line.partition(' (')[0] for line in err.splitlines() if line[:11].strip() or 'not used' not in line]
    assert lines == [*banner, f'  report   {run / "report.html"}']
    tasks = [line.split()[0] for line in out.splitlines()]
    assert tasks == ['teacher'] * 2 + ['synthesis'] * 4 + ['distillation'] * 4 + ['time', 'report', 'all']
    assert re.search(r'^distillation +test_accuracy +\d\.\d+$', out, re.M)
    assert out.splitlines()[-2].split() == ['report', str(run / 'report.html')]


@pytest.mark.slow
def test_what_was_damaged_is_made_again_as_the_sentences_say(run):
    config = smoke_config()
    before, written = lasting(run), results(run)
    (run / 'results.json').write_text(json.dumps({task: written[task] for task in ('teacher', 'synthesis')}))
    shard, network = run / 'pool' / 'shard-000000.npz', run / 'networks' / 'student.safetensors'
    flip(shard)
    flip(network)
    with pytest.raises(DvinvError, match=r'it was moved to .*quarantine; run the command that made the pool again'):
        pipeline.run(config, run)
    assert not shard.exists()
    with pytest.raises(DvinvError, match=r'student\.safetensors is damaged .*; delete it and run the command that made it'):
        pipeline.run(config, run)
    network.unlink()
    (run / 'networks' / 'verifier.safetensors').unlink()
    pipeline.run(config, run)
    after = lasting(run)
    assert after.pop('pool/quarantine/shard-000000.npz') != after['pool/shard-000000.npz']
    assert after.pop('pool/quarantine/shard-000000.json') == after['pool/shard-000000.json']
    lines, repeated = (content.pop('metrics.jsonl').splitlines() for content in (before, after))
    assert after == before
    assert sorted(repeated) == sorted(lines)  # those of what was made again stand at the end


# Parts of a run


@pytest.mark.slow
def test_one_task_alone(taught):
    expected = results(taught)['teacher']['test_accuracy']
    for name in ('results.json', 'report.html'):
        (taught / name).unlink()
    pipeline.run(smoke_config(tasks=('teacher',)), taught)
    assert set(results(taught)) == {'teacher'}
    assert results(taught)['teacher']['test_accuracy'] == expected
    assert not (taught / 'pool').exists()
    assert not (taught / 'report.html').exists()


def test_no_real_image_is_read_while_images_are_made_and_a_student_learns(taught, finished, monkeypatch):
    def refuse(*_):
        raise AssertionError('real data were read')

    run = pipeline.validated(smoke_config(), taught)
    monkeypatch.setattr(Run, 'read_data', refuse)
    with contextlib.closing(run.open_workdir()):
        pool = pools.open_pool(run)
        synthesizer.fill_pool(run, run.teacher, pool, 'deepinversion', 'synthesis', 'deepinversion')
        images, labels = pool.rows('images'), pool.rows('labels')
        target = student_of(run, run.teacher)
        job = job_of(run, run.teacher, rounds_of(run.settings), hints_of(run, run.teacher))
        train_network(run, target, job, images, labels)
        with pytest.raises(AssertionError, match='real data were read'):  # not before the controls are finished, too
            distillation.run(run)
    networks = {path.stem for path in (taught / 'networks').iterdir()}
    assert networks == {'teacher', 'verifier', 'student', 'noise', 'prior_only'}
    made, expected = ({path.name: path.read_bytes() for path in (run / 'pool').iterdir()} for run in (taught, finished))
    assert made == expected


def test_a_finished_pool_serves_another_run(finished, tmp_path):
    weights = {f'{role}__weights': str(finished / 'networks' / f'{role}.safetensors') for role in ('teacher', 'verifier')}
    config = smoke_config(pool=str(finished / 'pool'), distillation__controls=(), **weights)
    figures = pipeline.run(config, tmp_path / 'run')
    assert not (tmp_path / 'run' / 'pool').exists()
    expected = results(finished)
    for task, name in (
        ('teacher', 'test_accuracy'),
        ('synthesis', 'teacher_accuracy'),
        ('synthesis', 'feature_loss_last'),
        ('distillation', 'test_accuracy'),
    ):
        assert figures[task][name] == expected[task][name]
    assert figures['distillation']['real_test_accuracy'] is None


def test_controls_stand_beside_any_pool_without_a_student(finished, tmp_path):
    """They have the bytes of those that distillation makes; more may be asked for later, lost ones are made again."""
    weights = {f'{role}__weights': str(finished / 'networks' / f'{role}.safetensors') for role in ('teacher', 'verifier')}
    changes = {'pool': str(finished / 'pool'), 'tasks': ('teacher', 'synthesis', 'report'), 'devices': 2, **weights}
    workdir, controls = tmp_path / 'run', ('noise', 'prior_only')
    figures = pipeline.run(smoke_config(synthesis__controls=controls[:1], **changes), workdir)
    assert list(json.loads((workdir / 'quality.json').read_text())) == ['synthesized', 'noise', 'real']
    (workdir / 'controls' / 'noise' / 'shard-000001.json').unlink()
    again = pipeline.run(smoke_config(synthesis__controls=controls, **changes), workdir)
    assert again['synthesis'] == {**figures['synthesis'], 'wall_seconds': again['synthesis']['wall_seconds']}
    assert json.loads((workdir / 'quality.json').read_text()) == json.loads((finished / 'quality.json').read_text())
    page = (workdir / 'report.html').read_text()
    rows = re.findall(r'<tr><td class="words"[^>]*>([^<]*)', page[page.index('<h2>Quality') :])
    assert rows[:4] == ['Synthesized images', 'Without the feature term', 'Noise', 'Real images']
    made, expected = ({path.name: path.read_bytes() for path in run.glob('controls/*/*')} for run in (workdir, finished))
    assert made == expected


def test_a_pool_of_another_teacher_is_refused(finished, tmp_path):
    config = smoke_config(pool=str(finished / 'pool'), teacher__factory='factories:own', verifier__network='')
    with pytest.raises(DvinvError, match='was made from another teacher'):
        pipeline.run(config, tmp_path / 'run')
    assert set(results(tmp_path / 'run')) == {'teacher'}


@pytest.mark.slow
def test_a_users_own_network_runs_through_the_whole_chain(tmp_path):
    figures = pipeline.run(
        smoke_config(teacher__factory='factories:own', verifier__network='', distillation__controls=()), tmp_path / 'run'
    )
    assert figures['teacher']['parameters'] == factories.own().parameters
    assert figures['teacher']['verifier_test_accuracy'] is figures['synthesis']['verifier_accuracy'] is None
    assert NAMES['distillation'] <= set(figures['distillation'])
    assert (tmp_path / 'run' / 'report.html').exists()


@pytest.mark.slow
def test_a_run_without_any_real_data_leaves_scores_open(tmp_path):
    """The curve of accuracy is one of agreement with the teacher."""
    changes = {'data__name': '', 'verifier__network': '', 'distillation__controls': ('noise',)}
    changes |= {'distillation__curve_points': 2}
    figures = pipeline.run(smoke_config(teacher__factory='factories:colour', **changes), tmp_path / 'run')
    assert figures['synthesis']['teacher_accuracy'] is not None
    scores = [
        figures['teacher']['test_accuracy'],
        figures['synthesis']['feature_loss_real'],
        figures['distillation']['test_accuracy'],
        figures['distillation']['noise_test_accuracy'],
    ]
    assert scores == [None] * 4
    for prefix in ('', 'noise_'):
        assert figures['distillation'][f'{prefix}test_accuracy_after_10_updates'] is None
        assert 0 <= figures['distillation'][f'{prefix}held_out_agreement_after_10_updates'] <= 1
    page = (tmp_path / 'run' / 'report.html').read_text()
    assert 'None' not in page.split('<details')[0]
    assert '–' not in page.split('<details')[0]
    assert 'Student agreement with the teacher against images seen' in page


# Seeds


def test_several_seeds_give_mean_and_deviation(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / 'runs' / 'seed-0')
    config = smoke_config(**TEACHER_ALONE)
    summary = tasks.run_seeds(config, tmp_path / 'runs', 2)
    first, second = (results(tmp_path / 'runs' / f'seed-{seed}') for seed in (0, 1))
    assert summary == json.loads((tmp_path / 'runs' / 'results.json').read_text())
    assert summary['seeds'] == [first['teacher']['seed'], second['teacher']['seed']] == [0, 1]
    a, b = first['teacher']['test_accuracy'], second['teacher']['test_accuracy']
    assert a != b
    assert summary['mean']['teacher']['test_accuracy'] == pytest.approx((a + b) / 2)
    assert summary['std']['teacher']['test_accuracy'] == pytest.approx(abs(a - b) / 2**0.5)
    assert re.search(r'^teacher +test_accuracy +0\.\d+ \+- 0\.\d+$', tasks.table(summary, tmp_path), re.M)
    said = capsys.readouterr().err
    assert f'seed 1 of 2 (config.seed is 0), in {tmp_path / "runs" / "seed-0"}; done, not run again: teacher\n' in said
    assert f'seed 2 of 2 (config.seed is 1), in {tmp_path / "runs" / "seed-1"}\n' in said
    page = tasks._report(parse(config), summary)
    rows = re.findall(r'<tr[^>]*><td class="words">(.*?)</td><td>', page)
    links = [f'<a href="seed-{seed}/report.html">seed {seed}</a>' for seed in (0, 1)]
    assert rows == ['mean', 'standard deviation', *links]
    assert f'<strong>{50 * (a + b):.1f}%</strong>' in page


def test_the_flag_seeds_prints_the_table(finished, command, tmp_path):
    shutil.copytree(finished, tmp_path / 'runs' / 'seed-0')
    status, out, err = command('--workdir', tmp_path / 'runs', '--seeds', 1)
    assert status == 0, err
    assert 'seed 1 of 1 (config.seed is 0)' in err
    assert re.search(r'^teacher +test_accuracy +0\.\d+$', out, re.M)
    assert results(tmp_path / 'runs')['std']['teacher']['test_accuracy'] is None


def test_seeds_that_were_not_asked_for_are_refused(tmp_path):
    for name in ('seed-7', 'seed-8'):
        (tmp_path / name).mkdir()
    (tmp_path / 'seed-7' / 'results.json').write_text('{}')  # in seed-8 nothing was made
    with pytest.raises(DvinvError, match='holds seed-7, which these --seeds do not include'):
        tasks.run_seeds(smoke_config(), tmp_path, 2)


def test_a_single_run_and_several_seeds_do_not_share_a_folder(run, tmp_path):
    before = lasting(run)
    with pytest.raises(DvinvError, match='holds a single run; choose another --workdir'):
        tasks.run_seeds(smoke_config(), run, 2)
    assert lasting(run) == before
