"""Files that are whole or absent: atomic writes and checksums."""

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from dvinv.errors import DvinvError
from dvinv.runtime.processes import is_primary


@contextlib.contextmanager
def disk_full_told(path: Path):
    """Turn "no space left" while writing `path` into a sentence."""
    try:
        yield
    except (OSError, ValueError) as error:
        # TensorStore, beneath Orbax, raises a ValueError with the system's words.
        full = (errno.ENOSPC, errno.EDQUOT)
        if getattr(error, 'errno', None) not in full and not any(os.strerror(code) in str(error) for code in full):
            raise
        raise DvinvError(
            f'The disk is full: {path} could not be written. Nothing that was finished is lost; free some '
            'space and run the same command again, it goes on from there.'
        ) from error


def write_atomic(path: Path, data: bytes | Iterable[bytes], own: bool = False) -> None:
    """Write `data` to `path`: after a kill or on a full disk the old file stands, or none, never a part.

    Of several processes, which make the same calls, process 0 alone writes.

    Args:
      data: parts are taken one by one, and may come from the old file itself.
      own: the file is this process's alone, and no other process writes it.

    Raises:
      DvinvError: the disk is full.
    """
    if not (own or is_primary()):
        return
    path = Path(path)
    with disk_full_told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f'.{path.name}.tmp')  # always the same, so that kills leave no heap of them
        try:
            with open(temporary, 'wb') as file:
                file.writelines([data] if isinstance(data, bytes) else data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def state_of(path: Path) -> tuple[int, int, int] | None:
    """What changes whenever the file at `path` is written or another is put there; None where there is none."""
    try:
        about = path.stat()
    except FileNotFoundError:
        return None
    # Not the time alone: the clock of some file systems stands still for milliseconds.
    return about.st_mtime_ns, about.st_ino, about.st_size
