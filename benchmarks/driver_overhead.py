"""What dvinv's driver adds to the compiled step: whole syntheses against as many bare calls of the program, in pairs.

    python benchmarks/driver_overhead.py --network resnet20 --batch 64 [--iterations 100] [--pairs 9] [--devices 1]

A synthesis is `Synthesizer.fill` into a new pool: images drawn, losses fetched and checked, progress, metrics.jsonl, the
finished images judged, packed and written. The bare loop has the same state, labels and weights, and waits once, at its end;
nothing is compiled while either is timed. Each device inverts a batch of its own (bn_stats='device', dvinv's default). The
overhead is the median over pairs of (synthesis / bare - 1), with the interval that holds the median with 95% confidence. The
last line is a JSON object. About 10 minutes on 2 cores.
"""

import argparse
import functools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from contestants import SETTINGS, Task, set_up_jax, teacher_of
from paired import median_interval

from dvinv.runtime.errors import DvinvError

tell = functools.partial(print, file=sys.stderr, flush=True)  # stdout is for the result


def main() -> None:
    """Measure, and print a sentence and the JSON line; a mistake ends in a sentence and status 1."""
    try:
        arguments = parse(sys.argv[1:])
        set_up_jax(arguments.devices)
        with tempfile.TemporaryDirectory(prefix='dvinv-overhead-') as folder:
            driver, bare = zip(*measure(arguments, Path(folder)), strict=True)
    except DvinvError as error:
        sys.exit(f'driver_overhead: {error}')
    overhead, low, high = median_interval([ours / theirs - 1 for ours, theirs in zip(driver, bare, strict=True)])
    result = {
        'overhead': round(overhead, 5),
        'overhead_low': round(low, 5),
        'overhead_high': round(high, 5),
        'seconds_driver': round(statistics.median(driver), 6),  # a step
        'seconds_bare': round(statistics.median(bare), 6),
        **vars(arguments),
    }
    print(f'The driver adds {overhead:.2%} to a step ({low:.2%} to {high:.2%}, {arguments.pairs} pairs).')
    print(json.dumps(result))


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--network', default='resnet20')
    parser.add_argument('--batch', type=int, default=64)
    parser.add_argument('--width', type=float, default=1.0)
    parser.add_argument('--devices', type=int, default=1, help='virtual CPU devices, each with a batch of its own')
    parser.add_argument('--iterations', type=int, default=100, help='of a batch (the paper: 2,000)')
    parser.add_argument('--pairs', type=int, default=9)
    arguments = parser.parse_args(argv)
    for name, least in (('batch', 2), ('devices', 1), ('iterations', 1), ('pairs', 1)):
        if getattr(arguments, name) < least:
            raise DvinvError(f'--{name} is {getattr(arguments, name)}; it must be at least {least}.')
    return arguments


def measure(arguments: argparse.Namespace, folder: Path) -> list[tuple[float, float]]:
    """(seconds a step of a synthesis, of the bare program), a pair each; a pair 0, which compiles, is left out."""
    from dvinv.config import default_config, parse
    from dvinv.networks import image_shape
    from dvinv.pipeline.run import Run
    from dvinv.synthesis.pools import open_pool
    from dvinv.synthesis.synthesizer import Synthesizer

    task = Task(arguments.network, arguments.batch, 0, arguments.width, '', arguments.devices, 'float32')
    teacher, _ = teacher_of(task)
    config = default_config(SETTINGS[image_shape(task.network)[0]][0])
    config.devices = task.devices
    config.synthesis.update(images=(arguments.pairs + 1) * task.devices * task.batch, batch_size=task.batch)
    config.synthesis.stages[0].update(iterations=arguments.iterations, warmup=0)
    run = Run(parse(config), folder)
    run.teacher = teacher
    workdir = run.open_workdir()
    bare = make_bare(run.settings, teacher)
    pairs, begin = [], time.monotonic()
    with Synthesizer(run, teacher, open_pool(run), 'deepinversion', 'synthesis', 'driver') as synthesizer:

        def driver(number: int) -> float:
            start = time.perf_counter()
            synthesizer.fill([*range(number * task.devices, (number + 1) * task.devices)])
            return (time.perf_counter() - start) / arguments.iterations

        for number in range(arguments.pairs + 1):
            runs = (driver, bare) if number % 2 else (bare, driver)
            seconds = {measured: measured(number) for measured in runs}
            pairs.append((seconds[driver], seconds[bare]))
            left = (time.monotonic() - begin) / (number + 1) * (arguments.pairs - number)
            tell(f'pair {number} of {arguments.pairs}, at most {left:.0f} s left')
    workdir.close()
    return pairs[1:]


def make_bare(settings, teacher):
    """`(number of a batch) -> seconds a step` of the compiled program alone, as the driver calls it."""
    import jax
    import numpy as np

    from dvinv.inversion import balanced_labels
    from dvinv.inversion.programs import Programs
    from dvinv.runtime.devices import make_mesh

    config, size, devices = settings.inversion_config(), settings.synthesis.batch_size, settings.devices
    (stage,) = config.stages
    programs = Programs(teacher, config, make_mesh(devices))
    step = programs.advance(stage, 1)

    def bare(number: int) -> float:
        numbers = range(number * devices, (number + 1) * devices)
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(settings.seed), i))(np.array(numbers))
        labels = programs.labels(np.stack([balanced_labels(i, size, teacher.num_classes) for i in numbers]))
        state = jax.block_until_ready(programs.restart(stage, programs.begin(keys, size)))
        start = time.perf_counter()
        for _ in range(stage.iterations):
            state, _ = step(state, labels, programs.variables, None)
        jax.block_until_ready(state)
        return (time.perf_counter() - start) / stage.iterations

    return bare


if __name__ == '__main__':
    main()
