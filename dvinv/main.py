"""python -m dvinv.main --config configs/digits.py --workdir DIR [--config.field=value ...] [--seeds N]"""

import os
import signal
import sys

if __name__ == '__main__' and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # until `cli`, so that Ctrl-C in an import prints no traceback

import ast
import contextlib
import difflib
import inspect
import re
import traceback
from importlib.metadata import version
from pathlib import Path

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

import dvinv
from dvinv import configs
from dvinv.runtime import preemption
from dvinv.runtime.errors import DvinvError, listed, say

# A module that teacher.factory names may define flags with the same names, as many training scripts do; its flags override.
_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'The config file, for instance configs/digits.py.', allow_override=True
)
_WORKDIR = flags.DEFINE_string(
    'workdir',
    None,
    'The folder for all files of the run; the same command resumes it.',
    allow_override=True,
)
_PLAN = flags.DEFINE_bool(
    'plan',
    False,
    'Print the predicted cost of all tasks on these devices, from a few timed steps, and write nothing.',
    allow_override=True,
)
_SEEDS = flags.DEFINE_integer(
    'seeds',
    0,
    'Run the config with this number of seeds, each in its own folder; 0: once.',
    allow_override=True,
)
_RECORD_MOMENTS = flags.DEFINE_string(
    'record_moments',
    '',
    'Record the moments of the teacher on real training images to this file (for --config.teacher.moments), and run nothing '
    'else. The file holds no image. The teacher is given, or was trained in --workdir.',
    allow_override=True,
)
_MOMENTS_IMAGES = flags.DEFINE_integer(
    'moments_images', 100, 'With --record_moments: the number of images, equally many per class.', allow_override=True
)
_MOMENTS_LAYERS = flags.DEFINE_list(
    'moments_layers',
    [],
    'With --record_moments: paths or classes of layers, with * for any characters; their inputs, or their outputs with '
    "':output' appended. Default: the inputs of all normalisations and the outputs of all residual blocks.",
    allow_override=True,
)
_DISTRIBUTED = flags.DEFINE_bool(
    'distributed',
    None,
    'Run as one of several processes, which JAX finds; default: if srun, mpirun or a TPU slice has started several.',
    allow_override=True,
)
_COORDINATOR = flags.DEFINE_string(
    'coordinator', '', 'Host and free port of process 0, if JAX does not find the processes.', allow_override=True
)
_NUM_PROCESSES = flags.DEFINE_integer(
    'num_processes', 0, 'With --coordinator: the number of processes.', allow_override=True
)
_PROCESS_ID = flags.DEFINE_integer(
    'process_id', -1, 'With --coordinator: the number of this process, from 0.', allow_override=True
)


def main(_) -> None:
    """Runs the config that the flags name, prints its plan, or records moments of its teacher."""
    # Imported late, so that a mistyped flag is reported at once; the slowest imports come after the banner.
    import jax

    from dvinv.config import parse
    from dvinv.runtime.devices import is_primary, joined, keep_compiled, set_cpu_devices
    from dvinv.runtime.progress import announce

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
    if _RECORD_MOMENTS.value:
        from dvinv.teacher.task import record_to_file

        print(record_to_file(settings, _WORKDIR.value, _RECORD_MOMENTS.value, _MOMENTS_IMAGES.value, _MOMENTS_LAYERS.value))
        return
    with joined(_DISTRIBUTED.value, _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value):
        if is_primary():
            announce(settings, _WORKDIR.value, settings.ordered_tasks, _SEEDS.value)
        from dvinv.pipeline import tasks

        preemption.install()
        if _SEEDS.value:
            summary = tasks.run_seeds(settings, _WORKDIR.value, _SEEDS.value)
        else:
            summary = {'runs': [tasks.run(settings, _WORKDIR.value)]}
        if is_primary():
            print(tasks.table(summary, _WORKDIR.value))


