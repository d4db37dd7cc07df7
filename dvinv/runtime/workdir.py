"""The work directory of a run: its config, results, lock and clock.

    config.json  versions.json  results.json  metrics.jsonl  times.json  quality.json  by_class.json  report.html
    checkpoints/  networks/  pool/  pools/  controls/  samples/  pruning/

The same command resumes the run; another config is rejected. If there are several processes, all of them read the work
directory and process 0 writes to it; batches of images are written by the process that made them.
"""

import json
import re
import time
from pathlib import Path

import filelock

from dvinv.config import Settings, current_name, nested
from dvinv.errors import DvinvError, listed
from dvinv.runtime.files import refuse_full_disk, write_atomic
from dvinv.runtime.metrics import Metrics
from dvinv.runtime.processes import decide, meet, refuse_differing
from dvinv.runtime.versions import record, refuse_other_settings, versions

# Keys that a resumed run may change, since no result depends on them. (Only the report, which is made again each time,
# depends on verifiers and synthesis.controls.)
EXEMPT = ('tasks', 'devices', 'logging', 'verifiers', 'synthesis.controls')
# Keys that earlier versions did not have, with the values under which their runs continue unchanged.
ADDED = {
    'student.factory': '',
    'held_out': 0.0,
    'synthesis.pixel_scale': 'network',
    'teacher.moments': '',
    'teacher.moments_images': 0,
    'synthesis.attention': ['*Attention*:output'],
    'synthesis.weights.patch_similarity': 0.0,
    'synthesis.weights.pixel_moments': 0.0,
    'distillation.curve_points': 0,
    'quantization.token_ranges': False,
    'synthesis.stages.color_shift': 0.0,  # of every stage
    'synthesis.stages.centre': 1.0,
}

# The results of a run, without its records: until one of these exists, a folder may get another config.
RESULTS = (
    'results.json',
    'latency.json',
    'checkpoints',
    'networks',
    'pool',
    'pools',
    'controls',
    'samples',
    'pruning',
)

# task -> the name of the file of its final network; after that of 'quantization' follows the setting, as in 'quantized_w8a8'
FINAL_NETWORKS = {
    'teacher': 'teacher',
    'distillation': 'student',
    'pruning': 'pruned',
    'continual': 'continual',
    'quantization': 'quantized_',
}


def quantized_name(setting: str) -> str:
    """Returns the name of the file of the network that is quantized to a setting, for instance 'w8a8'."""
    return FINAL_NETWORKS['quantization'] + setting


def network_path(workdir: Path, name: str) -> Path:
    """Returns the path of the file of a finished network, also for a work directory that is not open."""
    return workdir / 'networks' / f'{name}.safetensors'


def network_files(workdir: Path) -> dict[str, Path]:
    """Returns {name: path} of the files of all finished networks, sorted by name."""
    return {path.stem: path for path in sorted(network_path(workdir, '*').parent.glob('*.safetensors'))}


def holds_work(folder: Path) -> bool:
    """Returns whether a run has produced results in this folder; a run that was rejected or ended early has not."""
    places = (Path(folder) / name for name in RESULTS)
    paths = (path for place in places for path in (place, *place.rglob('*')))
    return any(path.is_file() and not path.name.startswith('.') for path in paths)


def flat(tree, prefix='') -> dict:
    """Returns nested dicts and lists as a flat dict {path: leaf}, with paths such as 'a.b[0].c'."""
    if isinstance(tree, dict):
        return {k: v for key, item in tree.items() for k, v in flat(item, f'{prefix}.{key}' if prefix else key).items()}
    if isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        return {k: v for i, item in enumerate(tree) for k, v in flat(item, f'{prefix}[{i}]').items()}
    return {prefix: tree}


def _is_exempt(key: str) -> bool:
    """Returns whether a key of `flat` is in `EXEMPT`, or inside a group that is."""
    return any(key == name or key.startswith((f'{name}.', f'{name}[')) for name in EXEMPT)


