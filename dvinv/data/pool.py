"""The image pool: synthesized images on disk, one shard per numbered batch.

    shard-000003.npz   images uint8 [B, H, W, C], labels int32 [B], logits float32 [B, K] of the stored pixels
    shard-000003.json  the sidecar: sha256 of the npz, the teacher's digest, the entries of the synthesizer (including curves
                       of the loss terms), and a sha256 of all these
    quarantine/        damaged shards, kept for inspection

The sidecar is written last: a shard without a sidecar does not exist. A pool can be read with numpy alone, also while it
grows. Shards are not compressed (noise hardly compresses), so that single images can be read from a pool of any size.
"""

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
from jaxtyping import Float, Num

from dvinv.data.dataset import Rows
from dvinv.runtime import preemption
from dvinv.runtime.errors import DvinvError
from dvinv.runtime.files import sha256_of, state_of, write_atomic

# (path, `state_of(path)`) of the shards that this process has checked, since hashing a large pool takes long.
_checked: set[tuple[Path, tuple[int, int, int]]] = set()


class DamagedError(DvinvError):
    """A shard or its sidecar is missing, truncated or changed.

    Attributes:
      what: the message without the remedy.
    """

    def __init__(self, what: str, way_out: str):
        super().__init__(f'{what}; {way_out}.')
        self.what = what


