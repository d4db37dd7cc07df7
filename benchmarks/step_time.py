"""Seconds of one inversion step: dvinv against a loop in plain PyTorch, eager and frozen, in turns.

    pip install -e '.[benchmarks]'
    python benchmarks/step_time.py --network resnet20 --batch 64 [--rounds 9] [--devices N] [--weights FILE] [--alone]
    python benchmarks/step_time.py --network resnet20 --sweep

All three have the same network, weights, images, losses and optimizer; loss, terms and pixel gradient of the first step are
compared before anything is timed. One batch is split over dvinv's virtual CPU devices (bn_stats='global'), so its loss is
PyTorch's. Each contestant has a process of its own and sleeps while it is not its turn. Ratios are medians over rounds, with
the interval that holds the median with 95% confidence. The last line is a JSON object. `--alone` leaves PyTorch out.

`--csv FILE` appends the figures to a file such as results/speed.csv (benchmarks/measured.py has the columns).

`--sweep` sets dvinv's time against its work instead: over batches, then over resolutions; the exponent b of work**b.
"""

import argparse
import functools
import importlib.util
import json
import math
import platform
import signal
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from contestants import Task, Worker, cores, dvinv, sizes
from measured import append
from paired import median_interval
from table import grid
from torch_contestant import Torch, Variant

from dvinv.runtime.errors import DvinvError

# What first steps may differ by, relative; sums of float32 in another order stay within 1e-6. A ReLU or a max-pooling whose
# inputs are that close may choose otherwise, and then the gradient of its image differs by 1e-3 or so: hence the median
# image beside the whole.
TOLERANCES = {
    'float32': {'loss': 1e-5, 'terms': 1e-5, 'gradient': 1e-2, 'gradient_of_median_image': 1e-4},
    'bfloat16': {'loss': 1e-2, 'terms': 1e-2, 'gradient': 0.2, 'gradient_of_median_image': 0.2},
}
TURN_SECONDS = 1.0
DEVICE_PIXELS = 2**15  # 32 images of 32 px: on more, a virtual CPU device did less in a second
BATCHES, RESOLUTIONS = (16, 32, 64, 128, 256), {32: (32, 40, 48, 56, 64), 224: (96, 128, 160, 192, 224)}  # of a sweep
tell = functools.partial(print, file=sys.stderr, flush=True)  # stdout is for the result


