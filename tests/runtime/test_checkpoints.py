"""Checkpoints: the newest whole one comes back intact, and a damaged one never does."""

import contextlib
import errno
import json
import os
import shutil

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from smoke import flip

from dvinv.runtime.checkpoints import Checkpoints
from dvinv.runtime.errors import DvinvError


def state(seed=0):
    params = {'kernel': np.random.default_rng(seed).normal(size=(3, 4)).astype(np.float32), 'bias': np.zeros(4, np.float32)}
    return {'params': params, 'opt_state': jax.device_get(optax.adam(0.1).init(params)), 'step': np.array(seed, np.int32)}


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A folder with one checkpoint, of step 10; tests copy it."""
    folder = tmp_path_factory.mktemp('saved') / 'student'
    Checkpoints(folder).save(10, state(10))
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / 'student')


def refusal(folder):
    with pytest.raises(DvinvError) as caught:
        Checkpoints(folder).restore(state())
    return str(caught.value)


def check_is_ten(folder):
    step, restored = Checkpoints(folder).restore(state())
    assert step == 10
    jax.tree.map(np.testing.assert_array_equal, restored, state(10))
    assert jax.tree.structure(restored) == jax.tree.structure(state(10))


def test_nothing_saved_is_nothing_restored(tmp_path):
    assert Checkpoints(tmp_path / 'none').restore(state()) is None


def test_what_was_saved_is_restored(folder):
    check_is_ten(folder)


def test_an_older_checkpoint_is_dropped(folder):
    Checkpoints(folder).save(20, state(20))
    assert sorted(path.name for path in folder.iterdir()) == ['000000020', '000000020.json']
    step, restored = Checkpoints(folder).restore(state())
    assert step == 20 == restored['step']


def test_a_save_that_was_killed_is_ignored_and_done_again(folder):
    shutil.copytree(folder / '000000010', folder / '000000020')  # whole, but the manifest was not written any more
    (folder / '000000020.orbax-checkpoint-tmp').mkdir()
    check_is_ten(folder)
    Checkpoints(folder).save(20, state(20))
    assert sorted(path.name for path in folder.iterdir()) == ['000000020', '000000020.json']
    assert Checkpoints(folder).restore(state())[1]['step'] == 20


@pytest.mark.parametrize('name', ['10', '99', '000000099'])
def test_a_stray_folder_is_no_checkpoint(folder, name):
    (folder / name).mkdir()
    check_is_ten(folder)


def test_a_flipped_byte_in_any_file_is_found(folder):
    files = [path for path in (folder / '000000010').rglob('*') if path.is_file() and path.stat().st_size]
    assert len(files) > 3
    for path in files:
        flip(path)
        assert f'The checkpoint file {path} is damaged' in refusal(folder)
        assert f'delete {folder} to train this network again from its start' in refusal(folder)
        flip(path)
    check_is_ten(folder)


def test_a_missing_file_is_named(folder):
    path = next(path for path in (folder / '000000010').rglob('*') if path.is_file())
    path.unlink()
    assert f'The checkpoint file {path} is missing' in refusal(folder)


@pytest.mark.parametrize('text', ['', '{}', '[]', '{"sha256": 1}', 'ÿ'])
def test_a_damaged_manifest_is_refused(folder, text):
    (folder / '000000010.json').write_bytes(text.encode('latin1'))
    assert f'The checkpoint manifest {folder / "000000010.json"} is damaged' in refusal(folder)


def test_a_flipped_byte_in_the_manifest_is_found(folder):
    path = folder / '000000010.json'
    for position in range(0, path.stat().st_size, 11):
        flip(path, position)
        with contextlib.suppress(DvinvError):
            check_is_ten(folder)  # white space and the step are free: the file's name tells the step
        flip(path, position)


def test_a_full_disk_is_told_and_the_older_checkpoint_stands(folder, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, 'replace', fail)
    with pytest.raises(DvinvError, match=r'The disk is full: .*student/000000020\.json could not be written'):
        Checkpoints(folder).save(20, state(20))
    monkeypatch.undo()
    assert sorted(path.name for path in folder.iterdir()) == ['000000010', '000000010.json']
    check_is_ten(folder)


def test_a_disk_that_is_full_for_tensorstore_is_told_too(folder, monkeypatch):
    def fail(*_, **__):
        raise ValueError('RESOURCE_EXHAUSTED: Error writing "a/0": Failed to write 3 bytes: No space left on device [28]')

    monkeypatch.setattr(ocp.Checkpointer, 'save', fail)
    with pytest.raises(DvinvError, match=r'The disk is full: .*student/000000020 could not be written'):
        Checkpoints(folder).save(20, state(20))
    check_is_ten(folder)


def test_the_manifest_lists_every_file(folder):
    listed = json.loads((folder / '000000010.json').read_text())['sha256']
    there = [path for path in (folder / '000000010').rglob('*') if path.is_file()]
    assert sorted(listed) == sorted(str(path.relative_to(folder / '000000010')) for path in there)
