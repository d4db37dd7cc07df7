"""Compiled programs, kept between runs."""

import os
from pathlib import Path

import jax


def keep_compiled() -> None:
    """Keep compiled programs in XDG_CACHE_HOME or ~/.cache, unless JAX was told where. For main alone."""
    if not jax.config.jax_compilation_cache_dir:
        folder = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'dvinv' / 'jax'
        jax.config.update('jax_compilation_cache_dir', str(folder))
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
