"""SIGTERM: the machine is wanted by somebody else. The run saves what it is at, and ends.

The signal only leaves a note. Loops look at it between two dispatches, where all is whole, save, and leave with the exit
status 143, as if the signal had ended them.
"""

import signal
import sys

STATUS = 128 + signal.SIGTERM

_asked = False


def install() -> None:
    """From now on SIGTERM leaves a note instead of ending the process. For main alone: a library leaves signals be."""

    def note(number, frame):
        global _asked
        _asked = True

    signal.signal(signal.SIGTERM, note)


def ask() -> None:
    """As if a SIGTERM came: it came to another process of the job."""
    global _asked
    _asked = True


def asked() -> bool:
    """Whether a SIGTERM came."""
    return _asked


def leave_if_asked() -> None:
    """End the process, where a SIGTERM came and all is saved that is to be.

    Raises:
      SystemExit: with the status 143.
    """
    if _asked:
        print('dvinv: SIGTERM: all is saved; the same command goes on from here.', file=sys.stderr, flush=True)
        raise SystemExit(STATUS)
