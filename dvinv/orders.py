"""What is to be done next while a pool is filled: which batches, and between two dispatches whether to save or to leave.

A process decides for itself. Those of a job (`bn_stats = 'global'` over several) split every batch, so they decide together:
the leader tells which it is, and the most urgent wish of any is everybody's.
"""

import time
from collections.abc import Iterable, Iterator

from jax.sharding import Mesh

from dvinv.inversion.invert import Unfinished
from dvinv.runtime import preemption
from dvinv.runtime.meeting import Meeting
from dvinv.runtime.processes import Processes
from dvinv.unfinished import packed, unpacked

GO_ON, SAVE, LEAVE = range(3)

Group = list[tuple[int, Unfinished | None]]  # numbers of batches to invert side by side, with their states if begun


def orders_of(processes: Processes, mesh: Mesh, minutes: float) -> 'Orders':
    """Of one process, or of all that share the devices of `mesh`; batches under way are saved every `minutes` (0: never)."""
    return JobOrders(Meeting(mesh, processes.leader), minutes) if processes.joined else Orders(minutes)


class Orders:
    """What one process decides for itself."""

    def __init__(self, minutes: float):
        self._minutes, self._saved = minutes, time.monotonic()

    def groups(self, groups: Iterable[Group]) -> Iterator[Group]:
        """These, as long as nobody asks the process to leave."""
        for group in groups:
            preemption.leave_if_asked()
            self._saved = time.monotonic()
            yield group

    def between(self) -> int:
        """What to do between two dispatches: GO_ON, SAVE or LEAVE, which is to save first."""
        return self._wish()

    def obeyed(self, order: int) -> None:
        """What was to be saved is saved."""
        if order != GO_ON:
            self._saved = time.monotonic()
        if order == LEAVE:
            preemption.ask()
            preemption.leave_if_asked()

    def _wish(self) -> int:
        if preemption.asked():
            return LEAVE
        return SAVE if self._minutes and time.monotonic() - self._saved >= 60 * self._minutes else GO_ON


class JobOrders(Orders):
    """What the processes of a job decide together, by votes: who has heard of a SIGTERM stays until the next."""

    def __init__(self, meeting: Meeting, minutes: float):
        super().__init__(minutes)
        self._meeting, self._vote = meeting, None

    def groups(self, groups: Iterable[Group]) -> Iterator[Group]:
        """The leader's, of one batch each, to all; what others give is not looked at."""
        groups = iter(groups)
        while message := self._meeting.say(_message(next(groups, None))):
            super().obeyed(int(self._meeting.vote(self._wish())))
            self._saved, self._vote = time.monotonic(), None
            yield _group(message)

    def between(self) -> int:
        """What was voted one dispatch earlier, so that no device waits for the count."""
        return GO_ON if self._vote is None else int(self._vote)

    def obeyed(self, order: int) -> None:
        """And the next vote."""
        super().obeyed(order)
        self._vote = self._meeting.vote(self._wish())


def _message(group: Group | None) -> bytes:
    """A group of one batch for the other processes of a job; empty where there is none left."""
    if group is None:
        return b''
    ((number, begun),) = group
    return number.to_bytes(8) + (packed(begun) if begun else b'')


def _group(message: bytes) -> Group:
    """The inverse of `_message`."""
    number, begun = int.from_bytes(message[:8]), message[8:]
    return [(number, unpacked(begun)[0] if begun else None)]
