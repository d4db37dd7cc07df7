"""What the teacher is shown: pool, then shift, then flip of the optimised images.

The paper rolls the whole batch by one random offset and flips it by one coin. The alternative, `crop`, pads each image
with black and cuts a random window of its own: running statistics describe the *augmented* training set, so a
teacher that was trained on padded random crops is best shown the same.

Random numbers are drawn for the whole batch from a key that no device index enters; a device that holds a part of the
batch takes its slice of them.
"""

import jax
import jax.numpy as jnp


def average_pool(x: jax.Array, factor: int) -> jax.Array:
    """Means of `factor` x `factor` pixels; [B, H, W, C] -> [B, H/factor, W/factor, C]."""
    if factor == 1:
        return x
    b, h, w, c = x.shape
    return x.reshape(b, h // factor, factor, w // factor, factor, c).mean((2, 4))


def roll(key: jax.Array, x: jax.Array, pixels: int) -> jax.Array:
    """Roll the whole batch by one offset, uniform in [-pixels, pixels] an axis; what leaves on one side returns."""
    offset = jax.random.randint(key, (2,), -pixels, pixels + 1)
    return jnp.roll(x, offset, (1, 2))


def flip(key: jax.Array, x: jax.Array) -> jax.Array:
    """Mirror the whole batch left to right, by one fair coin."""
    return jnp.where(jax.random.bernoulli(key), x[:, :, ::-1], x)


def per_image(draw, local: int, axis: str | None):
    """The `local` rows of `draw(batch)` that belong to this device's images; `draw` makes them for a whole batch."""
    if axis is None:
        return draw(local)
    rows = draw(local * jax.lax.axis_size(axis))
    return jax.lax.dynamic_slice_in_dim(rows, jax.lax.axis_index(axis) * local, local)


def crop_each(key: jax.Array, x: jax.Array, pixels: int, fill: jax.Array, axis: str | None = None) -> jax.Array:
    """Pad each image by `pixels` on all sides with the colour `fill` [C] and cut a random window of its old size."""
    if pixels == 0:
        return x
    offsets = per_image(lambda n: jax.random.randint(key, (n, 2), 0, 2 * pixels + 1), x.shape[0], axis)
    # Padding is done around zero, so that any colour (black in normalised space is not 0) serves.
    padded = jnp.pad(x - fill, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)))
    window = jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], 0), x.shape[1:]))
    return window(padded, offsets) + fill


def flip_each(key: jax.Array, x: jax.Array, axis: str | None = None) -> jax.Array:
    """Mirror each image left to right by a coin of its own."""
    coins = per_image(lambda n: jax.random.bernoulli(key, shape=(n, 1, 1, 1)), x.shape[0], axis)
    return jnp.where(coins, x[:, :, ::-1], x)


def augment(key: jax.Array, x: jax.Array, kind: str, pixels: int, flips: bool, fill: jax.Array,
            axis: str | None = None) -> jax.Array:
    """The view x' of images x [B, H, W, C] (normalised): shifted by up to `pixels`, mirrored if `flips`.

    Args:
      key: of this iteration; the same on every device.
      kind: 'roll' (the paper: one offset, one coin a batch) or 'crop' (one an image, black comes in at the borders).
      fill: black in normalised space, [C].
      axis: the mesh axis that the batch is split over, or None.
    """
    shift_key, flip_key = jax.random.split(key)
    if kind == 'roll':
        x = roll(shift_key, x, pixels) if pixels else x
        return flip(flip_key, x) if flips else x
    x = crop_each(shift_key, x, pixels, fill, axis)
    return flip_each(flip_key, x, axis) if flips else x
