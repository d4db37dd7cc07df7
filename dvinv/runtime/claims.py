"""Who may run in a work directory: one process of each number, and all of one count. Locks end with their process."""

from pathlib import Path

from dvinv.errors import DvinvError
from dvinv.runtime.processes import Processes

try:
    import fcntl
except ModuleNotFoundError as error:
    raise DvinvError(
        'dvinv runs on Linux and macOS: Windows has no locks of the kind that keep two runs out of one folder; use WSL 2.'
    ) from error


class OccupiedError(DvinvError):
    """The place of this process is taken, or the run under way is not one that has it."""


def claim(folder: Path, processes: Processes) -> list:
    """Lock `folder` for this process; returns open files, which hold the locks until they are closed.

    Raises:
      OccupiedError: a process of the same number is running there, or processes of another count.
    """
    held = []
    try:
        held.append(_own(folder, processes))
        held.append(_count(folder, processes))
    except BaseException:
        for file in held:
            file.close()
        raise
    return held


def _own(folder: Path, processes: Processes):
    file = open(folder / ('.lock' if processes.leader else f'.lock-{processes.index}'), 'w')  # noqa: SIM115  held
    if not _locked(file, fcntl.LOCK_EX):
        file.close()
        who = 'Another process' if processes.leader else f'Another process {processes.index} of {processes.count}'
        raise OccupiedError(f'{who} is running in {folder}; wait for it, or choose another --workdir.')
    return file


def _count(folder: Path, processes: Processes):
    """Each number belongs to one process only while all agree how many there are: whoever comes first writes it down."""
    file = open(folder / '.processes', 'ab+', buffering=0)  # noqa: SIM115  held
    mine = str(processes.count).encode()
    try:
        if _locked(file, fcntl.LOCK_EX):
            file.truncate(0)
            file.write(mine)
        fcntl.flock(file, fcntl.LOCK_SH)
        file.seek(0)
        theirs = file.read()
        if theirs != mine:
            raise OccupiedError(
                f'A run of {theirs.decode()} processes is under way in {folder}, and this one is of {processes.count}; stop '
                'the others first.'
            )
    except BaseException:
        file.close()
        raise
    return file


def _locked(file, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
