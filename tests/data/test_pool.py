"""The image pool: whole or absent, the same bytes for the same images, and nothing damaged is read."""

import contextlib
import errno
import os

import numpy as np
import pytest
from smoke import flip

from dvinv.data import pool as module
from dvinv.data.dataset import Rows
from dvinv.data.pool import ImagePool
from dvinv.runtime.errors import DvinvError
from dvinv.runtime.files import sha256_of

NOTES = {'batch': 0, 'feature_loss_last': 0.25}


def batch(number=0):
    rng = np.random.default_rng(number)
    return (
        rng.integers(0, 256, (6, 4, 5, 3), dtype=np.uint8),
        np.arange(6, dtype=np.int32) % 3,
        rng.normal(size=(6, 3)).astype(np.float32),
    )


@pytest.fixture
def pool(tmp_path):
    pool = ImagePool(tmp_path / 'pool', 'a' * 64)
    for number in range(2):
        pool.write(number, *batch(number), NOTES)
    return pool


def refusal(pool):
    with pytest.raises(DvinvError) as caught:
        pool.rows('images')
    return str(caught.value)


def test_what_is_written_is_read_in_order(pool):
    assert pool.numbers() == [0, 1]
    for position, name in enumerate(('images', 'labels', 'logits')):
        rows, expected = pool.rows(name), np.concatenate([batch(0)[position], batch(1)[position]])
        np.testing.assert_array_equal(rows[:], expected)
        assert rows.dtype == (np.uint8, np.int32, np.float32)[position]
        assert (rows.shape, len(rows)) == (expected.shape, 12)
        np.testing.assert_array_equal(pool.read(1)[name], batch(1)[position])


@pytest.mark.parametrize('compressed', [False, True])
@pytest.mark.parametrize(
    'index',
    [
        [5, 6],  # of two shards
        [11, 0, 3, 3, 7],
        [[1, 2], [10, 9]],
        [],
        7,
        -1,
        slice(2, None, 3),
        np.arange(12) % 2 == 0,
    ],
)
def test_rows_are_those_of_the_joined_array(pool, index, compressed):
    """Also where somebody has compressed a shard, as dvinv once did itself."""
    joined = np.concatenate([batch(0)[0], batch(1)[0]])
    files = [pool.folder / f'shard-00000{number}.npz' for number in range(2)]
    if compressed:
        np.savez_compressed(files[1], images=batch(1)[0])
    index = np.array(index, int) if isinstance(index, list) else index
    np.testing.assert_array_equal(Rows(files, 'images')[index], joined[index])


def test_rows_that_are_not_there_are_refused(pool):
    with pytest.raises(IndexError, match='out of bounds'):
        pool.rows('images')[np.array([12])]


def test_a_pool_is_read_while_it_grows(pool):
    assert len(pool.rows('labels')) == 12
    pool.write(2, *batch(2), NOTES)
    assert len(pool.rows('labels')) == 18


def test_numpy_alone_reads_a_shard(pool):
    with np.load(pool.folder / 'shard-000001.npz', allow_pickle=False) as shard:
        assert sorted(shard) == ['images', 'labels', 'logits']
        np.testing.assert_array_equal(shard['images'], batch(1)[0])


def test_a_sidecar_tells_what_the_shard_is(pool):
    notes = pool.sidecar(1)
    assert notes['teacher'] == 'a' * 64
    assert notes['images'] == 6
    assert notes['feature_loss_last'] == 0.25


def test_equal_images_make_equal_bytes(pool, tmp_path):
    again = ImagePool(tmp_path / 'again', 'a' * 64)
    again.write(1, *batch(1), dict(reversed(NOTES.items())))
    for name in ('shard-000001.npz', 'shard-000001.json'):
        assert (again.folder / name).read_bytes() == (pool.folder / name).read_bytes()


