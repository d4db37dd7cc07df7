"""The paper's table 1: test accuracy of students, methods by teachers, over seeds; run cell by cell, as time allows.

    python benchmarks/table.py --configs configs/cifar10_resnet34.py configs/cifar10_vgg11.py --workdir runs/table
        [--methods adaptive deepinversion prior_only noise real] [--seeds 3] [--minutes 9] [-- --config.field=value ...]

A cell is one config, method and seed: a run of `dvinv.main` in WORKDIR/CONFIG/METHOD/seed-S, with the flags after `--`. A
config's teacher and verifier, where no file gives them, are trained once, in WORKDIR/CONFIG/teacher, with seed 0. `real` is
the upper control, a student of the real training images, beside one of noise: its run makes both.

The same command skips what is finished and resumes what was ended. Writes WORKDIR/table.md, table.json and table.csv (rows
for results/) after every cell.

Exit status: 0, all is finished; 1, all was tried and some failed; 3, the `--minutes` are over, run it again.
"""

import argparse
import functools
import itertools
import json
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from measured import append

METHODS = ('adaptive', 'deepinversion', 'prior_only', 'noise', 'real')
OWN = ('seed', 'tasks', 'synthesis.method', 'distillation.controls')  # the settings in which cells differ
HARMLESS = ('devices', 'logging', 'verifiers', 'teacher.weights', 'verifier.weights')  # those in which they may
COUNTS = ('images', 'updates', 'rounds', 'test_images')
tell = functools.partial(print, file=sys.stderr, flush=True)  # stdout is for the table alone


class Cell(NamedTuple):
    """One run; that of the method 'teacher', once a config, makes the networks that the others start from."""

    config: str
    method: str
    seed: int

    def __str__(self) -> str:
        return f'{name_of(self.config)} {self.method}' + (f' seed {self.seed}' if self.method != 'teacher' else '')


def main() -> None:
    """Fill the table as far as time allows, and print it."""
    arguments = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the running cell, as Ctrl-C does
    try:
        status = fill(arguments, time.monotonic() + 60 * arguments.minutes)
    except KeyboardInterrupt:
        status = 130
    print(markdown(collect(arguments)))
    sys.exit(status)


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments, with the flags after `--` as `flags`; ends with a sentence where they make no table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog='Flags after -- go to every cell.')
    parser.add_argument('--configs', nargs='+', required=True, help='the columns: config files')
    parser.add_argument('--methods', nargs='+', default=METHODS, choices=METHODS, help='the rows, from top to bottom')
    parser.add_argument('--seeds', type=int, default=3, help='how many: 0, 1, ...')
    parser.add_argument('--workdir', type=Path, required=True)
    parser.add_argument('--minutes', type=float, default=1e6, help='then nothing is started, and what runs is ended')
    cut = argv.index('--') if '--' in argv else len(argv)
    arguments = parser.parse_args(argv[:cut])
    arguments.flags = argv[cut + 1 :]
    names = [name_of(config) for config in arguments.configs]
    if len({*names}) < len(names):
        parser.error(f'--configs needs names that differ, not {" ".join(names)}')
    for flag in arguments.flags:
        if flag.lstrip('-').partition('=')[0] in {'config', 'workdir', 'seeds', *(f'config.{key}' for key in OWN)}:
            parser.error(f'{flag} is set for every cell here; leave it out after --')
    earlier = read(arguments.workdir / 'table.json').get('flags', arguments.flags)
    if earlier != arguments.flags:
        parser.error(f'{arguments.workdir} has cells with -- {" ".join(earlier)}; repeat that, or choose another --workdir')
    return arguments


# What there is to run


def name_of(config: str) -> str:
    """What a config goes by: 'configs/digits.py:smoke' by 'digits-smoke'."""
    path, _, argument = config.partition(':')
    return Path(path).stem + (f'-{argument}' if argument else '')


def run_of(method: str, methods) -> str:
    """The method whose run has the figures of `method`: that of 'real' has a student of noise beside it."""
    return 'real' if method == 'noise' and 'real' in methods else method


def plan(configs, methods, seeds: int) -> list[Cell]:
    """All cells in order: a seed's before the next one's, a config's teacher before its students."""
    runs = [*dict.fromkeys(run_of(method, methods) for method in methods)]
    return [
        Cell(config, method, seed)
        for seed in range(seeds)
        for config in configs
        for method in (runs if seed else ['teacher', *runs])
    ]


def folder_of(workdir: Path, cell: Cell) -> Path:
    """The cell's work directory."""
    folder = workdir / name_of(cell.config) / cell.method
    return folder if cell.method == 'teacher' else folder / f'seed-{cell.seed}'


