"""The command `dvinv`, and `python -m dvinv`: both do the same as `python -m dvinv.main`."""

import os
import runpy
import sys


def cli() -> None:
    """Runs `dvinv.main`, which finds modules in the working folder (for `teacher.factory`) as under `python -m`."""
    if not sys.flags.safe_path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    runpy.run_module('dvinv.main', run_name='__main__', alter_sys=True)


if __name__ == '__main__':
    cli()