@pytest.mark.parametrize('error', [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize('call', ['replace', 'fsync'])
def test_a_full_disk_leaves_neither_shard_nor_temporary_file(pool, monkeypatch, error, call):
    before = sorted(path.name for path in pool.folder.iterdir())

    def fail(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(DvinvError, match=r'The disk is full: .*shard-000002\.npz.*free some space and run the same command'):
        pool.write(2, *batch(2), NOTES)
    assert sorted(path.name for path in pool.folder.iterdir()) == before


def test_a_shard_without_its_sidecar_does_not_count(pool, monkeypatch):
    replace = os.replace

    def only_shards(source, target):
        if str(target).endswith('.json'):
            raise OSError(errno.ENOSPC, 'No space left on device')
        replace(source, target)

    monkeypatch.setattr(os, 'replace', only_shards)
    with pytest.raises(DvinvError, match='disk is full'):
        pool.write(2, *batch(2), NOTES)
    assert pool.numbers() == [0, 1]
    assert len(pool.rows('labels')) == 12
    monkeypatch.undo()
    pool.write(2, *batch(2), NOTES)
    assert pool.numbers() == [0, 1, 2]


def test_files_of_other_names_are_ignored(pool):
    (pool.folder / 'shard-copy.json').write_text('{}')
    (pool.folder / '.shard-000007.json.x1').write_text('{')
    assert pool.numbers() == [0, 1]


def test_a_truncated_shard_is_named_with_the_way_out(pool):
    path = pool.folder / 'shard-000001.npz'
    path.write_bytes(path.read_bytes()[:-20])
    assert f'The shard {path} is damaged (truncated, ' in refusal(pool)
    assert 'delete shard-000001.json and run the command that made the pool again' in refusal(pool)


def test_any_flipped_byte_of_a_shard_is_found(pool):
    path = pool.folder / 'shard-000000.npz'
    whole = path.read_bytes()
    for position in range(0, len(whole), 37):
        path.write_bytes(whole)
        flip(path, position)
        assert f'The shard {path} is damaged' in refusal(pool)


def test_any_flipped_byte_of_a_sidecar_is_found(pool):
    path = pool.folder / 'shard-000000.json'
    whole = path.read_bytes()
    for position in range(len(whole)):
        for bit in (1, 128):
            changed = bytearray(whole)
            changed[position] ^= bit
            path.write_bytes(changed)
            with contextlib.suppress(DvinvError):
                assert pool.sidecar(0)['images'] == 6
                assert chr(whole[position]).isspace()  # white space may change


@pytest.mark.parametrize('text', ['', '[]', '{}', 'null', '{"teacher": "a"}', '{"sha256": 3, "teacher": null}'])
def test_a_sidecar_that_is_none_is_refused(pool, text):
    path = pool.folder / 'shard-000000.json'
    path.write_text(text)
    assert f'The sidecar {path} is damaged' in refusal(pool)


def test_a_missing_shard_is_named(pool):
    path = pool.folder / 'shard-000000.npz'
    path.unlink()
    assert f'The shard {path} is missing' in refusal(pool)
    assert 'delete shard-000000.json' in refusal(pool)


@pytest.mark.parametrize('ending', ['npz', 'json'])
def test_what_is_damaged_in_a_pool_of_ours_is_put_aside(pool, ending):
    writer = ImagePool(pool.folder, 'a' * 64, quarantine=True)
    path = pool.folder / f'shard-000001.{ending}'
    flip(path)
    damaged = path.read_bytes()
    assert f'it was moved to {pool.folder / "quarantine"}; run the command that made the pool again' in refusal(writer)
    assert writer.numbers() == [0]
    assert (pool.folder / 'quarantine' / path.name).read_bytes() == damaged
    assert not path.exists()


def test_a_shard_is_hashed_once_and_again_when_it_has_changed(pool, monkeypatch):
    hashed = []
    monkeypatch.setattr(module, 'sha256_of', lambda path: hashed.append(path.name) or sha256_of(path))
    for _ in range(2):
        ImagePool(pool.folder).rows('labels')
    assert hashed == ['shard-000000.npz', 'shard-000001.npz']
    path = pool.folder / 'shard-000001.npz'
    os.utime(path, ns=(0, 0))
    ImagePool(pool.folder).rows('labels')
    assert hashed[2:] == [path.name]


def test_a_pool_of_another_teacher_is_refused(pool):
    message = refusal(ImagePool(pool.folder, 'b' * 64))
    assert str(pool.folder) in message
    assert 'was made from another teacher (digest aaaaaaaaaaaa, not bbbbbbbbbbbb)' in message


def test_an_empty_pool_says_what_to_do(tmp_path):
    assert 'run the task synthesis first, or name a pool' in refusal(ImagePool(tmp_path / 'none', 'a' * 64))
