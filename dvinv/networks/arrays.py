"""The shapes of the arrays that travel between networks, losses and augmentations, as jaxtyping annotations.

`B` images have height `H`, width `W` and `C` channels; a network has `K` classes. Functions take numpy arrays as well as
JAX's, and return JAX's. The tests check these annotations at every call (see tests/conftest.py); otherwise nothing is
checked.
"""

import jax
import numpy as np
from jaxtyping import Float, Int

AnyArray = jax.Array | np.ndarray

Images = Float[AnyArray, 'B H W C']
Logits = Float[AnyArray, 'B K']
Labels = Int[AnyArray, 'B']
PerImage = Float[jax.Array, 'B']
PerChannel = Float[AnyArray, 'C']
Scalar = Float[jax.Array, '']
