"""The cache of compiled programs, kept between runs."""

import os
from pathlib import Path

import jax

from dvinv.errors import say_once
from dvinv.runtime.devices import jax_option


def keep_compiled() -> None:
    """Sets JAX's compilation cache to a folder in XDG_CACHE_HOME or ~/.cache, unless one is set; called by main only.

    If there is no such folder (for instance for a user without a home in a container), programs are not cached, and a
    message says so once.
    """
    if jax_option('jax_compilation_cache_dir'):
        return
    try:
        folder = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'dvinv' / 'jax'
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f'{folder} cannot be written to')
    except (RuntimeError, OSError) as error:  # RuntimeError: the home folder of the user is unknown
        say_once(f'Compiled programs are not kept for later runs ({error}); set XDG_CACHE_HOME to a folder for them.')
        return
    jax.config.update('jax_compilation_cache_dir', str(folder))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