class Workdir:
    """An open work directory, which only one run can use at a time.

    Attributes:
      path: the folder.
      metrics: the measurements of trainings.

    Raises:
      DvinvError: the folder holds results of a run with another config (the message names the keys) or under other settings
        of JAX, another run is using it, its config.json is damaged, or the processes of the run have different configs or
        versions.
    """

    def __init__(self, path: Path, settings: Settings):
        self.path = Path(path)
        self._lock = filelock.FileLock(self.path / '.lock', timeout=0)
        refuse_differing({**flat(nested(settings)), **versions()}, 'configs and versions')
        decide(lambda: self._open(settings), f'{self.path} to open')
        self.metrics = Metrics(self.path / 'metrics.jsonl', on_append=self.tick)
        self._times = self.read_json('times.json', {})
        self._started: dict[str, float] = {}
        self._written = 0.0

    def _open(self, settings: Settings) -> None:
        """Locks the folder for this run, and writes the config and versions of the run to it."""
        try:
            if begun := holds_work(self.path):
                self.refuse_other(settings)
                refuse_other_settings(self.path)
            self._refuse_seeds()
            with refuse_full_disk(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock.acquire()
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise DvinvError(f'--workdir {self.path} cannot be written to ({error.strerror}); name another.') from error
        except filelock.Timeout as error:
            raise DvinvError(f'Another run is under way in {self.path}; wait, or choose another --workdir.') from error
        try:
            if not begun and self._differing(settings):
                for name in ('metrics.jsonl', 'times.json'):  # left by an earlier start, with a config that is replaced now
                    (self.path / name).unlink(missing_ok=True)
            write_atomic(self.path / 'config.json', _dumps(nested(settings)))
            record(self.path)
        except BaseException:
            self.close()
            raise

    def refuse_other(self, settings: Settings) -> None:
        """Validates that a config is that of the run in this folder, if there is one.

        Raises:
          DvinvError: it is not; the message names the keys that differ.
        """
        if differing := self._differing(settings):
            raise DvinvError(
                f'{self.path} holds a run with another config: {listed(differing, 8)}. Choose another --workdir, or repeat '
                'the settings of that run to resume it.'
            )

    def _differing(self, settings: Settings) -> list[str]:
        """Returns the keys, with both values, in which `settings` differ from the folder's config; [] without a config."""
        old = self.read_json('config.json', None)
        if old is None:
            return []
        new = json.loads(json.dumps(nested(settings)))  # tuples are lists in JSON
        current, recorded = ({k: v for k, v in flat(c).items() if not _is_exempt(k)} for c in (new, old))
        recorded = {current_name(name): value for name, value in recorded.items()}
        if recorded.get('synthesis.parameterization') == 'spectrum':  # the name in earlier versions
            recorded['synthesis.parameterization'] = 'fourier'
        if current.get('data.name'):  # with real data nothing is held out
            current['held_out'] = recorded['held_out'] = 0.0

        def value(values: dict, key: str):
            return values.get(key, ADDED.get(re.sub(r'\[\d+\]', '', key), 'absent'))

        keys = sorted(k for k in {*current, *recorded} if value(current, k) != value(recorded, k))
        return [f'{k} ({value(recorded, k)!r} there, {value(current, k)!r} here)' for k in keys]

    def _refuse_seeds(self) -> None:
        """Raises a `DvinvError` for a folder that holds the folders of runs with several seeds."""
        if not (self.path / 'config.json').exists() and any(map(holds_work, self.path.glob('seed-*'))):
            raise DvinvError(
                f'{self.path} holds the runs of several seeds; repeat --seeds to resume them, or choose another --workdir.'
            )

    def read_json(self, name: str, default):
        """Returns the contents of a JSON file, or `default` if there is no such file."""
        try:
            return json.loads((self.path / name).read_text())
        except FileNotFoundError:
            return default
        except ValueError as error:
            raise DvinvError(f'{self.path / name} is damaged ({error}); restore it or choose another --workdir.') from error

    def network(self, name: str) -> Path:
        """Returns the path of the file of a finished network."""
        return network_path(self.path, name)

    def has_network(self, name: str) -> bool:
        """Returns whether the file of a finished network exists; all processes get the answer of process 0."""
        return decide(self.network(name).exists, f'the network {name}')

    @property
    def results(self) -> dict:
        """The results of the finished tasks, {task: figures}."""
        return self.read_json('results.json', {})

    def add_results(self, task: str, results: dict) -> None:
        """Adds the results of a finished task to results.json."""
        write_atomic(self.path / 'results.json', _dumps({**self.results, task: results}))
        meet(f'results of {task}')

    def start_clock(self, task: str) -> None:
        """Starts the clock of `task`, which continues from the time that earlier, killed runs spent on it."""
        self._started[task] = time.monotonic() - self._times.get(task, 0.0)

    def wall_seconds(self, task: str) -> float:
        """Returns the seconds spent on `task` so far, over all runs, and saves them."""
        self._times[task] = time.monotonic() - self._started[task]
        self._written = time.monotonic()
        write_atomic(self.path / 'times.json', _dumps(self._times))
        return self._times[task]

    def tick(self, task: str) -> None:
        """Saves the time spent on `task` every few seconds; called often in long work, since a kill loses the rest."""
        if task in self._started and time.monotonic() - self._written > 2:
            self.wall_seconds(task)

    def close(self) -> None:
        """Releases the lock, so that other runs can use the folder."""
        self._lock.release()


def _dumps(tree) -> bytes:
    return (json.dumps(tree, indent=2, sort_keys=True) + '\n').encode()
