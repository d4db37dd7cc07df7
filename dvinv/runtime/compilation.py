"""Compiled programs, kept between runs."""

import os
from pathlib import Path

import jax

from dvinv.errors import say_once


def keep_compiled() -> None:
    """Keeps compiled programs in XDG_CACHE_HOME or ~/.cache, unless JAX has a folder for them. Called by main only.

    Where there is no such folder (a container's user without a home), they are not kept, and that is said once.
    """
    if jax.config.jax_compilation_cache_dir:
        return
    try:
        folder = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'dvinv' / 'jax'
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f'{folder} cannot be written to')
    except (RuntimeError, OSError) as error:  # the former where nothing says which folder is the user's home
        say_once(f'Compiled programs are not kept for later runs ({error}); set XDG_CACHE_HOME to a folder for them.')
        return
    jax.config.update('jax_compilation_cache_dir', str(folder))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