def main() -> None:
    """Measure, and print the table and the JSON line; a mistake ends in a sentence and status 1."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the contestants, as Ctrl-C does
    try:
        arguments = parse(sys.argv[1:])
        text, result = (sweep if arguments.sweep else compare)(arguments)
    except DvinvError as error:
        sys.exit(f'step_time: {error}')
    print(text)
    print(json.dumps(rounded(result)))
    if arguments.csv:
        append(arguments.csv, csv_rows(result))


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--network', default='resnet20')
    parser.add_argument('--batch', type=int, default=64)
    parser.add_argument('--resolution', type=int, default=0, help="0: the network's own")
    parser.add_argument('--width', type=float, default=1.0)
    parser.add_argument('--weights', default='', help='a state dict; drawn when empty')
    parser.add_argument('--devices', type=int, default=0, help='virtual CPU devices that share the batch; 0: what suits it')
    parser.add_argument('--precision', default='float32', choices=('float32', 'bfloat16'))
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--steps', type=int, default=0, help='a turn; 0: as many as take about a second')
    parser.add_argument('--alone', action='store_true', help='dvinv only')
    parser.add_argument('--sweep', action='store_true', help='dvinv only, over batches and resolutions')
    parser.add_argument('--batches', type=int, nargs='+', default=BATCHES, help='of the sweep')
    parser.add_argument('--resolutions', type=int, nargs='+', default=(), help="of the sweep; else the network's usual ones")
    parser.add_argument('--csv', type=Path, help='to which the figures are appended')
    arguments = parser.parse_args(argv)
    for name, least in (('batch', 2), ('resolution', 0), ('devices', 0), ('rounds', 1), ('steps', 0)):
        if getattr(arguments, name) < least:
            raise DvinvError(f'--{name} is {getattr(arguments, name)}; it must be at least {least}.')
    arguments.devices = arguments.devices or (cores() if arguments.sweep else suiting_devices(arguments))
    for batch in (arguments.batch, *(arguments.batches if arguments.sweep else ())):
        if batch < 2 or batch % arguments.devices:
            raise DvinvError(f'A batch of {batch} is not divided by {arguments.devices} devices; choose another --devices.')
    for name in ('batches', 'resolutions'):
        if len({*getattr(arguments, name)}) == 1:
            raise DvinvError(f'--{name} needs at least two different ones: no line goes through one point.')
    if not arguments.alone and not arguments.sweep and importlib.util.find_spec('torch') is None:
        raise DvinvError("PyTorch is not installed: pip install -e '.[benchmarks]', or --alone to measure dvinv only.")
    return arguments


def suiting_devices(arguments: argparse.Namespace) -> int:
    """One a core at least, and not many more pixels for each than its caches hold the layers of; they divide the batch."""
    from dvinv.networks import image_shape

    pixels = arguments.batch * (arguments.resolution or image_shape(arguments.network)[0]) ** 2
    wanted = max(cores(), pixels // DEVICE_PIXELS)
    return max(n for n in range(1, arguments.batch + 1) if n <= wanted and arguments.batch % n == 0)


def task_of(arguments: argparse.Namespace) -> Task:
    """Returns the step that the contestants measure, on CPU."""
    fields = ('network', 'batch', 'resolution', 'width', 'weights', 'devices', 'precision')
    return Task(**{field: getattr(arguments, field) for field in fields})


# The comparison


def compare(arguments: argparse.Namespace) -> tuple[str, dict]:
    """(a table, the figures) of the contestants.

    Raises:
      DvinvError: their first steps differ.
    """
    task = task_of(arguments)
    workers = {'dvinv': Worker('dvinv', dvinv, task)}
    about, start, first = (workers['dvinv'].ask(name) for name in ('about', 'start', 'first'))
    differences = {}
    if not arguments.alone:
        for name, frozen in (('torch', False), ('torch_frozen', True)):
            workers[name] = Worker(name, Torch, task, about, start, Variant(frozen=frozen))
            differences[name] = compared(name, first, workers[name].ask('first'), arguments.precision)
    seconds, peaks = timed(workers, arguments.rounds, arguments.steps)

    median = {name: float(np.median(values)) for name, values in seconds.items()}
    gflops = about['flops'] / median['dvinv'] / 1e9
    ratios = {
        f'ratio_over_{name}': median_interval([a / b for a, b in zip(seconds['dvinv'], values, strict=True)])
        for name, values in seconds.items()
        if name != 'dvinv'
    }
    result = {
        **{f'ratio_over_{name}': ratios.get(f'ratio_over_{name}', (None,))[0] for name in ('torch', 'torch_frozen')},
        'gflops': gflops,
        'fraction_of_peak': gflops / max(peaks),
        'intervals': {name: values[1:] for name, values in ratios.items()},
        **{f'seconds_{name}': median.get(name) for name in ('dvinv', 'torch', 'torch_frozen')},
        'compile_seconds': first['seconds'] - median['dvinv'],
        'peak_memory_mb': {name: worker.ask('memory_mb') for name, worker in workers.items()},
        'peak_gflops': max(peaks),
        'differences': differences,
        'rounds': arguments.rounds,
        **task._asdict(),
        'resolution': about['resolution'],
        'versions': versions(about, workers['torch'].ask('about') if 'torch' in workers else {}),
    }
    return table(median, ratios, about['flops'], result['peak_memory_mb'], differences), result


def compared(name: str, ours: dict, theirs: dict, precision: str) -> dict:
    """How far the first steps are apart: the loss and the worst term, the gradient as a whole and of the median image.

    Raises:
      DvinvError: too far: the contestants do not compute the same.
    """
    terms = {term: abs(theirs['terms'][term] - value) / max(abs(value), 1e-6) for term, value in ours['terms'].items()}
    gradients = (ours['gradient'] - theirs['gradient'], ours['gradient'])
    error, size = (np.linalg.norm(a.reshape(len(a), -1), axis=1) for a in gradients)
    differences = {
        'loss': terms['loss'],
        'terms': max(terms.values()),
        'gradient': float(np.linalg.norm(error) / np.linalg.norm(size)),
        'gradient_of_median_image': float(np.median(error / size)),
    }
    allowed = TOLERANCES[precision]
    if wrong := [f'{key} by {value:.2g}' for key, value in differences.items() if not value <= allowed[key]]:
        raise DvinvError(
            f'dvinv and {name} do not take the same first step, so they are not timed; they differ in {", ".join(wrong)}.'
        )
    return differences


def timed(workers: dict[str, Worker], rounds: int, steps: int) -> tuple[dict[str, list[float]], list[float]]:
    """({contestant: seconds a step, by round}, GFLOP/s of products of matrices); who begins a round changes."""
    turns = {name: steps or steps_of(worker.ask('run', 2)) for name, worker in workers.items()}
    seconds, peaks = {name: [] for name in workers}, []
    for names in in_turns([*workers], rounds):
        for name in names:
            seconds[name].append(workers[name].ask('run', turns[name]))
        peaks += [workers[name].ask('peak_gflops') for name in names if name != 'torch_frozen']
    return seconds, peaks


def steps_of(seconds: float) -> int:
    """How many steps of so many `seconds` a turn has."""
    return max(1, round(TURN_SECONDS / seconds))


def in_turns(names: list, rounds: int):
    """The names, `rounds` times, beginning with another one each time; tells how long it will take."""
    begin = time.monotonic()
    for number in range(rounds):
        turn = number % len(names)
        yield names[turn:] + names[:turn]
        left = (time.monotonic() - begin) / (number + 1) * (rounds - number - 1)
        tell(f'round {number + 1} of {rounds}, {left:.0f} s left')


def table(median: dict, ratios: dict, flops: float, memory: dict, differences: dict) -> str:
    """For people, in Markdown."""
    rows = []
    for name, value in median.items():
        ratio, apart = ratios.get(f'ratio_over_{name}'), differences.get(name)
        rows.append(
            [
                name,
                f'{value:.4f}',
                f'{flops / value / 1e9:.1f}',
                f'{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})' if ratio else '',
                f'{memory[name]:,.0f}',
                f'{apart["loss"]:.0e}, {apart["gradient_of_median_image"]:.0e}' if apart else '',
            ]
        )
    header = ['', 'seconds a step', 'GFLOP/s', 'dvinv over it (95%)', 'peak MB', 'loss, gradient apart']
    return '\n'.join(grid(header, rows))


# The sweep


def sweep(arguments: argparse.Namespace) -> tuple[str, dict]:
    """(tables, the figures) of dvinv's step over batches and over resolutions."""
    from dvinv.networks import image_shape

    size = image_shape(arguments.network)[0]
    task = task_of(arguments)._replace(resolution=arguments.resolution or size)
    tasks = {
        'batch': [task._replace(batch=batch) for batch in arguments.batches],
        'resolution': [task._replace(resolution=r) for r in arguments.resolutions or RESOLUTIONS.get(size, ())],
    }
    every = [*dict.fromkeys(one for several in tasks.values() for one in several)]
    worker = Worker('dvinv', sizes, every)
    gflop = dict(zip(every, [flops / 1e9 for flops in worker.ask('flops')], strict=True))
    turns = {one: arguments.steps or steps_of(worker.ask('run', index, 1)) for index, one in enumerate(every)}
    seconds = {one: [] for one in every}
    for order in in_turns(every, arguments.rounds):
        for one in order:
            seconds[one].append(worker.ask('run', every.index(one), turns[one]))
    text, result = [], {'sweep': {}, 'exponents': {}, 'intervals': {}}
    for name, several in tasks.items():
        work, times = [gflop[one] for one in several], [seconds[one] for one in several]
        b, low, high = median_interval([exponent(work, by_round) for by_round in zip(*times, strict=True)])
        rows = [
            {name: getattr(one, name), 'gflop': w, 'seconds': statistics.median(t)}
            for one, w, t in zip(several, work, times, strict=True)
        ]
        result['sweep'][name], result['exponents'][name], result['intervals'][name] = rows, b, (low, high)
        text += grid(
            [name, 'GFLOP a step', 'seconds', 'GFLOP/s'],
            [[str(r[name]), f'{r["gflop"]:.1f}', f'{r["seconds"]:.4f}', f'{r["gflop"] / r["seconds"]:.1f}'] for r in rows],
        )
        text.append(f'seconds grow as GFLOP**{b:.2f} ({low:.2f} to {high:.2f})')
    about = {'rounds': arguments.rounds, **task._asdict(), 'versions': versions(worker.ask('about'), {})}
    return '\n'.join(text), {**result, **about}


