"""Atomic writes and checksums of files."""

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from dvinv.runtime.devices import is_primary
from dvinv.runtime.errors import DvinvError


@contextlib.contextmanager
def refuse_full_disk(path: Path):
    """Converts a "no space left" error while writing `path` into a `DvinvError`."""
    try:
        yield
    except (OSError, ValueError) as error:
        # TensorStore, which Orbax uses, raises a ValueError with the system's message.
        full = (errno.ENOSPC, errno.EDQUOT)
        if getattr(error, 'errno', None) not in full and not any(os.strerror(code) in str(error) for code in full):
            raise
        raise DvinvError(
            f'The disk is full: {path} could not be written. Nothing that was finished is lost; free some '
            'space and run the same command again, it goes on from there.'
        ) from error


def write_atomic(path: Path, data: bytes | Iterable[bytes], own: bool = False) -> None:
    """Writes `data` to `path` atomically: after a kill or on a full disk, the old file (or none) remains, never a part.

    If there are several processes, which make the same calls, only process 0 writes.

    Args:
      path: the path of the file.
      data: the bytes, or parts of them that are taken one by one and may be read from the old file itself.
      own: whether the file belongs to this process only, so that this process writes it.

    Raises:
      DvinvError: the disk is full.
    """
    if not (own or is_primary()):
        return
    path = Path(path)
    with refuse_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f'.{path.name}.tmp')  # a fixed name, so that kills do not leave many files
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
    """Returns the hexadecimal sha256 of the bytes of a file."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def state_of(path: Path) -> tuple[int, int, int] | None:
    """Returns a value that changes whenever the file at `path` is written or replaced; None if there is no file."""
    try:
        about = path.stat()
    except FileNotFoundError:
        return None
    # The time alone is not enough: the clock of some file systems only advances every few milliseconds.
    return about.st_mtime_ns, about.st_ino, about.st_size
