"""The channels of any Flax network: which of them can only go together, what they cost, and the network without some."""

from dvinv.networks.channels.groups import ChannelGroups, find_channels
from dvinv.networks.channels.module import PrunedModule

__all__ = ['ChannelGroups', 'PrunedModule', 'find_channels']
