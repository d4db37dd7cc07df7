"""Seconds of one inversion step: dvinv against a loop in plain PyTorch, eager and frozen, in turns.

    pip install -e '.[benchmarks]'
    python benchmarks/step_time.py --network resnet20 --batch 64 [--rounds 9] [--devices 2] [--weights FILE] [--alone]

All three have the same network, weights, images, losses and optimiser; loss, terms and pixel gradient of the first step are
compared before anything is timed. One batch is split over dvinv's virtual CPU devices (bn_stats='global'), so its loss is
PyTorch's. Each contestant has a process of its own and sleeps while it is not its turn. Ratios are medians over rounds, with
the interval that holds the median with 95% confidence. The last line is a JSON object. `--alone` leaves PyTorch out.
"""

import argparse
import functools
import importlib.util
import json
import platform
import sys
import time

import numpy as np
from contestants import Task, Torch, Worker, cores, dvinv
from paired import median_interval

from dvinv.errors import DvinvError

# Float32 sums of a whole batch in another order: what the first steps may differ by, relative to the largest.
TERM_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-3
TURN_SECONDS = 1.0
tell = functools.partial(print, file=sys.stderr, flush=True)  # stdout is for the result


def main() -> None:
    """Measure, and print the table and the JSON line; a mistake ends in a sentence and status 1."""
    try:
        measure(parse(sys.argv[1:]))
    except DvinvError as error:
        sys.exit(f'step_time: {error}')


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--network', default='resnet20')
    parser.add_argument('--batch', type=int, default=64)
    parser.add_argument('--resolution', type=int, default=0, help="0: the network's own")
    parser.add_argument('--width', type=float, default=1.0)
    parser.add_argument('--weights', default='', help='a state dict; drawn when empty')
    parser.add_argument('--devices', type=int, default=cores(), help='virtual CPU devices that share the batch')
    parser.add_argument('--precision', default='float32', choices=('float32', 'bfloat16'))
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--steps', type=int, default=0, help='a turn; 0: as many as take about a second')
    parser.add_argument('--alone', action='store_true', help='dvinv only')
    arguments = parser.parse_args(argv)
    for name, least in (('batch', 2), ('devices', 1), ('rounds', 1), ('steps', 0)):
        if getattr(arguments, name) < least:
            raise DvinvError(f'--{name} is {getattr(arguments, name)}; it must be at least {least}.')
    if arguments.batch % arguments.devices:
        raise DvinvError(
            f'--batch {arguments.batch} is not divided by {arguments.devices} devices; choose another --devices.'
        )
    if not arguments.alone and importlib.util.find_spec('torch') is None:
        raise DvinvError("PyTorch is not installed: pip install -e '.[benchmarks]', or --alone to measure dvinv only.")
    return arguments


def measure(arguments: argparse.Namespace) -> None:
    """The whole comparison."""
    task = Task(**{field: getattr(arguments, field) for field in Task._fields})
    workers = {'dvinv': Worker('dvinv', dvinv, task)}
    about, first = (workers['dvinv'].ask(name) for name in ('about', 'first'))
    differences = {}
    if not arguments.alone:
        for name, frozen in (('torch', False), ('torch_frozen', True)):
            workers[name] = Worker(name, Torch, task, about, first, frozen)
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
        'versions': {
            'python': platform.python_version(),
            'jax': about['version'],
            'torch': workers['torch'].ask('about')['version'] if 'torch' in workers else None,
        },
    }
    print(table(median, ratios, about['flops'], result['peak_memory_mb']))
    print(json.dumps(rounded(result)))


def compared(name: str, ours: dict, theirs: dict, precision: str) -> dict:
    """How far the first steps are apart, relative to the largest term and gradient.

    Raises:
      DvinvError: too far for float32: the contestants do not compute the same.
    """
    terms = {term: abs(theirs['terms'][term] - value) / max(abs(value), 1e-6) for term, value in ours['terms'].items()}
    gradient = float(np.abs(ours['gradient'] - theirs['gradient']).max() / np.abs(ours['gradient']).max())
    if precision == 'float32' and (max(terms.values()) > TERM_TOLERANCE or gradient > GRADIENT_TOLERANCE):
        raise DvinvError(
            f'dvinv and {name} do not take the same first step: terms differ by {terms}, gradients by {gradient}.'
        )
    return {'terms': max(terms.values()), 'gradient': gradient}


def timed(workers: dict[str, Worker], rounds: int, steps: int) -> tuple[dict[str, list[float]], list[float]]:
    """({contestant: seconds a step, by round}, GFLOP/s of products of matrices); who begins a round changes."""
    turns = {name: steps or max(1, round(TURN_SECONDS / worker.ask('run', 1))) for name, worker in workers.items()}
    seconds, peaks = {name: [] for name in workers}, []
    begin, names = time.monotonic(), [*workers]
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(workers[name].ask('run', turns[name]))
        peaks += [workers[name].ask('peak_gflops') for name in names if name != 'torch_frozen']
        left = (time.monotonic() - begin) / (number + 1) * (rounds - number - 1)
        tell(f'round {number + 1} of {rounds}, {left:.0f} s left')
    return seconds, peaks


def table(median: dict, ratios: dict, flops: float, memory: dict) -> str:
    """For people, in Markdown."""
    lines = ['| | seconds a step | GFLOP/s | dvinv over it (95%) | peak MB |', '|---|---|---|---|---|']
    for name, value in median.items():
        ratio = ratios.get(f'ratio_over_{name}')
        told = f'{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})' if ratio else ''
        lines.append(f'| {name} | {value:.4f} | {flops / value / 1e9:.1f} | {told} | {memory[name]:,.0f} |')
    return '\n'.join(lines)


def rounded(tree):
    """Four significant digits."""
    if isinstance(tree, dict):
        return {key: rounded(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [rounded(value) for value in tree]
    return float(f'{tree:.4g}') if isinstance(tree, float) else tree


if __name__ == '__main__':
    main()
