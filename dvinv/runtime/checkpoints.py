"""Checkpoints of trainings and of batches of images, written by Orbax and verified by a checksum of every file.

Orbax restores a flipped byte without an error and takes any folder named by a number for a checkpoint, so it cannot tell an
intact checkpoint from a damaged one. Here a checkpoint exists if its manifest exists, which is written last. It is restored
only if every file has the sha256 of the manifest.

Each checkpoint is written by one process, which does not wait for others. With several processes, Orbax 0.12 has three
obstacles to that: numpy arrays are written by process 0 only and are silently left out on other processes; arrays that are
on a single process only are rejected; and the checkpointer that saves in the background (`StandardCheckpointer`) signals
through keys that all processes share. See `_global` and `_save`.
"""

import errno
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dvinv.runtime.devices import decide, is_primary
from dvinv.runtime.errors import DvinvError
from dvinv.runtime.files import refuse_full_disk, sha256_of, write_atomic

METADATA = 'notes'  # the entry of a manifest with its metadata, as it has been called since the first version
MARGIN = 2**20  # bytes that must be free in addition to the arrays of a checkpoint


class DamagedCheckpointError(DvinvError):
    """A file of a checkpoint is missing or differs from the one that was written."""


class Checkpoints:
    """The newest checkpoint of one training or of one batch of images, in its own folder."""

    def __init__(self, folder: Path, own: bool = False):
        """Names the folder; touches no file yet.

        Args:
          folder: the folder of the checkpoints.
          own: whether the checkpoint belongs to this process only, which saves it. Otherwise all processes have the same
            state and make the same calls, and process 0 saves.
        """
        self._folder, self._own = Path(folder).absolute(), own

    def save(self, step: int, state, metadata: dict | None = None) -> None:
        """Writes the checkpoint of `step`, then deletes older ones.

        Args:
          step: the number of the step.
          state: a pytree of arrays.
          metadata: what a resumed run needs besides the arrays, for instance their origin; can be written as JSON.

        Raises:
          DvinvError: the disk is full. The older checkpoint is kept.
        """
        if not (self._own or is_primary()):
            return
        target = self._folder / f'{step:09d}'
        self._manifest(step).unlink(missing_ok=True)  # a checkpoint that was not restored, for instance a damaged one
        self._sweep()
        try:
            with refuse_full_disk(target):
                self._check_room(state)
                _save(target, state)
            files = {str(p.relative_to(target)): sha256_of(p) for p in sorted(target.rglob('*')) if p.is_file()}
            manifest = {'step': step, 'sha256': files, METADATA: metadata or {}}
            write_atomic(self._manifest(step), json.dumps(manifest, indent=1).encode(), own=True)
            for older in self._steps():
                if older != step:
                    self._manifest(older).unlink()
        finally:
            self._sweep()

    def restore(self, template=None):
        """Returns (step, state) of the newest checkpoint, with numpy arrays; None if there is no checkpoint.

        Args:
          template: a pytree with the structure of the saved state, of arrays or `jax.ShapeDtypeStruct`; None if the state
            consists of dicts and lists.

        Raises:
          DamagedCheckpointError: a file of the checkpoint is missing or differs from the one that was written; the message
            names it.
        """
        step = self.verified_step()
        if step is None:
            return None
        folder = self._folder / f'{step:09d}'
        with ocp.StandardCheckpointer(multiprocessing_options=_this_process()) as checkpointer:
            if template is None:
                template = checkpointer.metadata(folder).item_metadata.tree
            return step, checkpointer.restore(folder, jax.tree.map(_shape, template))

    def verified_step(self) -> int | None:
        """Returns the step of the newest checkpoint, after verifying its files; None if there is no checkpoint.

        Raises:
          DamagedCheckpointError: see `restore`.
        """
        step = self._newest() if self._own else decide(self._newest, 'a list of checkpoints')
        if step is None:
            return None
        folder, way_out = self._folder / f'{step:09d}', f'delete {self._folder} to train this network again from its start'
        try:
            files = json.loads(self._manifest(step).read_text())['sha256'].items()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedCheckpointError(f'The checkpoint manifest {self._manifest(step)} is damaged; {way_out}.') from error
        for name, sha256 in files:
            if not (folder / name).exists():
                raise DamagedCheckpointError(f'The checkpoint file {folder / name} is missing; {way_out}.')
            if sha256_of(folder / name) != sha256:
                raise DamagedCheckpointError(
                    f'The checkpoint file {folder / name} is damaged (its sha256 is not the one written); {way_out}.'
                )
        return step

    def metadata(self) -> dict:
        """Returns the metadata of the newest checkpoint, without reading its arrays; {} if there is none."""
        step = self._newest()
        return {} if step is None else json.loads(self._manifest(step).read_text()).get(METADATA, {})

    def drop(self) -> None:
        """Deletes the folder with all its checkpoints."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _check_room(self, state) -> None:
        """Raises an OSError if the disk is full, before Orbax starts: its threads would print tracebacks."""
        self._folder.mkdir(parents=True, exist_ok=True)
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + MARGIN
        if shutil.disk_usage(self._folder).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _sweep(self) -> None:
        """Deletes the folders without a manifest: older checkpoints, and saves that failed or were interrupted."""
        kept = {self._manifest(step).stem for step in self._steps()}
        for entry in self._folder.glob('*'):
            if entry.is_dir() and entry.name not in kept:
                shutil.rmtree(entry, ignore_errors=True)

    def _manifest(self, step: int) -> Path:
        return self._folder / f'{step:09d}.json'

    def _steps(self) -> list[int]:
        return sorted(int(p.stem) for p in self._folder.glob('*.json') if p.stem.isdigit())

    def _newest(self) -> int | None:
        return max(self._steps(), default=None)


def _this_process() -> ocp.options.MultiprocessingOptions:
    """Returns the options with which Orbax does not wait for other processes."""
    index = jax.process_index()
    return ocp.options.MultiprocessingOptions(primary_host=index, active_processes={index})


def _save(folder: Path, state) -> None:
    """Writes a pytree of arrays from this process only, in the format of `ocp.StandardCheckpointer`."""
    options, handlers = _this_process(), ocp.type_handlers
    # With `use_replica_parallel`, Orbax's default, other processes would be expected to write parts of the arrays.
    arrays = handlers.ArrayHandler(
        primary_host=options.primary_host, use_replica_parallel=False, enable_write_sharding_file=False
    )
    registry = handlers.create_type_handler_registry((np.ndarray, handlers.NumpyHandler()), (jax.Array, arrays))
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, multiprocessing_options=options)
    with ocp.Checkpointer(handler, multiprocessing_options=options) as checkpointer:
        checkpointer.save(folder, args=ocp.args.PyTreeSave(jax.tree.map(_global, state)))


def _global(leaf) -> np.ndarray | jax.Array:
    """Returns an array in a form that Orbax writes from this process.

    On processes other than 0, that is an array sharded as if another process had a copy too.
    """
    leaf, here = np.asarray(leaf), jax.local_devices()[0]
    if here.process_index == 0:
        return leaf
    elsewhere = next(device for device in jax.devices() if device.process_index != here.process_index)
    sharding = NamedSharding(Mesh(np.array([here, elsewhere]), ('copy',)), P())  # Orbax writes the first copy
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, [jax.device_put(leaf, here)])


def _shape(leaf) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
