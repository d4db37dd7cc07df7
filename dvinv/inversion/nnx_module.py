"""An adapter that gives an NNX model the interface of a Linen module that takes x and `train`; see modules.py.

The model is split into a static graph for each mode and variables, {'params': ..., 'batch_stats': ...}, as in `nnx_tap`.
The layers with running statistics sow their inputs, as Linen layers do under `linen_tap`.
"""

from collections import Counter
from collections.abc import Callable, Mapping

import flax
import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import unflatten_dict

from dvinv.inversion import nnx_tap
from dvinv.inversion.capture import SOWN, CaptureSpec, entire_input
from dvinv.inversion.modules import in_training, trained_part
from dvinv.inversion.statistics import PRIVATE, STATISTICS, running_means
from dvinv.networks.classifier import flatten, unflatten


def is_model(network) -> bool:
    """Returns whether `network` is an NNX model."""
    return isinstance(network, nnx.Module)


class NnxModule:
    """A user's NNX model with the interface of a Linen module that takes x and `train`.

    Attributes:
      label: The network's name in messages.
      head: The path of a layer that has `outputs` outputs instead of the model's own number; '' for none.
      switches: Whether the network can be switched to train mode; always true.
    """

    switches = True

    def __init__(
        self,
        model: nnx.Module,
        arguments: Mapping,
        make: Callable | None,
        pick: Callable | None,
        head: str = '',
        outputs: int = 0,
    ):
        """Clones the model, which stays unchanged; see `modules.trainable` for the arguments.

        Raises:
          DvinvError: The model contains a Linen module in an NNX wrapper.
        """
        nnx_tap.refuse_bridged(model)
        self.label, self.head, self.outputs = type(model).__name__, head, outputs
        self._make, self.pick, self.arguments = make, pick, arguments
        self.model = nnx_tap.in_eval_mode(model)
        self._paths = nnx_tap.paths_of(self.model)
        self._programs: dict[bool, tuple] = {}  # {whether in train mode: the result of `_prepared`}

    def _program(self, train: bool):
        """Returns the cached result of `_prepared`."""
        if train not in self._programs:
            self._programs[train] = self._prepared(train)
        return self._programs[train]

    def _prepared(self, train: bool):
        """Returns (static graph, {path of a random key or count: its shape and dtype}, recorder, arguments) for a mode."""
        model = nnx.clone(self.model)
        if train:  # the model may have an attribute named train in place of the method
            model.train() if callable(model.train) else nnx.Module.train(model)
        spec = CaptureSpec(entire_input, running_means(nnx_tap.variables_of(model)))
        _, _, noise = nnx_tap.split(model)
        recorder = nnx_tap.record_calls(model, spec)
        return nnx.graphdef(model), noise, recorder, in_training(self.arguments) if train else dict(self.arguments)

    def init(self, key: jax.Array, x, train: bool = False) -> dict:
        """Returns the trained collections of `initial`."""
        return trained_part(self.initial(key, x))

    def initial(self, key: jax.Array, x) -> dict:
        """Returns random variables of all collections if a function makes models from rngs, else those of the model."""
        variables = nnx_tap.variables_of(self._make(nnx.Rngs(key)) if self._make else self.model)
        if not self.head:
            return variables
        flat = flatten(variables)
        for name in ('kernel', 'bias'):
            path = f'params/{self.head}/{name}'
            if path in flat:
                shape, dtype = (*flat[path].shape[:-1], self.outputs), flat[path].dtype
                draw = jax.nn.initializers.lecun_normal() if name == 'kernel' else jax.nn.initializers.zeros
                flat[path] = draw(jax.random.fold_in(key, 1), shape, dtype)
        return unflatten(flat)

    def apply(self, variables, x, train: bool = False, mutable=False, rngs: Mapping | None = None):
        """Returns logits [B, K]; with `mutable`, a pair of logits and changed collections, as Linen's `apply` does."""
        graph, noise, recorder, arguments = self._program(train)
        key = (rngs or {}).get('dropout')
        keys = [_noise(leaf, key, number) for number, leaf in enumerate(noise.values())]
        variables = jax.tree.map(jnp.asarray, variables)  # NNX would write new statistics into arrays of NumPy
        model = nnx_tap.merged(graph, self._paths, variables, dict(zip(noise, keys, strict=True)))
        recorder.restart(Counter())
        returned, sown = nnx.capture(model, nnx_tap.Sown)(x, **arguments)
        logits = self.pick(returned) if self.pick else returned
        if mutable is False:
            return logits
        changed = {}
        if flax.core.scope.in_filter(mutable, STATISTICS):
            after = nnx_tap.values(nnx.state(model, nnx.BatchStat))
            own = {path for group, path in self._paths if group == STATISTICS}
            changed[STATISTICS] = unflatten_dict({tuple(map(str, path)): after[path] for path in after if path in own})
        if flax.core.scope.in_filter(mutable, PRIVATE):
            inputs = {(*map(str, path[:-1]), SOWN): calls for path, calls in nnx_tap.values(sown).items()}
            changed[PRIVATE] = unflatten_dict(inputs)
        return logits, changed

    def with_outputs(self, path: str, outputs: int) -> 'NnxModule':
        """Returns the network with `outputs` outputs of the layer at `path`."""
        return NnxModule(self.model, self.arguments, self._make, self.pick, path, outputs)


def _noise(leaf, key: jax.Array | None, number: int) -> jax.Array:
    """Returns a random key derived from `key`, or zeros if `key` is None or `leaf` is a count."""
    if key is None or not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jnp.zeros(leaf.shape, leaf.dtype)
    key = jax.random.fold_in(key, number)
    return jax.random.split(key, leaf.shape) if leaf.shape else key
