"""The scripts in launch/, with recording stand-ins for Python, srun, scontrol and gcloud."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / 'launch'
SCRIPT = LAUNCH / 'local.sh'
RUN = 'configs/digits.py', 'runs/a b', '--config.seed=3'
CALL = '-m dvinv.main --config configs/digits.py --workdir runs/a b --config.seed=3'


@pytest.mark.parametrize('script', sorted({*LAUNCH.iterdir()} - {*LAUNCH.glob('*.ipynb')}), ids=lambda path: path.name)
def test_scripts_are_sound(script):
    shellcheck = shutil.which('shellcheck', path=f'{Path(sys.executable).parent}:{os.environ["PATH"]}')
    assert shellcheck, "there is no shellcheck: pip install -e '.[test]'"
    run = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def launch(tmp_path: Path, statuses: list[int], *arguments: str) -> tuple[int, list[str]]:
    """Run the script; its i-th Python ends with the i-th of `statuses`. Returns (exit status, recorded calls)."""
    for number, status in enumerate(statuses, 1):
        (tmp_path / f'status-{number}').write_text(str(status))
    python = _stand_in(tmp_path, 'python', f'exit $(cat {tmp_path}/status-$(wc -l < {tmp_path}/calls))')
    run = subprocess.run(
        ['bash', SCRIPT, *arguments], env={**os.environ, 'PYTHON': python, 'DELAY': '0'}, capture_output=True, text=True
    )
    return run.returncode, _calls(tmp_path)


def _stand_in(folder: Path, name: str, body: str = '', words: str = '"$@"') -> str:
    """A program that notes `words`, its arguments, in folder/'calls', a line each call, and goes on with `body`."""
    program = folder / name
    program.write_text(f'#!/bin/bash\necho {words} >> {folder}/calls\n{body}\n')
    program.chmod(0o755)
    return str(program)


def _calls(folder: Path) -> list[str]:
    calls = folder / 'calls'
    return calls.read_text().splitlines() if calls.exists() else []


def test_arguments_reach_the_program(tmp_path):
    assert launch(tmp_path, [0], *RUN) == (0, [CALL])


def test_a_killed_run_is_resumed_and_a_mistake_is_not(tmp_path):
    assert launch(tmp_path, [137, 137, 0], 'c.py', 'w')[0] == 0
    assert len((tmp_path / 'calls').read_text().splitlines()) == 3
    (tmp_path / 'calls').unlink()
    status, calls = launch(tmp_path, [1], 'c.py', 'w')
    assert (status, len(calls)) == (1, 1)


def test_five_deaths_are_enough(tmp_path):
    status, calls = launch(tmp_path, [137] * 9, 'c.py', 'w')
    assert (status, len(calls)) == (137, 5)


@pytest.mark.parametrize('arguments', [(), ('configs/digits.py',), ('-n', '2', 'c.py'), ('-n', 'two', 'c.py', 'w'), ('-n',)])
def test_missing_arguments_are_told(tmp_path, arguments):
    assert launch(tmp_path, [], *arguments) == (2, [])


# Several processes


def _started(tmp_path: Path, body: str, count: int = 3) -> subprocess.Popen:
    """So many stand-ins of Python, which know their number as $index; 0: one, as without -n."""
    index = 'for word in "$@"; do case $word in --process_id=*) index=${word#*=};; esac; done\n'
    python = _stand_in(tmp_path, 'python', index + body)
    several = ['-n', str(count)] if count else []
    environment = {**os.environ, 'PYTHON': python, 'DELAY': '0'}
    return subprocess.Popen(['bash', SCRIPT, *several, *RUN], env=environment, stderr=subprocess.DEVNULL)


def test_several_processes_know_their_numbers_and_meet_at_one_port(tmp_path):
    assert _started(tmp_path, '').wait() == 0
    before, after = CALL.split(' --config.seed')
    port = re.search(r'--coordinator=127\.0\.0\.1:(\d+) ', _calls(tmp_path)[0])[1]
    assert 20000 <= int(port) < 32000
    assert sorted(_calls(tmp_path)) == [
        f'{before} --coordinator=127.0.0.1:{port} --num_processes=3 --process_id={index} --config.seed{after}'
        for index in range(3)
    ]


def test_where_one_of_several_dies_all_come_back(tmp_path):
    died = tmp_path / 'died'
    body = f'[ -e {died} ] || {{ [ $index != 1 ] || {{ touch {died}; kill -KILL $$; }}; sleep 0.2; exit 75; }}'
    assert _started(tmp_path, body).wait() == 0
    assert sorted(call.split('--process_id=')[1][0] for call in _calls(tmp_path)) == [*'001122']


def test_one_that_waits_for_a_dead_one_is_ended(tmp_path, monkeypatch):
    monkeypatch.setenv('PATIENCE', '0')
    died = tmp_path / 'died'
    body = f'[ -e {died} ] || {{ [ $index != 1 ] || {{ touch {died}; kill -KILL $$; }}; sleep 60; }}'
    assert _started(tmp_path, body).wait(20) == 0


def test_a_mistake_of_one_is_the_status_of_all(tmp_path):
    assert _started(tmp_path, '[ $index = 2 ] && exit 1; sleep 0.1; exit 75').wait(20) == 1
    assert len(_calls(tmp_path)) == 3


WAITS = 'trap "exit 143" TERM; for i in $(seq 600); do sleep 0.05; done'


@pytest.mark.parametrize('count', [0, 3], ids=['without -n', '-n 3'])
def test_sigterm_reaches_all(tmp_path, count):
    script = _started(tmp_path, f'{WAITS.split(";")[0]}; touch {tmp_path}/ready-$index; {WAITS}', count)
    while len([*tmp_path.glob('ready-*')]) < max(1, count):
        time.sleep(0.01)
    script.send_signal(signal.SIGTERM)
    assert script.wait(20) == 143
    assert len(_calls(tmp_path)) == max(1, count)


# SLURM


@pytest.mark.parametrize(
    ('status', 'restarts', 'again', 'cpus'),
    [(0, '0', False, 'unset'), (1, '0', False, '8'), (143, '9', True, '8'), (75, '4', True, '8'), (137, '5', False, '8')],
)
def test_slurm_runs_a_task_a_node_and_queues_again_what_was_ended(tmp_path, status, restarts, again, cpus):
    """A task has the CPUs that sbatch was asked for: srun takes them from SRUN_CPUS_PER_TASK."""
    for name in ('srun', 'scontrol'):
        words = f'{name} ${{SRUN_CPUS_PER_TASK-unset}} "$@"'
        _stand_in(tmp_path, name, f'exit {status}' if name == 'srun' else '', words)
    environment = {
        **os.environ,
        'PATH': f'{tmp_path}:{os.environ["PATH"]}',
        'SLURM_JOB_ID': '17',
        'SLURM_RESTART_COUNT': restarts,
        **({'SLURM_CPUS_PER_TASK': '8'} if cpus == '8' else {}),
    }
    run = subprocess.run(['bash', LAUNCH / 'slurm.sbatch', *RUN], env=environment)
    assert run.returncode == status
    first, *more = _calls(tmp_path)
    assert first == f'srun {cpus} --kill-on-bad-exit=1 python {CALL}'
    assert more == ([f'scontrol {cpus} requeue 17'] if again else [])


def test_slurm_is_asked_for_a_requeue_and_a_signal():
    text = (LAUNCH / 'slurm.sbatch').read_text()
    assert '#SBATCH --requeue\n' in text
    assert '#SBATCH --signal=TERM@120\n' in text
    assert subprocess.run(['bash', LAUNCH / 'slurm.sbatch', 'c.py'], capture_output=True).returncode == 2


# Cloud TPU


def _tpu(tmp_path: Path, *arguments: str, **variables: str) -> tuple[int, list[str]]:
    _stand_in(tmp_path, 'gcloud', words='"$(printf "%q " "$@")"')
    environment = {
        **os.environ,
        'PATH': f'{tmp_path}:{os.environ["PATH"]}',
        'NAME': 'pod',
        'ZONE': 'zone-a',
        'TYPE': 'v4-32',
        **variables,
    }
    run = subprocess.run(['bash', LAUNCH / 'tpu_pod.sh', *arguments], env=environment, capture_output=True)
    return run.returncode, [call.strip() for call in _calls(tmp_path)]


def test_a_pod_is_created_and_deleted(tmp_path):
    _tpu(tmp_path, 'create', CREATE='--spot --network=mine')
    _, calls = _tpu(tmp_path, 'delete')
    there = 'pod --zone=zone-a'
    assert calls == [
        f'compute tpus tpu-vm create {there} --accelerator-type=v4-32 --version=tpu-ubuntu2204-base --spot --network=mine',
        f'compute tpus tpu-vm delete {there} --quiet',
    ]


def test_a_pod_is_set_up_on_all_hosts(tmp_path):
    status, calls = _tpu(tmp_path, 'setup', NFS='10.0.0.2:/share')
    assert status == 0
    assert all('--worker=all' in call and '--zone=zone-a' in call for call in calls)
    assert [call.split()[3] for call in calls] == ['ssh', 'scp', 'ssh', 'ssh']
    *copied, target = shlex.split(calls[1])[7:]
    assert target == 'pod:dvinv/'
    assert {'dvinv', 'configs', 'launch', 'pyproject.toml'} <= {Path(path).name for path in copied}
    assert all(Path(path).exists() for path in copied)
    assert 'mount' in calls[2]
    assert 'dvinv[tpu]' in calls[3]
    (tmp_path / 'calls').unlink()
    assert not any('mount' in call for call in _tpu(tmp_path, 'setup')[1])


def test_each_host_of_a_pod_runs_as_one_of_several(tmp_path):
    """The command that the hosts are given, run here."""
    status, calls = _tpu(tmp_path, 'run', *RUN)
    assert status == 0
    command = subprocess.run(['bash', '-c', f'set -- {calls[0]}; echo "${{@: -1}}"'], capture_output=True, text=True)
    remote = command.stdout.removeprefix('--command=')

    home = tmp_path / 'home'
    for folder in ('dvinv/launch', 'dvinv-env/bin'):
        (home / folder).mkdir(parents=True)
    shutil.copy(SCRIPT, home / 'dvinv' / 'launch')
    _stand_in(home / 'dvinv-env' / 'bin', 'python')
    subprocess.run(['bash', '-c', remote], env={**os.environ, 'HOME': str(home)}, check=True)
    assert _calls(home / 'dvinv-env' / 'bin') == [f'{CALL} --distributed']


@pytest.mark.parametrize('arguments', [(), ('run',), ('run', 'c.py'), ('burn',)])
def test_a_pod_is_not_guessed_at(tmp_path, arguments):
    assert _tpu(tmp_path, *arguments) == (2, [])
    assert _tpu(tmp_path, 'create', TYPE='')[0] != 0
