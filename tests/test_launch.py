"""The scripts in launch/, with recording stand-ins for Python, srun, scontrol and gcloud."""

import os
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
    """So many processes, of which each notes its number and how many there are; 0: one, as without -n."""
    python = _stand_in(tmp_path, 'python', body, '$DVINV_PROCESS $DVINV_PROCESSES "$@"')
    environment = {**os.environ, 'PYTHON': python, 'DELAY': '0'}
    several = ['-n', str(count)] if count else []
    return subprocess.Popen(['bash', SCRIPT, *several, *RUN], env=environment, stderr=subprocess.DEVNULL)


def test_each_of_several_processes_knows_its_number(tmp_path):
    assert _started(tmp_path, '').wait() == 0
    assert sorted(_calls(tmp_path)) == [f'{index} 3 {CALL}' for index in range(3)]


def test_several_processes_meet_at_one_port(tmp_path):
    python = _stand_in(tmp_path, 'python', words='$DVINV_COORDINATOR')
    environment = {**os.environ, 'PYTHON': python}
    for given in ({}, {'DVINV_COORDINATOR': '10.0.0.2:9000'}):
        subprocess.run(['bash', SCRIPT, '-n', '2', *RUN], env=environment | given, check=True)
    free, again, *chosen = _calls(tmp_path)
    assert free == again
    assert 20000 <= int(free.removeprefix('127.0.0.1:')) < 32000
    assert chosen == ['10.0.0.2:9000'] * 2


def test_one_of_several_that_dies_comes_back_alone(tmp_path):
    died = tmp_path / 'died'
    body = f'if [ $DVINV_PROCESS = 1 ] && [ ! -e {died} ]; then touch {died}; kill -KILL $$; fi'
    assert _started(tmp_path, body).wait() == 0
    assert sorted(call[0] for call in _calls(tmp_path)) == ['0', '1', '1', '2']


WAITS = 'trap "exit 143" TERM; for i in $(seq 600); do sleep 0.05; done'


def test_a_mistake_of_one_ends_all(tmp_path):
    assert _started(tmp_path, f'[ $DVINV_PROCESS != 2 ] || {{ sleep 0.3; exit 1; }}\n{WAITS}').wait(20) == 1
    assert len(_calls(tmp_path)) == 3


@pytest.mark.parametrize('count', [0, 3], ids=['without -n', '-n 3'])
def test_sigterm_reaches_all(tmp_path, count):
    script = _started(tmp_path, f'{WAITS.split(";")[0]}; touch {tmp_path}/ready-$DVINV_PROCESS; {WAITS}', count)
    while len([*tmp_path.glob('ready-*')]) < max(1, count):
        time.sleep(0.01)
    script.send_signal(signal.SIGTERM)
    assert script.wait(20) == 143
    assert len(_calls(tmp_path)) == max(1, count)


# SLURM


@pytest.mark.parametrize(('status', 'again', 'cpus'), [(0, False, 'unset'), (1, False, '8'), (143, True, '8')])
def test_slurm_runs_local_sh_a_task_and_queues_again_what_was_ended(tmp_path, status, again, cpus):
    """A task has the CPUs that sbatch was asked for: srun takes them from SRUN_CPUS_PER_TASK."""
    for name in ('srun', 'scontrol'):
        words = f'{name} ${{SRUN_CPUS_PER_TASK-unset}} "$@"'
        _stand_in(tmp_path, name, f'exit {status}' if name == 'srun' else '', words)
    environment = {
        **os.environ,
        'PATH': f'{tmp_path}:{os.environ["PATH"]}',
        'SLURM_SUBMIT_DIR': '/there',
        'SLURM_JOB_ID': '17',
        **({'SLURM_CPUS_PER_TASK': '8'} if cpus == '8' else {}),
    }
    run = subprocess.run(['bash', LAUNCH / 'slurm.sbatch', *RUN], env=environment)
    assert run.returncode == status
    first, *more = _calls(tmp_path)
    assert first == f'srun {cpus} --kill-on-bad-exit=0 bash /there/launch/local.sh {" ".join(RUN)}'
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


@pytest.mark.parametrize(
    ('variables', 'bounds'), [({}, '1,1,1 2,2,1 0'), ({'CHIPS': '2,4,1'}, '1,1,1 2,4,1 0'), ({'JOINED': '1'}, '- - -')]
)
def test_each_host_of_a_pod_asks_who_it_is(tmp_path, variables, bounds):
    """The command that the hosts are given, run here as the second of four."""
    status, calls = _tpu(tmp_path, 'run', *RUN, **variables)
    assert status == 0
    command = subprocess.run(['bash', '-c', f'set -- {calls[0]}; echo "${{@: -1}}"'], capture_output=True, text=True)
    remote = command.stdout.removeprefix('--command=')

    home = tmp_path / 'home'
    for folder in ('dvinv/launch', 'dvinv-env/bin'):
        (home / folder).mkdir(parents=True)
    shutil.copy(SCRIPT, home / 'dvinv' / 'launch')
    answers = 'case "$*" in *endpoints) echo a:8:10.0.0.2,b:8:10.0.0.3,c:8:10.0.0.4,d:8:10.0.0.5;; *number) echo 1;; esac'
    _stand_in(tmp_path, 'curl', answers)
    _stand_in(
        home / 'dvinv-env' / 'bin',
        'python',
        '',
        '$DVINV_PROCESS $DVINV_PROCESSES $DVINV_COORDINATOR '
        '${TPU_PROCESS_BOUNDS--} ${TPU_CHIPS_PER_PROCESS_BOUNDS--} ${CLOUD_TPU_TASK_ID--} "$@"',
    )
    environment = {**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'HOME': str(home)}
    subprocess.run(['bash', '-c', remote], env=environment, check=True)
    assert _calls(home / 'dvinv-env' / 'bin') == [f'1 4 10.0.0.2:8476 {bounds} {CALL}']


@pytest.mark.parametrize('arguments', [(), ('run',), ('run', 'c.py'), ('burn',)])
def test_a_pod_is_not_guessed_at(tmp_path, arguments):
    assert _tpu(tmp_path, *arguments) == (2, [])
    assert _tpu(tmp_path, 'create', TYPE='')[0] != 0
