"""Builds the package; configs/ is put into it as dvinv/configs, so that an installed dvinv has the config files too."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Copies the config files beside the modules; an editable install finds them in the clone."""

    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copytree(
                Path(__file__).parent / 'configs',
                Path(self.build_lib) / 'dvinv' / 'configs',
                ignore=shutil.ignore_patterns('__pycache__'),
                dirs_exist_ok=True,
            )


setup(cmdclass={'build_py': BuildWithConfigs})
