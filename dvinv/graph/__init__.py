"""Analysis of a network's program (its jaxpr): finding and replacing the outputs of its stages."""

from dvinv.graph.stages import Stage, StagePair, find_stages, graft, match_stages, record

__all__ = ['Stage', 'StagePair', 'find_stages', 'graft', 'match_stages', 'record']
