"""digits."""

import ml_collections

from dvinv.configuration import base_config


def get_config(arg: str = '') -> ml_collections.ConfigDict:
    config = base_config('digits')
    return config
