"""python -m dvinv.main --config configs/digits.py --workdir DIR [--config.field=value ...] [--seeds N]"""

import os
import signal
import sys

if __name__ == '__main__' and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # until `cli`, so that Ctrl-C in an import prints no traceback

import ast
import contextlib
import difflib
import re
import traceback
from importlib.metadata import version
from pathlib import Path

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

import dvinv
from dvinv.errors import DvinvError, listed, say
from dvinv.runtime import preemption

# The folders with the config files of dvinv: in an installed package, and in a clone.
CONFIGS = Path(__file__).parent / 'configs', Path(__file__).parents[1] / 'configs'

# A module that teacher.factory names may define flags with the same names, as many training scripts do; its flags override.
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
    'distributed',
    None,
    'Run as one of several processes, which JAX finds; default: where srun, mpirun or a TPU slice has started several.',
    allow_override=True,
)
_COORDINATOR = flags.DEFINE_string(
    'coordinator', '', 'Host and free port of process 0, where JAX does not find the processes.', allow_override=True
)
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', 0, 'With --coordinator: how many there are.', allow_override=True)
_PROCESS_ID = flags.DEFINE_integer('process_id', -1, 'With --coordinator: which one this is, from 0.', allow_override=True)


def main(_) -> None:
    # Imported late, so that a mistyped flag is reported at once; the slowest imports come after the banner.
    import jax

    from dvinv.config import TASKS, parse
    from dvinv.runtime.banner import announce
    from dvinv.runtime.compilation import keep_compiled
    from dvinv.runtime.devices import set_cpu_devices
    from dvinv.runtime.processes import is_primary, joined

    jax.config.update('jax_numpy_rank_promotion', 'allow')  # environment settings are meant for other code
    jax.config.update('jax_numpy_dtype_promotion', 'standard')
    logging.set_verbosity(logging.FATAL)  # Orbax logs every checkpoint, and tracebacks if the disk is full
    settings = parse(_CONFIG.value)
    set_cpu_devices(settings.devices)
    keep_compiled()
    if _PLAN.value:
        from dvinv.pipeline import plan

        print(plan.plan(settings))
        return
    with joined(_DISTRIBUTED.value, _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value):
        if is_primary():
            announce(settings, _WORKDIR.value, [task for task in TASKS if task in settings.tasks], _SEEDS.value)
        from dvinv.pipeline import seeds, tasks

        preemption.install()
        if _SEEDS.value:
            figures = seeds.run(settings, _WORKDIR.value, _SEEDS.value)
        else:
            figures = {'runs': [tasks.run(settings, _WORKDIR.value)]}
        if is_primary():
            print(seeds.table(figures, _WORKDIR.value))


def _parse(argv: list[str]) -> list[str]:
    """Parses the flags of a run, and raises a `DvinvError` for flags that do not define one."""
    rest = parse_flags(argv)
    if not (_WORKDIR.value or _PLAN.value):
        raise DvinvError('--workdir is missing: name the folder for all that the run writes.')
    if _SEEDS.value < 0:
        raise DvinvError(f'--seeds is {_SEEDS.value}; it must be at least 1, or 0 for a single run.')
    return rest


def parse_flags(argv: list[str]) -> list[str]:
    """Parses flags with absl; raises a `DvinvError` where absl would print a traceback or nothing at all."""
    _find_config_file(argv)
    for argument in argv[1:]:
        if found := re.match(r'--?config\.[^=]*?\.(\d+)(?=[.=\[]|$)', argument):
            start, end = found.span(1)
            raise DvinvError(
                f'An item of a tuple is named by its number in brackets, from 0: {argument[: start - 1]}[{found[1]}]'
                f'{argument[end:]}. In a shell that takes brackets for patterns, quote it.'
            )
    if not any(argument.lstrip('-').startswith(('help', '?')) for argument in argv[1:]):
        # Printed now, because the config file, which is read next, takes a second or more for its imports.
        print(f'dvinv {dvinv.__version__} with JAX {version("jax")}', file=sys.stderr, flush=True)
    if {'--helpfull', '-helpfull'} & {*argv}:
        from dvinv.config.documentation import described

        print(f'{described()}\n')
    try:
        rest = flags.FLAGS(argv)
        if _CONFIG.value is None or not hasattr(_CONFIG.value, 'tasks'):
            raise DvinvError('--config names no config file that can be read; for instance --config configs/digits.py.')
    except (AttributeError, KeyError, TypeError) as error:
        if 'tuple indices' in str(error):
            raise DvinvError(
                'A flag names a field of a tuple; say of which item, as in --config.synthesis.stages[0].iterations=5.'
            ) from error
        raise DvinvError(_unknown(error)) from error
    except IndexError as error:
        raise DvinvError(
            'A flag counts beyond the end of a tuple in the config, as --config.synthesis.stages[9] would; indices '
            'start at 0.'
        ) from error
    except (flags.Error, OSError, SyntaxError, ValueError) as error:  # ml_collections raises ValueError for a bad path
        # If a config file fails, absl's message contains a traceback; the last line is the error.
        reason = str(error).strip().splitlines()[-1]
        if 'field "stages" is None' in reason:
            raise DvinvError(
                'The stages are chosen by the size of the images, so a flag cannot set a field of one; give '
                "all of them, as in --config.synthesis.stages=\"({'iterations': 200, 'learning_rate': 0.4},)\", or name a "
                "preset in the config file: default_config('32px')."
            ) from error
        reason = re.sub('^Configuration is not .* to load: ', 'The config file fails: ', reason)
        reason = re.sub(r'\[Errno \d+\] ', '', reason).strip()
        raise DvinvError(f'{reason} (--helpfull lists all flags.)') from error
    if len(rest) > 1:
        raise DvinvError(f'Nothing is known to be done with the argument {rest[1]!r}; flags start with --.')
    return rest