def read(path: Path) -> dict:
    """The parsed JSON file; {} where there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def finished(workdir: Path, cell: Cell) -> dict:
    """The results of a finished cell, by task; {} of any other."""
    results = read(folder_of(workdir, cell) / 'results.json')
    return results if ('teacher' if cell.method == 'teacher' else 'distillation') in results else {}


def command(workdir: Path, cell: Cell, flags: list[str]) -> list[str]:
    """The cell's program and arguments; the config.json in the teacher's folder tells which networks were trained there."""
    settings = {'seed': cell.seed, 'tasks': ('teacher',), 'distillation.controls': ()}
    if cell.method != 'teacher':
        settings['tasks'] = ('teacher', 'synthesis', 'distillation')
        settings['distillation.controls'] = ('real',) if cell.method == 'real' else ()
        settings['synthesis.method'] = 'noise' if cell.method == 'real' else cell.method
        teacher = folder_of(workdir, Cell(cell.config, 'teacher', 0))
        for role in ('teacher', 'verifier'):
            group = read(teacher / 'config.json')[role]
            if group['network'] and not group['weights'] and not group.get('factory'):
                settings[f'{role}.weights'] = (teacher / 'networks' / f'{role}.safetensors').resolve()
    run = [sys.executable, '-m', 'dvinv.main', '--config', cell.config, '--workdir', str(folder_of(workdir, cell))]
    return [*run, *flags, *(f'--config.{key}={value}' for key, value in settings.items())]


def unlike(workdir: Path, cells: list[Cell]) -> list[Cell]:
    """Cells with other settings than the first of their config: its file was changed in between."""
    settings = {cell: found for cell in cells if (found := read(folder_of(workdir, cell) / 'config.json'))}
    for config, key in itertools.product(settings.values(), (*OWN, *HARMLESS)):
        group, _, name = key.rpartition('.')
        (config[group] if group else config).pop(name, None)
    first = {cell.config: config for cell, config in reversed(settings.items())}
    return [cell for cell, config in settings.items() if config != first[cell.config]]


# Running it


def fill(arguments, deadline: float) -> int:
    """Run what is not finished, until `deadline` on the monotonic clock; returns the exit status."""
    workdir, failed = arguments.workdir, set()
    cells = plan(arguments.configs, arguments.methods, arguments.seeds)
    write(arguments, cells)
    for cell in cells:
        if finished(workdir, cell):
            continue
        if Cell(cell.config, 'teacher', 0) in failed:
            tell(f'{cell}: left out, for want of its teacher')
            continue
        seconds = {other: wall_seconds(results) for other in cells if (results := finished(workdir, other))}
        state, status, remaining = f'{len(seconds)} of {len(cells)} cells finished', None, deadline - time.monotonic()
        if remaining > 0:
            tell(f'{cell}: {state}{left(cells, seconds)}')
            log = folder_of(workdir, cell) / 'log.txt'
            status = run(command(workdir, cell, arguments.flags), log, remaining)
            write(arguments, cells)
        if status is None:
            tell(f'The minutes are over, {state}: not finished yet, run again')
            return 3
        if status:
            failed.add(cell)
            *_, last = ['no message', *log.read_text(errors='replace').split('\n')[:-1]]
            tell(f'{cell}: failed with status {status}: {last}')
    return 1 if failed else 0


def run(command: list[str], log: Path, seconds: float) -> int | None:
    """The exit status of `command`, whose messages go to `log`; None where it had to be ended after so many seconds."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, 'wb') as messages:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=messages)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:  # after Ctrl-C too; what has ended is not touched
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wall_seconds(results: dict) -> float:
    """Seconds that a cell's tasks took, kills and resumptions included."""
    return sum(figures['wall_seconds'] for figures in results.values())


def left(cells: list[Cell], seconds: dict[Cell, float]) -> str:
    """How long the cells without `seconds` will take: as the finished ones of their config and method, else as all."""
    known = [cell for cell in seconds if cell.method != 'teacher']

    def expected(cell: Cell) -> float:
        return statistics.fmean(seconds[other] for other in [c for c in known if c[:2] == cell[:2]] or known)

    return f', about {sum(expected(cell) for cell in cells if cell not in seconds) / 60:.1f} min left' if known else ''


# What came of it


def write(arguments, cells: list[Cell]) -> None:
    """Write table.json, table.md and table.csv; ends with a sentence where they would mix results of different settings."""
    if strays := unlike(arguments.workdir, cells):
        folder = folder_of(arguments.workdir, strays[0])
        sys.exit(f'{folder} has other settings than the cells before it; delete what is old, or choose another --workdir')
    table = collect(arguments)
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    (arguments.workdir / 'table.json').write_text(json.dumps(table, indent=2) + '\n')
    (arguments.workdir / 'table.md').write_text(markdown(table) + '\n')
    (arguments.workdir / 'table.csv').unlink(missing_ok=True)
    append(arguments.workdir / 'table.csv', csv_rows(table))


def collect(arguments) -> dict:
    """All figures, from the cells' work directories: what table.json holds. Shares and seconds; None where not known yet."""
    workdir, methods, configs = arguments.workdir, arguments.methods, {}
    for config in arguments.configs:
        students = {}
        for method in methods:
            cells = [Cell(config, run_of(method, methods), seed) for seed in range(arguments.seeds)]
            students[method] = figures_of(method, {c.seed: results for c in cells if (results := finished(workdir, c))})
        scores = {method: figures['accuracy']['by_seed'] for method, figures in students.items()}
        configs[name_of(config)] = {
            'teacher': finished(workdir, Cell(config, 'teacher', 0)).get('teacher', {}),
            'students': students,
            'differences': {f'{a} - {b}': difference(scores[a], scores[b]) for a, b in itertools.pairwise(methods)},
        }
    return {'flags': arguments.flags, 'seeds': arguments.seeds, 'configs': configs}


