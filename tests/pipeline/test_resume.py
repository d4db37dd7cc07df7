"""A run that was killed, and killed again, ends as one that was not: the same bytes, the same figures."""

import time

import pytest
from smoke import lasting

pytestmark = pytest.mark.slow

# Killed as soon as this exists: between two shards, in the middle of a training.
MOMENTS = ('pool/shard-000000.json', 'checkpoints/student/000000010.json')


def test_kills_change_nothing_that_lasts(start, command, finished, tmp_path):
    run = tmp_path / 'run'
    for moment in MOMENTS:
        with start('--workdir', run) as process:
            while not (run / moment).exists():
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.002)
            process.kill()
        assert process.returncode == -9
        assert not (run / 'report.html').exists()
    status, _, err = command('--workdir', run)
    assert status == 0, err
    undisturbed, resumed = lasting(finished), lasting(run)
    assert set(resumed) == set(undisturbed)
    assert [name for name in undisturbed if resumed[name] != undisturbed[name]] == []
    assert (run / 'config.json').read_bytes() == (finished / 'config.json').read_bytes()
