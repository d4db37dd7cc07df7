"""The shapes of the arrays that travel between networks, losses and augmentations, as jaxtyping annotations.

`B` images have height `H`, width `W` and `C` channels; a network has `K` classes. Numpy arrays are accepted where JAX's are.
The tests check these annotations at every call (see tests/conftest.py); without them nothing is checked.
"""

import jax
import numpy as np
from jaxtyping import Float, Int

AnyArray = jax.Array | np.ndarray

Images = Float[AnyArray, 'B H W C']
Logits = Float[AnyArray, 'B K']
Labels = Int[AnyArray, 'B']
PerImage = Float[AnyArray, 'B']
PerChannel = Float[AnyArray, 'C']
Scalar = Float[AnyArray, '']
