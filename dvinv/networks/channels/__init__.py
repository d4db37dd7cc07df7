"""The channels of any Flax network: which of them can only go together, what they cost, and the network without some."""

from dvinv.networks.channels.module import Narrow
from dvinv.networks.channels.units import Channels, find_channels

__all__ = ['Channels', 'Narrow', 'find_channels']
