"""Flax networks by name, their files, and pruned and quantized ones."""

from dvinv.networks.classifier import Classifier, apply_fn_of, initialise, shapes_of
from dvinv.networks.files import (
    classifier_of,
    describes_itself,
    load_classifier,
    load_network,
    module_of,
    read_classifier,
    save_network,
)
from dvinv.networks.registry import NETWORKS, create, image_shape

__all__ = [
    'NETWORKS',
    'Classifier',
    'apply_fn_of',
    'classifier_of',
    'create',
    'describes_itself',
    'image_shape',
    'initialise',
    'load_classifier',
    'load_network',
    'module_of',
    'read_classifier',
    'save_network',
    'shapes_of',
]
