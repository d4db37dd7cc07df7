"""A config over several seeds: mean and standard deviation of every figure, and the table that is printed."""

import fnmatch
import json
import statistics
from pathlib import Path

import ml_collections

from dvinv import pipeline
from dvinv.errors import DvinvError
from dvinv.runtime.files import write_atomic
from dvinv.runtime.progress import duration

HEADLINES = {  # what is printed of the figures in results.json, as patterns; in the order of the tasks
    'teacher': ('test_accuracy', 'verifier_test_accuracy'),
    'synthesis': ('images', 'verifier_accuracy', 'feature_loss_last', 'feature_loss_real'),
    'distillation': ('test_accuracy', 'agreement', 'real_test_accuracy', 'prior_only_test_accuracy', 'noise_test_accuracy'),
    'pruning': ('test_accuracy', 'unpruned_test_accuracy', 'flops_ratio', 'parameters_ratio'),
    'continual': ('test_accuracy', 'finetune_test_accuracy', 'replay_test_accuracy', 'joint_test_accuracy'),
    'quantization': ('float_test_accuracy', 'w*a*.test_accuracy'),
}


def run(config, workdir, count: int) -> dict:
    """Run `config` with the seeds config.seed, config.seed + 1, ...; each in `workdir`/seed-S, resumable.

    Returns:
      {'seeds': [...], 'runs': [results of each], 'mean': {task: {figure: float}}, 'std': the same}, also written to
      `workdir`/results.json. The deviation is the sample's (n - 1); None for one seed.

    Raises:
      DvinvError: `workdir` holds a single run or other seeds, or as for `pipeline.run`.
    """
    if (Path(workdir) / 'config.json').exists():
        raise DvinvError(f'{workdir} holds a single run; choose another --workdir for several seeds.')
    seeds, runs = [config.seed + i for i in range(count)], []
    others = {folder.name for folder in Path(workdir).glob('seed-*')} - {f'seed-{seed}' for seed in seeds}
    if others:
        raise DvinvError(
            f'{workdir} holds {", ".join(sorted(others))}, which these --seeds do not ask for; choose another --workdir.'
        )
    folders = [Path(workdir) / f'seed-{seed}' for seed in seeds]
    for i, seed in enumerate(seeds):
        one = ml_collections.ConfigDict(config)
        one.seed = seed
        runs.append(pipeline.run(one, folders[i]))
    summary = {
        'seeds': seeds,
        'runs': runs,
        'mean': _over(runs, statistics.fmean),
        'std': _over(runs, lambda values: statistics.stdev(values) if len(values) > 1 else None),
    }
    write_atomic(Path(workdir) / 'results.json', (json.dumps(summary, indent=2, sort_keys=True) + '\n').encode())
    return summary


def _over(runs: list[dict], summarise) -> dict:
    """{task: {figure: summary}} of the figures that are numbers in every run."""
    runs = [{task: _flat(figures) for task, figures in results.items()} for results in runs]

    def known(results, task, figure):
        return isinstance(results.get(task, {}).get(figure), int | float)

    return {
        task: {
            figure: summarise([results[task][figure] for results in runs])
            for figure in figures
            if figure != 'seed' and all(known(results, task, figure) for results in runs)
        }
        for task, figures in runs[0].items()
    }


def _flat(figures: dict) -> dict:
    """The figures of a task, those in an object of their own as 'w4a4.test_accuracy'."""
    flat = {}
    for name, value in figures.items():
        flat |= {f'{name}.{inner}': of for inner, of in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def table(summary: dict, workdir) -> str:
    """The headline figures in the order of the tasks, the time, and where all else is, as lines of text.

    Args:
      summary: {'runs': [results of each seed]} at least; figures have a standard deviation where it has them, under 'std'.
      workdir: the path of the work directory.
    """
    runs = summary['runs']
    mean, std = _over(runs, statistics.fmean), summary.get('std', {})
    lines = []
    for task, patterns in HEADLINES.items():
        for figure in _headlines(mean.get(task, {}), patterns):
            spread = std.get(task, {}).get(figure)
            deviation = '' if spread is None else f' +- {_short(spread)}'
            lines.append(f'{task:14}{figure:28}{_short(mean[task][figure]):>12}{deviation}')
    seconds = sum(figures['wall_seconds'] for results in runs for figures in results.values())
    lines.append(f'{"time":14}{duration(seconds)}')
    for name, what in (('report.html', 'report'), ('results.json', 'all figures')):
        if (Path(workdir) / name).exists():
            lines.append(f'{what:14}{Path(workdir) / name}')
    return '\n'.join(lines)


def _headlines(figures: dict, patterns: tuple[str, ...]) -> list[str]:
    """Returns the names of figures that match, pattern by pattern."""
    return [name for pattern in patterns for name in figures if fnmatch.fnmatchcase(name, pattern)]


def _short(value: float) -> str:
    return f'{value:,.0f}' if value >= 1000 or (value == int(value) and value > 1) else f'{value:.4f}'
