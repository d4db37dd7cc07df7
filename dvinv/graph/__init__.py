"""Reading a network's program (its jaxpr): the stages that it consists of."""

from dvinv.graph.stages import Stage, StagePair, find_stages, graft, match_stages, record

__all__ = ['Stage', 'StagePair', 'find_stages', 'graft', 'match_stages', 'record']
