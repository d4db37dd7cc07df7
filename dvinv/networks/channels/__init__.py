"""The channels of any Flax network: which of them can only be removed together, their cost, and the pruned network."""

from dvinv.networks.channels.groups import ChannelGroups, find_channels
from dvinv.networks.channels.pruned import PrunedModule

__all__ = ['ChannelGroups', 'PrunedModule', 'find_channels']
