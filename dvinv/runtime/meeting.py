"""What the processes of one job tell each other between two programs, over the devices that they share."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dvinv.runtime.devices import AXIS


class Meeting:
    """Every call is one of all processes, in the same order."""

    def __init__(self, mesh: Mesh, leader: bool):
        self._leader, self._devices = leader, mesh.size
        self._split, everywhere = NamedSharding(mesh, P(AXIS)), NamedSharding(mesh, P())
        self._most = jax.jit(lambda votes: votes.max(0), out_shardings=everywhere)

    def vote(self, ballot: int) -> jax.Array:
        """The highest ballot of all, int32; not waited for until it is looked at."""
        return self._highest(np.int32(ballot))

    def say(self, message: bytes = b'') -> bytes:
        """The leader's message, to all."""
        size = int(self.vote(len(message) if self._leader else 0))
        mine = np.frombuffer(message, np.uint8) if self._leader else np.zeros(size, np.uint8)
        return np.asarray(self._highest(mine)).tobytes() if size else b''

    def _highest(self, mine: np.ndarray) -> jax.Array:
        """Elementwise over the processes."""
        shape = (self._devices, *mine.shape)
        return self._most(jax.make_array_from_callback(shape, self._split, lambda index: mine[None]))