def _parse(argv: list[str]) -> list[str]:
    """Parses the flags of a run, and raises a `DvinvError` for flags that do not define one."""
    arguments = _parse_flags(argv)
    if _RECORD_MOMENTS.value:
        if _PLAN.value or _SEEDS.value:
            raise DvinvError('--record_moments runs nothing else; leave out --plan and --seeds.')
        if not Path(_RECORD_MOMENTS.value).absolute().parent.is_dir():
            raise DvinvError(f'--record_moments is {_RECORD_MOMENTS.value!r}, but there is no such folder.')
    elif not (_WORKDIR.value or _PLAN.value):
        raise DvinvError('--workdir is missing; name the folder for all files of the run.')
    if _SEEDS.value < 0:
        raise DvinvError(f'--seeds is {_SEEDS.value}; it must be at least 1, or 0 for a single run.')
    return arguments


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses flags with absl; raises a `DvinvError` where absl would print a traceback or nothing at all."""
    _find_config_file(argv)
    for argument in argv[1:]:
        if match := re.match(r'--?config\.[^=]*?\.(\d+)(?=[.=\[]|$)', argument):
            start, end = match.span(1)
            raise DvinvError(
                f'An item of a tuple is named by its number in brackets, from 0: {argument[: start - 1]}[{match[1]}]'
                f'{argument[end:]}. Quote it in a shell that expands brackets.'
            )
    if not any(argument.lstrip('-').startswith(('help', '?')) for argument in argv[1:]):
        # Printed now, because the config file, which is read next, takes a second or more for its imports.
        print(f'dvinv {dvinv.__version__} with JAX {version("jax")}', file=sys.stderr, flush=True)
    if {'--helpfull', '-helpfull'} & {*argv}:
        from dvinv.config.parsing import described

        print(f'{described()}\n')
    try:
        arguments = flags.FLAGS(argv)
        if _CONFIG.value is None or not hasattr(_CONFIG.value, 'tasks'):
            raise DvinvError('--config names no config file; give one, for instance --config configs/digits.py.')
    except (AttributeError, KeyError, TypeError) as error:
        if 'tuple indices' in str(error):
            raise DvinvError(
                'A flag names a field of a tuple; say of which item, as in --config.synthesis.stages[0].iterations=5.'
            ) from error
        raise DvinvError(_unknown(error)) from error
    except IndexError as error:
        raise DvinvError(
            'A flag has an index beyond the end of a tuple in the config, as --config.synthesis.stages[9] would; indices '
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
    if len(arguments) > 1:
        raise DvinvError(f'Unexpected argument {arguments[1]!r}; flags start with --.')
    return arguments


def _unknown(error: Exception) -> str:
    """Returns the message for an unknown field in a flag or a config file, or for another error of the config file.

    The message of ml_collections begins with the name in quotes if the field was read, and with 'Key' if it was set. The
    message of a KeyError is quoted once more.
    """
    text, location = str(error.args[0]), _location(error)
    with contextlib.suppress(ValueError, SyntaxError):
        text = str(ast.literal_eval(text))
    if match := re.match(r"""'(\w+)'(?=\s|$)|Key "(\w+)" does not exist""", text):
        name, similar = match[1] or match[2], re.search(r'Did you mean "(.+)" instead of', text)
        suggestion = f'; did you mean {similar[1]!r}?' if similar else _suggestion(name)
        start = f'{location}the' if location else 'The'
        return f'{start} config has no field {name!r}{suggestion} (--helpfull lists all fields).'
    if location:
        return f'{location}{" ".join(text.split())}'
    return f'The config has no such field or type: {" ".join(text.split())} (--helpfull lists all fields.)'


def _suggestion(name: str) -> str:
    """Returns the end of a sentence that names a field with a similar name, of any group; '' if there is none."""
    from dvinv.config import RENAMED
    from dvinv.config.parsing import fields

    for old, new in RENAMED.items():
        if name == old.split('.')[-1]:
            return f'; it is now called {new}'
    paths = {field.path.split('.')[-1]: field.path for field in reversed(fields())}  # the first group wins
    similar = difflib.get_close_matches(name, paths, 1, 0.6)
    return f'; did you mean config.{paths[similar[0]]}?' if similar else ''


def _location(error: Exception) -> str:
    """Returns the start of a sentence that names the line of the user's file with the error; '' if a flag caused it."""
    libraries = tuple(str(Path(inspect.getfile(module)).parent) for module in (dvinv, flags, ml_collections))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith((*libraries, '<')) and frame.line:
            return f'{frame.filename}, line {frame.lineno}, `{frame.line.strip()}`: '
    return ''


def _find_config_file(argv: list[str]) -> None:
    """Finds the config file that `argv` names, in the working folder or among the config files of dvinv.

    The path of a config file of dvinv is replaced in `argv` by its full path, so that an installed dvinv can run
    `--config configs/digits.py` from any folder.

    Raises:
      DvinvError: the file does not exist or is no config file; the message lists the existing files.
    """
    for index in range(1, len(argv)):
        name, equals, value = argv[index].partition('=')
        if name not in ('--config', '-config'):
            continue
        position = index if equals else index + 1  # of the argument that contains the value
        if not equals:
            value = ''.join(argv[position : position + 1])
        path, colon, argument = value.partition(':')
        bundled = configs.FOLDER / Path(path).name
        if not Path(path).is_file() and bundled.is_file() and Path(path) == Path('configs') / bundled.name:
            path = str(bundled)
            argv[position] = f'{name}={path}{colon}{argument}' if equals else f'{path}{colon}{argument}'
        if Path(path).is_file() and path.endswith('.py'):
            if 'get_config' not in Path(path).read_text(errors='replace'):
                raise DvinvError(
                    f'{path} is no config file: it must have a function get_config, like the files in configs/.'
                )
            continue
        folder = Path('configs') if Path('configs').is_dir() else configs.FOLDER
        names = sorted(file.name for file in folder.glob('*.py') if file.name != '__init__.py')
        choices = f'{folder}/ has {listed(names, 30)}.' if names else 'name a Python file that has a function get_config.'
        similar = difflib.get_close_matches(f'{Path(path).stem}.py', names, 1)
        suggestion = f'did you mean {folder}/{similar[0]}? ' if similar else ''
        raise DvinvError(f'There is no config file {path!r}; {suggestion}{choices}')


def cli() -> None:
    """Runs `main` with absl flags; a user's mistake is reported in one sentence, with exit status 1."""
    preemption.install(grace=0)
    try:
        app.run(main, flags_parser=_parse)
    except DvinvError as error:
        say(str(error))
        sys.exit(1)


if __name__ == '__main__':
    cli()
