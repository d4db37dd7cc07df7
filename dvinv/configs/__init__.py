"""The config files of the repository's configs/, as modules: `from dvinv.configs import digits; digits.get_config()`.

A built package has copies of them in this folder; a clone has them in `configs/`, where this package looks too.
"""

from pathlib import Path

FOLDER = Path(__file__).parent  # the folder with the config files
if not (FOLDER / 'digits.py').is_file():
    FOLDER = Path(__file__).parents[2] / 'configs'
    __path__.append(str(FOLDER))
