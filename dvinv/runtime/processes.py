"""Which of several processes this one is: each synthesizes its own share of the numbered batches.

They need no word of each other: they share a work directory, and meet in its pool. Only where one batch is split over all of
them do they make a job (job.py), in which every batch is everybody's.
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping

from dvinv.errors import DvinvError

OWN = 'DVINV_PROCESS', 'DVINV_PROCESSES'  # what launch/local.sh and launch/tpu_pod.sh set


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process is number `index` of `count`. Number 0, the leader, does all that is not a share of the batches.

    Attributes:
      joined: into one job, where all have a part in every batch and the leader writes it.
    """

    index: int = 0
    count: int = 1
    joined: bool = False

    @property
    def leader(self) -> bool:
        """Whether this process runs the tasks; the others only help with the batches."""
        return self.index == 0

    @property
    def writes(self) -> bool:
        """Whether the batches that this process makes are its own to keep."""
        return self.leader or not self.joined

    def share(self, numbers: Iterable[int]) -> list[int]:
        """Those of the batches that are this process's to make."""
        return [number for number in numbers if self.joined or number % self.count == self.index]

    def most(self, batches: int) -> int:
        """How many of so many batches in a row are one process's at most."""
        return -(-batches // self.count)


ALONE = Processes()


def processes(distributed: bool | None, environment: Mapping[str, str] = os.environ) -> Processes:
    """Which process this is: by DVINV_PROCESS and DVINV_PROCESSES, by SLURM (under srun), or by Cloud TPU.

    Args:
      distributed: the flag. None: as the environment says; False: alone; True: there must be several.

    Raises:
      DvinvError: there should be several but nothing tells so, or what tells so makes no sense.
    """
    if distributed is False:
        return ALONE
    found = _of_dvinv(environment) or _of_slurm(environment) or _of_tpu(environment)
    if found is None:
        if distributed:
            raise DvinvError(
                '--distributed was asked for, but nothing tells which of several processes this is: set '
                f'{OWN[0]} (0, 1, ...) and {OWN[1]} (how many), as launch/local.sh -n does, or start it by srun.'
            )
        return ALONE
    names, index, count = found
    if not 0 <= index < count:
        raise DvinvError(
            f'{names[0]} is {index} and {names[1]} makes {count} processes; the first must be at least 0 and below their '
            'number.'
        )
    return Processes(index, count)


def _of_dvinv(environment) -> tuple | None:
    given = [name for name in OWN if environment.get(name)]
    if len(given) == 1:
        missing = OWN[given[0] == OWN[0]]
        raise DvinvError(f'{given[0]} is set, but {missing} is not; set both, or neither.')
    return (OWN, *(_number(environment, name) for name in OWN)) if given else None


def _of_slurm(environment) -> tuple | None:
    """Where srun started several tasks. In a batch script outside srun there is one process, whatever was allocated."""
    names = 'SLURM_PROCID', 'SLURM_STEP_NUM_TASKS'
    if not all(environment.get(name) for name in names) or _number(environment, names[1]) < 2:
        return None
    return names, *(_number(environment, name) for name in names)


def _of_tpu(environment) -> tuple | None:
    """Where the TPU slice spans several hosts."""
    names = 'TPU_WORKER_ID', 'TPU_WORKER_HOSTNAMES'
    hosts = [host for host in environment.get(names[1], '').split(',') if host.strip()]
    if len(hosts) < 2 or not environment.get(names[0]):
        return None
    return names, _number(environment, names[0]), len(hosts)


def _number(environment, name: str) -> int:
    try:
        return int(environment[name])
    except ValueError as error:
        raise DvinvError(f'{name} is {environment[name]!r}; it must be a whole number.') from error