def _unknown(error: Exception) -> str:
    """Returns the message for an unknown field in a flag or a config file, or for another error of the config file.

    The message of ml_collections begins with the name in quotes if the field was read, and with 'Key' if it was set. The
    message of a KeyError is quoted once more.
    """
    text, place = str(error.args[0]), _place(error)
    with contextlib.suppress(ValueError, SyntaxError):
        text = str(ast.literal_eval(text))
    if found := re.match(r"""'(\w+)'(?=\s|$)|Key "(\w+)" does not exist""", text):
        name, meant = found[1] or found[2], re.search(r'Did you mean "(.+)" instead of', text)
        close = f'; did you mean {meant[1]!r}?' if meant else _nearest(name)
        the = f'{place}the' if place else 'The'
        return f'{the} config has no field {name!r}{close} (--helpfull lists all fields).'
    if place:
        return f'{place}{" ".join(text.split())}'
    return f'The config has no such field or type: {" ".join(text.split())} (--helpfull lists all fields.)'


def _nearest(name: str) -> str:
    """Returns the end of a sentence that names a field with a similar name, of any group; '' if there is none."""
    from dvinv.config import RENAMED
    from dvinv.config.documentation import fields

    for old, new in RENAMED.items():
        if name == old.split('.')[-1]:
            return f'; it is now called {new}'
    paths = {field.path.split('.')[-1]: field.path for field in reversed(fields())}  # the first group wins
    close = difflib.get_close_matches(name, paths, 1, 0.6)
    return f'; did you mean config.{paths[close[0]]}?' if close else ''


def _place(error: Exception) -> str:
    """Returns the start of a sentence that names the line of the user's file with the error; '' if a flag caused it."""
    libraries = tuple(str(Path(source.__file__).parent) for source in (dvinv, flags, ml_collections))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith((*libraries, '<')) and frame.line:
            return f'{frame.filename}, line {frame.lineno}, `{frame.line.strip()}`: '
    return ''


def _find_config_file(argv: list[str]) -> None:
    """Finds the config file that `argv` names, in the working folder or among the config files of dvinv.

    The path of a config file of dvinv is replaced in `argv` by its full path, so that an installed dvinv can run
    `--config configs/digits.py` from any folder.

    Raises:
      DvinvError: the file does not exist or is no config file; the message lists the files that there are.
    """
    for index in range(1, len(argv)):
        name, given, value = argv[index].partition('=')
        if name not in ('--config', '-config'):
            continue
        place = index if given else index + 1
        value = value if given else ''.join(argv[place : place + 1])
        path, colon, argument = value.partition(':')
        own = next((folder / Path(path).name for folder in CONFIGS if (folder / Path(path).name).is_file()), None)
        if not Path(path).is_file() and own and Path(path) == Path('configs') / own.name:
            path = str(own)
            argv[place] = f'{name}={path}{colon}{argument}' if given else f'{path}{colon}{argument}'
        if Path(path).is_file() and path.endswith('.py'):
            if 'get_config' not in Path(path).read_text(errors='replace'):
                raise DvinvError(f'{path} is no config file: it must have a function get_config, as those in configs/ have.')
            continue
        folder = next((folder for folder in (Path('configs'), *CONFIGS) if folder.is_dir()), Path('configs'))
        names = sorted(file.name for file in folder.glob('*.py'))
        known = f'{folder}/ has {listed(names, 30)}.' if names else 'name a Python file that has a function get_config.'
        close = difflib.get_close_matches(f'{Path(path).stem}.py', names, 1)
        meant = f'did you mean {folder}/{close[0]}? ' if close else ''
        raise DvinvError(f'There is no config file {path!r}; {meant}{known}')


def cli() -> None:
    """Runs the program; a user's mistake is reported in one sentence, with exit status 1."""
    preemption.install(grace=0)
    try:
        app.run(main, flags_parser=_parse)
    except DvinvError as error:
        say(str(error))
        sys.exit(1)


if __name__ == '__main__':
    cli()
