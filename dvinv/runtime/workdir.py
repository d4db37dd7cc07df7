"""The work directory of a run: its config, results, metrics, lock and clock, and with which versions it was made.

    config.json  versions.json  results.json  metrics.jsonl  times.json  quality.json  by_class.json  report.html
    checkpoints/  networks/  pool/  pools/  controls/  samples/  pruning/

The same command resumes the run; another config is rejected. If there are several processes, all of them read the work
directory and process 0 writes to it; batches of images are written by the process that made them.

A run may be resumed with other packages; a message then says that results may differ in their last bits. Settings of JAX
that change random numbers or precision would mix two kinds of images in one pool, so a run is not resumed under other
settings.

The measurements of a batch of images are in its sidecar (`data.pool`).
"""

import enum
import importlib.metadata
import io
import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import filelock
import jax

import dvinv
from dvinv.config import Settings, current_name, nested
from dvinv.runtime.devices import decide, is_primary, meet, refuse_differing
from dvinv.runtime.errors import DvinvError, listed
from dvinv.runtime.files import refuse_full_disk, write_atomic

PACKAGES = 'jax', 'jaxlib', 'flax', 'optax', 'numpy'
JAX_SETTINGS = (  # names in jax.config; settings that a version of JAX does not have are skipped
    'jax_enable_x64',
    'jax_explicit_x64_dtypes',
    'jax_numpy_dtype_promotion',
    'jax_default_matmul_precision',
    'jax_allow_f16_reductions',
    'jax_default_prng_impl',
    'jax_threefry_partitionable',
    'jax_random_seed_offset',
    'jax_high_dynamic_range_gumbel',
    'jax_accurate_erf_inv',
    'jax_softmax_custom_jvp',
    'jax_use_hlo_logistic_lowering',
    'jax_disable_jit',
    'jax_disable_most_optimizations',
    'jax_optimization_level',
    'jax_exec_time_optimization_effort',
    'eager_constant_folding',
)
ENVIRONMENT = 'XLA_FLAGS', 'NVIDIA_TF32_OVERRIDE'
HARMLESS_XLA_FLAGS = '--xla_force_host_platform_device_count', '--xla_dump'  # no result depends on them
VERSIONS_FILE = 'versions.json'
# Keys that a resumed run may change, since no result depends on them. (Only the report, which is made again each time,
# depends on verifiers and synthesis.controls.)
EXEMPT_KEYS = ('tasks', 'devices', 'logging', 'verifiers', 'synthesis.controls')
# Keys that earlier versions did not have, with the values under which their runs continue unchanged.
ADDED_KEYS = {
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
RESULTS = 'results.json', 'latency.json', 'checkpoints', 'networks', 'pool', 'pools', 'controls', 'samples', 'pruning'
# task -> the name of the file of its final network; after that of 'quantization' follows the setting, as in 'quantized_w8a8'
FINAL_NETWORKS = {
    'teacher': 'teacher',
    'distillation': 'student',
    'pruning': 'pruned',
    'continual': 'continual',
    'quantization': 'quantized_',
}


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
            record_versions(self.path)
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
            return values.get(key, ADDED_KEYS.get(re.sub(r'\[\d+\]', '', key), 'absent'))

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


class Metrics:
    """The measurements of a run.

    A line has the keys "task", "series" and "step", which counts updates of a training, and further keys with floats. An
    incomplete last line, which a kill may leave, is ignored.

    Raises:
      DvinvError: a line is damaged; raised by the methods that read.
    """

    def __init__(self, path: Path, on_append: Callable[[str], None] = lambda task: None):
        self._path, self._on_append = Path(path), on_append

    def append(self, task: str, series: str, lines: list[dict]) -> None:
        """Appends lines, each with a `step`, and flushes them to the operating system."""
        text = ''.join(json.dumps({'task': task, 'series': series, **line}) + '\n' for line in lines)
        if is_primary():
            with refuse_full_disk(self._path), open(self._path, 'a') as file:
                file.write(text)
        self._on_append(task)

    def lines(self, task: str, series: str) -> Iterator[dict]:
        """Yields the lines of a series, reading them one at a time."""
        with self._open() as file:
            for line in file:
                if line.endswith(b'\n'):
                    entry = self._parse(line)
                    if (entry['task'], entry['series']) == (task, series):
                        yield entry

    def cut(self, task: str, series: str, step: int) -> None:
        """Deletes the lines of a series beyond `step`, which will be measured again, and an incomplete last line."""

        def stays(line: bytes) -> bool:
            if not line.endswith(b'\n'):
                return False
            entry = self._parse(line)
            return (entry['task'], entry['series']) != (task, series) or entry['step'] <= step

        with self._open() as file:
            lines = file.readlines()
        kept = [line for line in lines if stays(line)]
        if kept != lines:
            write_atomic(self._path, kept)

    def _open(self) -> BinaryIO:
        try:
            return open(self._path, 'rb')
        except FileNotFoundError:
            return io.BytesIO()  # no measurement yet

    def _parse(self, line: bytes) -> dict:
        text = line.decode(errors='replace')
        try:
            entry = json.loads(text)
            entry['task'], entry['series'], entry['step']
        except (ValueError, KeyError, TypeError) as error:
            raise DvinvError(
                f'{self._path} holds a line that is damaged ({text.strip()[:60]!r}); delete that line.'
            ) from error
        return entry


def _dumps(tree) -> bytes:
    return (json.dumps(tree, indent=2, sort_keys=True) + '\n').encode()


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
    """Returns whether a key of `flat` is in `EXEMPT_KEYS`, or inside a group that is."""
    return any(key == name or key.startswith((f'{name}.', f'{name}[')) for name in EXEMPT_KEYS)


def versions() -> dict[str, str]:
    """Returns the versions of the packages in use, including dvinv, and the values of the settings, in one dict."""
    packages = {'dvinv': dvinv.__version__, **{name: importlib.metadata.version(name) for name in PACKAGES}}
    variables = {name: os.environ.get(name, '').split() for name in ENVIRONMENT}
    return {
        **packages,
        **{name: _value(getattr(jax.config, name)) for name in JAX_SETTINGS if hasattr(jax.config, name)},
        **{
            name: ' '.join(sorted(w for w in words if not w.startswith(HARMLESS_XLA_FLAGS)))
            for name, words in variables.items()
        },
    }


def _value(setting) -> str:
    """Returns the value of a setting as the text that JAX reads from the environment."""
    if isinstance(setting, enum.Enum):
        setting = setting.value if isinstance(setting.value, str) else setting.name.lower()
    return str(setting)


def refuse_other_settings(folder: Path) -> None:
    """Validates that the settings of JAX are those of the run in a folder.

    Raises:
      DvinvError: they differ; the message names the settings and says how to restore them.
    """
    if differing := _differing(folder, {name: value for name, value in versions().items() if name in JAX_SETTINGS}):
        assigned = ' '.join(
            f'no {name.upper()}' if old == 'None' else f'{name.upper()}={old}' for name, (old, _) in differing.items()
        )
        raise DvinvError(
            f'{folder} holds a run under other settings of JAX: {_sentence(differing)}. Its images would be of two kinds; '
            f'set them as they were ({assigned} in the environment), or choose another --workdir.'
        )


def record_versions(folder: Path) -> None:
    """Writes the versions to the work directory, and prints a message if a run is resumed with other versions."""
    current = versions()
    if differing := _differing(folder, current):
        print(
            f'This run goes on under other versions: {_sentence(differing)}. What is made from now on may differ from what '
            'would have been made, in its last bits.',
            file=sys.stderr,
        )
    write_atomic(folder / VERSIONS_FILE, (json.dumps(current, indent=2, sort_keys=True) + '\n').encode())


def command() -> str:
    """Returns the command line that started this process; '' if it was not dvinv's, as in a notebook."""
    program, *arguments = sys.argv or ['']
    path = Path(program)
    if path.name == 'main.py' and path.parent.name == 'dvinv':
        return shlex.join(['python', '-m', 'dvinv.main', *arguments])
    return shlex.join(['dvinv', *arguments]) if path.stem == 'dvinv' else ''


def package_text() -> str:
    """Returns the versions of dvinv, Python and the packages that the results depend on."""
    found = versions()
    return ', '.join([*(f'{name} {found[name]}' for name in ('dvinv', *PACKAGES)), f'Python {platform.python_version()}'])


def _differing(folder: Path, current: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Returns {name: (recorded value, current value)} of the values in `current` that differ from those a run recorded."""
    try:
        recorded = dict(json.loads((folder / VERSIONS_FILE).read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return {}
    return {name: (recorded[name], new) for name, new in current.items() if recorded.get(name, new) != new}


def _sentence(differing: dict[str, tuple[str, str]]) -> str:
    return listed([f'{name} {old or "none"} there, {new or "none"} here' for name, (old, new) in differing.items()], 8)
