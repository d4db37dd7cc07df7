"""Flax networks by name, and their files."""

from dvinv.networks.classifier import Classifier
from dvinv.networks.registry import NETWORKS, create, initialise, load_classifier, load_network, save_network

__all__ = ['NETWORKS', 'Classifier', 'create', 'initialise', 'load_classifier', 'load_network', 'save_network']
