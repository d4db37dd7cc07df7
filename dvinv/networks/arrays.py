"""The shapes of the arrays that travel between networks, losses and augmentations, as jaxtyping annotations.

`B` images have height `H`, width `W` and `C` channels; a network has `K` classes, and `D` features before its last layer.
Functions take numpy arrays as well as JAX's, and return JAX's. The tests check these annotations at every call, in the
modules that tests/conftest.py names; otherwise nothing is checked. (A shape of one name begins with a space, so that linters
do not take it for the name of a type.)
"""

import jax
import numpy as np
from jaxtyping import Float, Integer, Num, UInt8

AnyArray = jax.Array | np.ndarray

Images = Float[AnyArray, 'B H W C']
Pixels = UInt8[AnyArray, 'B H W C']
Logits = Float[AnyArray, 'B K']
Labels = Integer[AnyArray, ' B']
PerImage = Float[jax.Array, ' B']
PerChannel = Float[AnyArray, ' C']
Scalar = Float[jax.Array, '']
Features = Float[AnyArray, 'B D']
LayerInput = Num[AnyArray, '...']  # of any layer of any network
# A mean or a variance of a layer's input; the layer may be a stack of layers, as nn.scan makes them.
Moment = Float[AnyArray, '*stack channels']
