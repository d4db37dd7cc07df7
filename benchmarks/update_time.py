"""Milliseconds of one update of a training on a CPU: XLA's own operations against dvinv's forms of them, in turns.

    python benchmarks/update_time.py cifar_mobilenet:32:16 mobilenet_v2:96:8:0.5 [--rounds 9] [--csv FILE]

A network is NAME:RESOLUTION:BATCH[:WIDTH]. Both programs are the train step of the task `teacher` on the same images; they
differ in `networks.suited` alone. The ratio is the median over rounds of (dvinv's / XLA's), with the interval that holds the
median with 95% confidence. A JSON object a line. `--csv FILE` appends rows to a file such as results/speed.csv.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import numpy as np
from measured import append
from paired import median_interval
from step_time import in_turns, rounded

from dvinv.config import TrainingSettings
from dvinv.networks import Classifier, create
from dvinv.runtime.devices import make_mesh
from dvinv.runtime.errors import DvinvError
from dvinv.teacher.task import supervised
from dvinv.training import step
from dvinv.training.step import Rounds, TrainJob, TrainStep

CLASSES, CHANNELS = 10, 3
UPDATES = 3  # timed at once


class Case(NamedTuple):
    """A training that is timed."""

    network: str
    resolution: int
    batch: int
    width: float = 1.0


def main() -> None:
    """Measures the networks of the command line; a mistake ends in a sentence and status 1."""
    try:
        arguments = parse(sys.argv[1:])
        for case in arguments.networks:
            result = measure(case, arguments.rounds)
            print(json.dumps(case._asdict() | result), flush=True)
            if arguments.csv:
                append(arguments.csv, csv_rows(case, result))
    except DvinvError as error:
        sys.exit(f'update_time: {error}')


def parse(argv: list[str]) -> argparse.Namespace:
    """Returns the arguments, with a `Case` a network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('networks', nargs='+', type=case_of, metavar='NAME:RESOLUTION:BATCH[:WIDTH]')
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--csv', type=Path, help='to which the figures are appended')
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1:
        raise DvinvError(f'--rounds is {arguments.rounds}; it must be at least 1.')
    for case in arguments.networks:
        if min(case.resolution, case.batch) < 1 or case.width <= 0:
            raise DvinvError(f'{case} has a number that is not above 0.')
    return arguments


def case_of(text: str) -> Case:
    """Returns the case that the command line names.

    Raises:
      ValueError: `text` is not NAME:RESOLUTION:BATCH[:WIDTH].
    """
    name, resolution, batch, *width = text.split(':')
    return Case(name, int(resolution), int(batch), *map(float, width))


def measure(case: Case, rounds: int) -> dict:
    """Returns the medians of both programs, in milliseconds, and the ratio with its interval."""
    with mock.patch.object(step, 'suited_to', lambda platform, fn, **_: fn):
        of_xla = make_update(case)
    of_dvinv = make_update(case)
    times: dict[Callable, list[float]] = {of_xla: [], of_dvinv: []}
    for updates in in_turns([of_xla, of_dvinv], rounds):
        for update in updates:
            start = time.perf_counter()
            for _ in range(UPDATES):
                update()
            times[update].append((time.perf_counter() - start) / UPDATES * 1e3)
    ratio, low, high = median_interval([suited / xla for xla, suited in zip(times[of_xla], times[of_dvinv], strict=True)])
    xla_ms, dvinv_ms = map(statistics.median, times.values())
    return rounded({'xla_ms': xla_ms, 'dvinv_ms': dvinv_ms, 'ratio': ratio, 'low': low, 'high': high, 'rounds': rounds})


def make_update(case: Case) -> Callable[[], None]:
    """Returns a function that makes an update and waits for its end; the program is compiled."""
    shape, middle = (case.resolution, case.resolution, CHANNELS), (0.5,) * CHANNELS
    settings = TrainingSettings(updates=1, batch_size=case.batch, learning_rate=1e-3, warmup=0)
    job = TrainJob(settings, supervised(0.0), Rounds(case.batch))
    # Its own function and variables are not used.
    like = Classifier(lambda variables, x: x, {}, shape, CLASSES, middle, middle)
    train_step = TrainStep(create(case.network, CLASSES, case.width), job, like, make_mesh(1, of_all=True))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (case.batch, *shape), np.uint8)
    train_step.batches.load(images, rng.integers(0, CLASSES, case.batch).astype(np.int32))
    (rows,) = train_step.batches.each([np.arange(case.batch, dtype=np.int32)])
    key = train_step.place(jax.random.key(1))
    state = train_step.place(train_step.initial_state(jax.random.key(0)))

    def update() -> None:
        nonlocal state
        state, _ = train_step(state, rows, key)
        jax.block_until_ready(state)

    update()
    return update


def csv_rows(case: Case, result: dict) -> list[dict]:
    """Returns the figures of a case as rows of measured.COLUMNS."""
    what = f'update.{case.network}_{case.resolution}_{case.batch}'
    interval = {name: result[name] for name in ('low', 'high')}
    return [
        {'what': f'{what}.xla', 'value': result['xla_ms'], 'unit': 'ms', 'n': result['rounds']},
        {'what': f'{what}.dvinv', 'value': result['dvinv_ms'], 'unit': 'ms', 'n': result['rounds']},
        {'what': f'{what}.ratio', 'value': result['ratio'], 'unit': 'ratio', 'n': result['rounds'], **interval},
    ]


if __name__ == '__main__':
    main()
