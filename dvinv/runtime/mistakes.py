"""Word of a process that has ended with a mistake, for those that wait for it: a file in the work directory.

A process that comes back takes its own word away. So word that lay there already, when a process opened the work directory,
is of an earlier run, unless it stays: then its process came first, and failed before anybody was there to hear.
"""

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

from dvinv.errors import DvinvError
from dvinv.runtime.claims import OccupiedError, claim
from dvinv.runtime.files import state_of, write_atomic
from dvinv.runtime.processes import Processes

PATIENCE = 300.0  # seconds that a process has to come back and take away its word


@contextlib.contextmanager
def told(folders: Sequence[Path], processes: Processes):
    """What ends this process within the context is told to the others in each work directory, before it is raised on.

    Not that a place is taken: who is refused for that is none of the run's. Processes of a job hear by the job itself.
    """
    try:
        yield
    except OccupiedError:
        raise
    except DvinvError as error:
        _tell(folders, processes, str(error))
        raise
    except Exception as error:
        _tell(folders, processes, ' '.join(f'{type(error).__name__}: {error}'.split())[:500])
        raise


def _tell(folders: Sequence[Path], processes: Processes, sentence: str) -> None:
    if processes.count == 1 or processes.joined:
        return
    for folder in folders:
        # Of a full disk the others hear by themselves; and a process of the same number that lives has not failed.
        with contextlib.suppress(DvinvError, OSError):
            Path(folder).mkdir(parents=True, exist_ok=True)
            held = claim(folder, processes)
            try:
                write_atomic(_word(folder, processes.index), sentence.encode())
            finally:
                for file in held:
                    file.close()


def take_back(folder: Path, processes: Processes) -> None:
    """This process has come back: its word of an earlier run holds no more."""
    _word(folder, processes.index).unlink(missing_ok=True)


class Mistakes:
    """What one process hears of the others, from now on."""

    def __init__(self, folder: Path, processes: Processes):
        """Takes away this process's own word: it has come back."""
        self._folder, self._count = folder, processes.count
        take_back(folder, processes)
        self._opened, self._old = time.monotonic(), self._words()

    def heard(self) -> dict[int, str]:
        """{process: sentence} of those that have ended with a mistake, and not come back."""
        late = time.monotonic() - self._opened >= PATIENCE
        found = {}
        for index, state in self._words().items():
            if late or self._old.get(index) != state:
                with contextlib.suppress(FileNotFoundError):  # it comes back just now
                    found[index] = _word(self._folder, index).read_text()
        return found

    def _words(self) -> dict[int, tuple[int, int]]:
        """{process: `state_of` its word} of all words that lie there."""
        states = {index: state_of(_word(self._folder, index)) for index in range(self._count)}
        return {index: state for index, state in states.items() if state}


def _word(folder: Path, index: int) -> Path:
    return Path(folder) / f'.failed-{index}'
