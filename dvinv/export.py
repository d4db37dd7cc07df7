"""python -m dvinv.export --pool runs/digits/pool --to folders --out DIR"""

import argparse
import sys
from pathlib import Path

from dvinv.data.export import to_folders, to_npz, to_tfds
from dvinv.data.pool import ImagePool
from dvinv.errors import DvinvError
from dvinv.runtime import preemption

FORMATS = {'folders': to_folders, 'tfds': to_tfds, 'npz': to_npz}


def main(argv: list[str]) -> None:
    """Exports a pool in the format that the arguments name.

    Raises:
      DvinvError: the pool is empty or damaged, or the disk is full.
    """
    parser = argparse.ArgumentParser(prog='python -m dvinv.export', description='Export an image pool for other programs.')
    parser.add_argument('--pool', type=Path, required=True, help='the folder with shard-000000.npz and so on')
    parser.add_argument(
        '--to', choices=FORMATS, required=True, help='PNG pictures in class folders, TensorFlow Datasets, or one .npz'
    )
    parser.add_argument(
        '--out', type=Path, required=True, help='the folder to write to; the same command resumes a killed export'
    )
    arguments = parser.parse_args(argv)
    FORMATS[arguments.to](ImagePool(arguments.pool), arguments.out)


if __name__ == '__main__':
    preemption.install(grace=0)
    try:
        main(sys.argv[1:])
    except DvinvError as error:
        sys.exit(f'dvinv: {error}')