def exponent(work: list[float], seconds: list[float]) -> float:
    """b of the line log(seconds) = a + b log(work), by least squares."""
    return statistics.linear_regression([math.log(w) for w in work], [math.log(s) for s in seconds]).slope


# What they have in common


def versions(jax: dict, torch: dict) -> dict:
    """Of what was measured, from what the contestants tell."""
    return {'python': platform.python_version(), 'jax': jax['version'], 'torch': torch.get('version')}


def csv_rows(result: dict) -> list[dict]:
    """Returns the figures of a comparison or a sweep as rows of measured.COLUMNS."""
    if 'sweep' in result:
        return [
            {'what': f'sweep.{name}_{row[name]}', 'value': rounded(row['gflop'] / row['seconds']), 'unit': 'GFLOP/s'}
            | {'n': result['rounds']}
            for name, several in result['sweep'].items()
            for row in several
        ]
    rows = []
    for what, contestant in (('over_eager', 'torch'), ('over_frozen', 'torch_frozen')):
        if (ratio := result[f'ratio_over_{contestant}']) is not None:
            low, high = rounded(result['intervals'][f'ratio_over_{contestant}'])
            rows.append({'what': what, 'value': rounded(ratio), 'unit': 'ratio', 'low': low, 'high': high})
    rows.append({'what': 'gflops', 'value': rounded(result['gflops']), 'unit': 'GFLOP/s'})
    rows.append({'what': 'share_of_peak', 'value': rounded(result['fraction_of_peak']), 'unit': 'share'})
    step = f'step.{result["network"]}_{result["batch"]}'
    return [row | {'what': f'{step}.{row["what"]}', 'n': result['rounds']} for row in rows]


def rounded(tree):
    """Four significant digits."""
    if isinstance(tree, dict):
        return {key: rounded(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [rounded(value) for value in tree]
    return float(f'{tree:.4g}') if isinstance(tree, float) else tree


if __name__ == '__main__':
    main()
