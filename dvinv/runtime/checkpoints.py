"""Checkpoints of a training: Orbax writes them, a checksum of every file guards them.

Orbax restores a flipped byte without a word, takes any folder named by a number for a checkpoint, and so cannot tell a
good one from a bad one. Here a checkpoint exists when its manifest, written last, exists; and it is restored only
when every file still has the manifest's sha256.
"""

import errno
import json
import os
import shutil
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from dvinv.errors import DvinvError
from dvinv.runtime.files import disk_full_told, sha256_of, write_atomic
from dvinv.runtime.processes import decide, is_primary

MARGIN = 2**20  # bytes that must be free beside the arrays of a checkpoint


class Checkpoints:
    """The newest checkpoint of one training, in a folder of its own."""

    def __init__(self, folder: Path):
        self._folder = Path(folder).absolute()

    def save(self, step: int, state, notes: dict | None = None) -> None:
        """Write `state` (a pytree of arrays) as that of `step`, with `notes` for JSON; then drop older ones.

        Of several processes, which have the same state, process 0 alone writes.

        Raises:
          DvinvError: the disk is full. The older checkpoint stands.
        """
        if not is_primary():
            return
        target = self._folder / f'{step:09d}'
        self._sweep()
        try:
            with disk_full_told(target):
                self._check_room(state)
                with _checkpointer() as checkpointer:
                    checkpointer.save(target, state)
            files = {str(p.relative_to(target)): sha256_of(p) for p in sorted(target.rglob('*')) if p.is_file()}
            write_atomic(
                self._manifest(step), json.dumps({'step': step, 'sha256': files, 'notes': notes or {}}, indent=1).encode()
            )
            for older in self._steps():
                if older != step:
                    self._manifest(older).unlink()
        finally:
            self._sweep()

    def restore(self, template):
        """(step, state) of the newest checkpoint, or None where there is none.

        Args:
          template: a pytree like the saved state, of arrays or `jax.ShapeDtypeStruct`.

        Raises:
          DvinvError: a file of it is missing or not the one that was written (named).
        """
        step = decide(lambda: max(self._steps(), default=None), 'a list of checkpoints')
        if step is None:
            return None
        folder, way_out = self._folder / f'{step:09d}', f'delete {self._folder} to train this network again from its start'
        try:
            files = json.loads(self._manifest(step).read_text())['sha256'].items()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DvinvError(f'The checkpoint manifest {self._manifest(step)} is damaged; {way_out}.') from error
        for name, sha256 in files:
            if not (folder / name).exists():
                raise DvinvError(f'The checkpoint file {folder / name} is missing; {way_out}.')
            if sha256_of(folder / name) != sha256:
                raise DvinvError(
                    f'The checkpoint file {folder / name} is damaged (its sha256 is not the one written); {way_out}.'
                )
        with _checkpointer() as checkpointer:
            return step, checkpointer.restore(folder, jax.tree.map(ocp.utils.to_shape_dtype_struct, template))

    def notes(self) -> dict:
        """What was noted with the newest checkpoint."""
        steps = self._steps()
        return json.loads(self._manifest(steps[-1]).read_text()).get('notes', {}) if steps else {}

    def _check_room(self, state) -> None:
        """Raise on a full disk before Orbax starts, whose threads would answer with tracebacks of their own."""
        self._folder.mkdir(parents=True, exist_ok=True)
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + MARGIN
        if shutil.disk_usage(self._folder).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _sweep(self) -> None:
        """Delete the folders without a manifest: older checkpoints, and what is left of a save that failed or was killed."""
        kept = {self._manifest(step).stem for step in self._steps()}
        for entry in self._folder.glob('*'):
            if entry.is_dir() and entry.name not in kept:
                shutil.rmtree(entry, ignore_errors=True)

    def _manifest(self, step: int) -> Path:
        return self._folder / f'{step:09d}.json'

    def _steps(self) -> list[int]:
        return sorted(int(p.stem) for p in self._folder.glob('*.json') if p.stem.isdigit())


def _checkpointer() -> ocp.StandardCheckpointer:
    """Orbax's, for this process alone: it would have each of several write a part."""
    mine = jax.process_index()
    options = ocp.options.MultiprocessingOptions(primary_host=mine, active_processes={mine})
    return ocp.StandardCheckpointer(multiprocessing_options=options)