class ImagePool:
    """A pool in a folder. The bytes of its files depend only on the images, so equal runs make equal pools."""

    def __init__(self, folder: str | Path, teacher_digest: str = '', quarantine: bool = False):
        """Names the folder; touches no file yet.

        Args:
          folder: the folder of the pool.
          teacher_digest: the digest of the teacher that must have made the images; '' for any teacher.
          quarantine: whether a damaged shard is moved to quarantine when it is found, so that it counts as missing and is
            made again.
        """
        self.folder = Path(folder)
        self._digest, self._quarantine = teacher_digest, quarantine

    def write(
        self,
        number: int,
        images: Num[np.ndarray, 'B H W C'],
        labels: Num[np.ndarray, ' B'],
        logits: Float[np.ndarray, 'B K'],
        entries: dict,
    ) -> None:
        """Adds batch `number` atomically.

        Args:
          number: the number of the batch.
          images: uint8 [B, H, W, C].
          labels: int [B].
          logits: the teacher's logits of `images`, [B, K].
          entries: further entries of the sidecar, as JSON.

        Raises:
          DvinvError: the disk is full.
        """
        buffer = io.BytesIO()
        np.savez(buffer, images=images.astype(np.uint8), labels=labels.astype(np.int32), logits=logits.astype(np.float32))
        path, data = self._shard(number), buffer.getvalue()
        write_atomic(path, data, own=True)
        sidecar = {'sha256': hashlib.sha256(data).hexdigest(), 'teacher': self._digest, 'images': len(labels), **entries}
        sidecar['notes_sha256'] = _checksum(sidecar)
        write_atomic(path.with_suffix('.json'), _dumps(sidecar), own=True)

    def numbers(self) -> list[int]:
        """Returns the numbers of the finished shards, in ascending order."""
        numbers = (path.stem.removeprefix('shard-') for path in self.folder.glob('shard-*.json'))
        return sorted(int(number) for number in numbers if number.isdecimal())

    def finished(self) -> list[int]:
        """Returns the numbers of the finished shards, in ascending order; there is at least one.

        Raises:
          DvinvError: the pool is empty.
        """
        if not (numbers := self.numbers()):
            raise DvinvError(f'There is no image in the pool {self.folder}; run the task synthesis first, or name a pool.')
        return numbers

    def sidecar(self, number: int) -> dict:
        """Returns the contents of the sidecar of a shard.

        Raises:
          DamagedError: the sidecar is missing or damaged.
          DvinvError: the pool was made from another teacher.
        """
        path = self._shard(number).with_suffix('.json')
        try:
            sidecar = json.loads(path.read_text())
            is_intact = sidecar.pop('notes_sha256') == _checksum(sidecar)
        except FileNotFoundError as error:
            self._refuse(number, f'The sidecar {path} is missing', error)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._refuse(number, f'The sidecar {path} is damaged', error)
        if not is_intact:
            self._refuse(number, f'The sidecar {path} is damaged (its notes_sha256 is not the one written)')
        if self._digest and sidecar['teacher'] != self._digest:
            raise DvinvError(
                f'The pool {self.folder} was made from another teacher (digest {sidecar["teacher"][:12]}, not '
                f'{self._digest[:12]}); use the teacher that made it, or another pool.'
            )
        return sidecar

    def measurements(self) -> Iterator[dict]:
        """Yields {'batch': number, 'step': iteration, term: value} of the loss terms, reading one sidecar at a time."""
        for number in self.numbers():
            curve = self.sidecar(number).get('curve', {})
            for values in zip(*curve.values(), strict=True):
                yield {'batch': number, **dict(zip(curve, values, strict=True))}

    def read(self, number: int) -> dict[str, np.ndarray]:
        """Returns {'images', 'labels', 'logits'} of a shard, after a check against its sha256.

        Raises:
          DamagedError: the shard is missing, truncated or changed.
        """
        self.validate(number)
        with np.load(self._shard(number), allow_pickle=False) as arrays:
            return dict(arrays)

    def rows(self, name: str) -> Rows:
        """Returns 'images', 'labels' or 'logits' of all shards in order, as rows that are read on access.

        Each shard is checked against its sha256 once per process.

        Raises:
          DvinvError: the pool is empty or a shard is damaged.
          SystemExit: SIGTERM was received.
        """
        numbers = self.finished()
        for number in numbers:
            preemption.leave_if_asked(single_process_only=True)
            self.validate(number)
        return Rows([self._shard(number) for number in numbers], name)

    @property
    def num_classes(self) -> int:
        """The number of classes of the teacher."""
        return self.rows('logits').shape[1]

    def validate(self, number: int) -> None:
        """Validates that a shard is as it was written.

        Raises:
          DamagedError: the shard or its sidecar is missing, truncated or changed.
        """
        path, sidecar = self._shard(number), self.sidecar(number)
        state = state_of(path)
        if state is None:
            self._refuse(number, f'The shard {path} is missing, though its sidecar is there')
        if (path.resolve(), state) in _checked:
            return
        if sha256_of(path) != sidecar['sha256']:
            reason = 'truncated, or a byte changed: its sha256 is not the one written'
            self._refuse(number, f'The shard {path} is damaged ({reason})')
        _checked.add((path.resolve(), state))

    def _refuse(self, number: int, what: str, cause: Exception | None = None) -> NoReturn:
        """Raises a `DamagedError` for a shard, after moving it to quarantine if the pool does so."""
        sidecar = self._shard(number).with_suffix('.json')
        if self._quarantine:
            quarantine = self.folder / 'quarantine'
            quarantine.mkdir(parents=True, exist_ok=True)
            for path in (sidecar, self._shard(number)):  # the sidecar first: a shard without a sidecar counts as missing
                with contextlib.suppress(FileNotFoundError):
                    os.replace(path, quarantine / path.name)
            way_out = f'it was moved to {quarantine}; run the command that made the pool again'
        else:
            way_out = f'delete {sidecar.name} and run the command that made the pool again'
        raise DamagedError(what, f'{way_out}: it makes this shard again, or names what else must be done') from cause

    def _shard(self, number: int) -> Path:
        return self.folder / f'shard-{number:06d}.npz'


def _dumps(sidecar: dict) -> bytes:
    return (json.dumps(sidecar, indent=1, sort_keys=True) + '\n').encode()


def _checksum(sidecar: dict) -> str:
    return hashlib.sha256(_dumps(sidecar)).hexdigest()
