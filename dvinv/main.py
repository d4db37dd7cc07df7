"""python -m dvinv.main --config configs/digits.py --workdir DIR [--config.field=value ...] [--seeds N]"""

import re
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from dvinv.errors import DvinvError, listed
from dvinv.runtime import preemption

# A module that teacher.factory names may define flags of these names too, as many a training script does: they give way.
_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'The config file, for instance configs/digits.py.', allow_override=True
)
_WORKDIR = flags.DEFINE_string(
    'workdir',
    None,
    'The folder for all that the run writes; the same command resumes it.',
    allow_override=True,
)
_PLAN = flags.DEFINE_bool(
    'plan',
    False,
    'Print what all tasks will cost here, from a few timed steps, and write nothing.',
    allow_override=True,
)
_SEEDS = flags.DEFINE_integer(
    'seeds',
    0,
    'Run the config with this many seeds, each in a folder of its own; 0: once.',
    allow_override=True,
)
_DISTRIBUTED = flags.DEFINE_bool(
    'distributed', None, 'Share the batches with other processes; default: where there are some.', allow_override=True
)


def main(_) -> None:
    config = _CONFIG.value
    preemption.install()
    # Imported late, so that a mistyped flag is answered at once.
    import jax

    from dvinv import pipeline, plan, seeds
    from dvinv.runtime.compilation import keep_compiled
    from dvinv.runtime.devices import set_cpu_devices
    from dvinv.runtime.job import job

    jax.config.update('jax_numpy_rank_promotion', 'allow')  # whatever the environment says, which is for other code
    jax.config.update('jax_numpy_dtype_promotion', 'standard')
    logging.set_verbosity(logging.FATAL)  # Orbax tells much of every checkpoint, and of a full disk with a traceback
    set_cpu_devices(config.devices)
    keep_compiled()
    if _PLAN.value:
        print(plan.plan(config))
        return
    with job(_DISTRIBUTED.value, config.bn_stats) as mine:
        if _SEEDS.value:
            figures = seeds.run(config, _WORKDIR.value, _SEEDS.value, mine)
        else:
            figures = {'runs': [pipeline.run(config, _WORKDIR.value, mine)]}
    if mine.leader:
        print(seeds.table(figures))


def _parse(argv: list[str]) -> list[str]:
    """absl's flag parser, with a sentence for what it would answer with a traceback or not at all."""
    _check_config_file(argv)
    for argument in argv[1:]:
        if found := re.match(r'--?config\.[^=]*?\.(\d+)(?=[.=\[]|$)', argument):
            start, end = found.span(1)
            raise DvinvError(
                f'An item of a tuple is named by its number in brackets, from 0: {argument[: start - 1]}[{found[1]}]'
                f'{argument[end:]}. In a shell that takes brackets for patterns, quote it.'
            )
    try:
        rest = flags.FLAGS(argv)
        if _CONFIG.value is None or not hasattr(_CONFIG.value, 'tasks'):
            raise DvinvError('--config names no config file that can be read; for instance --config configs/digits.py.')
    except (AttributeError, KeyError, TypeError) as error:
        if 'tuple indices' in str(error):
            raise DvinvError(
                'A flag names a field of a tuple; say of which item, as in --config.synthesis.stages[0].iterations=5.'
            ) from error
        raise DvinvError(f'The config has no such key or type: {" ".join(str(error.args[0]).split())}') from error
    except IndexError as error:
        raise DvinvError(
            'A flag counts beyond the end of a tuple in the config, as --config.synthesis.stages[9] would; indices '
            'start at 0.'
        ) from error
    except (flags.Error, OSError, SyntaxError, ValueError) as error:  # ml_collections raises ValueError for a bad path
        # Of a config file that fails, absl's message holds a traceback; its last line says what was wrong.
        reason = str(error).strip().splitlines()[-1].strip()
        if 'field "stages" is None' in reason:
            raise DvinvError(
                'The stages are chosen by the size of the images, so a flag cannot set a field of one; give '
                "all of them, as in --config.synthesis.stages=\"({'iterations': 200, 'learning_rate': 0.4},)\", or name a "
                "preset in the config file: base_config('32px')."
            ) from error
        raise DvinvError(f'{reason} (--helpfull lists all flags.)') from error
    if len(rest) > 1:
        raise DvinvError(f'Nothing is known to be done with the argument {rest[1]!r}; flags start with --.')
    if not (_WORKDIR.value or _PLAN.value):
        raise DvinvError('--workdir is missing: name the folder for all that the run writes.')
    if _SEEDS.value < 0:
        raise DvinvError(f'--seeds is {_SEEDS.value}; it must be at least 1, or 0 for a single run.')
    return rest


def _check_config_file(argv: list[str]) -> None:
    """Refuses a config file that is not there, or that is not one, with the names of those that are."""
    for argument, following in zip(argv[1:], [*argv[2:], ''], strict=True):
        name, given, value = argument.partition('=')
        if name not in ('--config', '-config'):
            continue
        path = (value if given else following).split(':')[0]
        if Path(path).is_file() and path.endswith('.py'):
            if 'get_config' not in Path(path).read_text(errors='replace'):
                raise DvinvError(f'{path} is no config file: it must have a function get_config, as those in configs/ have.')
            continue
        folder = Path('configs') if Path('configs').is_dir() else Path(__file__).parents[1] / 'configs'
        names = sorted(file.name for file in folder.glob('*.py'))
        known = f'{folder}/ has {listed(names, 30)}.' if names else 'name a Python file that has a function get_config.'
        meant = f'{Path(path).stem}.py'
        raise DvinvError(
            f'There is no config file {path!r}; {f"did you mean {folder}/{meant}?" if meant in names else known}'
        )


def cli() -> None:
    """Run, and answer a user's mistake with one sentence and the exit status 1."""
    try:
        app.run(main, flags_parser=_parse)
    except DvinvError as error:
        print(f'dvinv: {error}', file=sys.stderr)
        sys.exit(1)


if __name__ == '__main__':
    cli()