def figures_of(method: str, runs: dict[int, dict]) -> dict:
    """A method's figures, from the results of its finished runs by seed."""
    name = 'real_test_accuracy' if method == 'real' else 'test_accuracy'
    scores = {seed: results['distillation'][name] for seed, results in runs.items()}
    figures = {
        'accuracy': summary({seed: score for seed, score in scores.items() if score is not None}),  # None: no test images
        'wall_seconds': {seed: wall_seconds(results) for seed, results in runs.items()},
    }
    for results in runs.values():
        figures.update(updates=results['distillation']['updates'], test_images=results['teacher']['test_images'])
        if method != 'real':  # whose run made images for `noise` alone
            figures.update(images=results['synthesis']['images'], rounds=results['synthesis']['rounds'])
    return figures


def difference(ours: dict[int, float], theirs: dict[int, float]) -> dict:
    """Ours minus theirs, paired by seed, over the seeds that both have."""
    return summary({seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs})


def summary(by_seed: dict[int, float]) -> dict:
    """Mean, the sample's standard deviation (n - 1) and the mean's standard error; None of too few values."""
    values = [*by_seed.values()]
    mean = statistics.fmean(values) if values else None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    error = None if deviation is None else deviation / len(values) ** 0.5
    return {'by_seed': by_seed, 'mean': mean, 'deviation': deviation, 'error': error}


def markdown(table: dict) -> str:
    """What `collect` returns, as tables for people."""
    configs, scores, differences, costs = table['configs'], {}, {}, []
    for name, config in configs.items():
        teacher, students = config['teacher'], config['students']
        score = teacher.get('test_accuracy')
        scores.setdefault('teacher', []).append(percent(summary({} if score is None else {0: score}), 'deviation', 1))
        for method, figures in students.items():
            scores.setdefault(method, []).append(percent(figures['accuracy'], 'deviation', table['seeds']))
        for pair, figures in config['differences'].items():
            differences.setdefault(pair, []).append(percent(figures, 'error', table['seeds'], '+'))
        alone = {'teacher': {**teacher, 'wall_seconds': {0: teacher['wall_seconds']}}} if teacher else {}
        costs += [[name, row, *cost(figures)] for row, figures in {**alone, **students}.items() if figures['wall_seconds']]
    return '\n'.join(
        [
            'Accuracy on real test images in percent: mean ± standard deviation over n seeds',
            *grid(['', *configs], [[method, *row] for method, row in scores.items()]),
            'Differences in percentage points, paired by seed: mean ± standard error over n seeds',
            *grid(['', *configs], [[pair, *row] for pair, row in differences.items()]),
            'What a cell took and did; one run makes both `noise` and `real` where both are asked for',
            *grid(['', '', 'minutes, mean', 'longest', *(count.replace('_', ' ') for count in COUNTS)], costs),
        ]
    )


def csv_rows(table: dict) -> list[dict]:
    """Returns what `collect` returns as rows of measured.COLUMNS: accuracy and seconds of every seed."""
    rows = []
    for name, config in table['configs'].items():
        if 'test_accuracy' in config['teacher']:
            rows.append({'what': f'{name}.teacher', 'value': config['teacher']['test_accuracy'], 'unit': 'share', 'seed': 0})
        for method, figures in config['students'].items():
            columns = (('', figures['accuracy']['by_seed'], 'share'), ('_seconds', figures['wall_seconds'], 's'))
            for ending, by_seed, unit in columns:
                rows += [
                    {'what': f'{name}.{method}{ending}', 'value': value, 'unit': unit, 'seed': seed}
                    for seed, value in by_seed.items()
                ]
    return [row for row in rows if row['value'] is not None]


def percent(summary: dict, spread: str, seeds: int, sign: str = '') -> str:
    """'91.25 ± 0.31 (n = 3)', with the `spread` of this name; tells where other seeds are still to come."""
    count = len(summary['by_seed'])
    if not count:
        return 'unfinished'
    around = '' if summary[spread] is None else f' ± {100 * summary[spread]:.2f}'
    return f'{100 * summary["mean"]:{sign}.2f}{around} (n = {count}{f" of {seeds}, unfinished" if count < seeds else ""})'


def cost(figures: dict) -> list[str]:
    """Mean and longest minutes, then the counts, of a row of the last table."""
    minutes = [seconds / 60 for seconds in figures['wall_seconds'].values()]
    counts = (figures.get(name) for name in COUNTS)
    return [f'{statistics.fmean(minutes):.1f}', f'{max(minutes):.1f}', *('' if n is None else f'{n:,}' for n in counts)]


def grid(header: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table's lines, an empty one before and after."""
    return ['', *(f'| {" | ".join(row)} |' for row in (header, ['---'] * len(header), *rows)), '']


if __name__ == '__main__':
    main()
