"""SIGTERM: the machine is wanted by somebody else. The run saves what it is at, and ends.

The signal only leaves a note. Loops look at it between two dispatches, where all is whole, save, and leave with the exit
status 143, as if the signal had ended them.

Python hears of a signal between two of its own instructions, so not while XLA compiles, which can take minutes. A thread
hears of it at once, and where the loops do not look at the note for `GRACE` seconds, it ends the process as it is. Nothing
that was saved is lost: files are written atomically, and locks end with their process. Code that keeps Python's lock is out
of its reach.
"""

import os
import signal
import socket
import sys
import threading

STATUS = 128 + signal.SIGTERM
GRACE = 20.0  # seconds until somebody has looked at the note; where Kubernetes and SLURM wait for 30 before SIGKILL
SAVING = 10  # times as long, from one look at the note to the next or to the end: to save takes its time

_asked = False
_looked = threading.Event()
_bell = None  # what is sent there wakes the thread


def install(grace: float = GRACE) -> None:
    """From now on SIGTERM leaves a note instead of ending the process. For main alone: a library leaves signals be.

    Args:
      grace: seconds after which the process ends where nobody looks at the note.
    """
    global _bell

    def note(number, frame):
        global _asked
        _asked = True

    listening, _bell = socket.socketpair()
    _bell.setblocking(False)
    signal.signal(signal.SIGTERM, note)
    signal.set_wakeup_fd(_bell.fileno(), warn_on_full_buffer=False)  # Python's handler in C writes the signal's number there
    threading.Thread(target=_listen, args=(listening, grace), daemon=True).start()


def ask() -> None:
    """As if a SIGTERM came: it came to another process of the job."""
    global _asked
    if not _asked and _bell is not None:
        _bell.send(bytes([signal.SIGTERM]))
    _asked = True


def asked() -> bool:
    """Whether a SIGTERM came."""
    if _asked and threading.current_thread() is threading.main_thread():
        _looked.set()
    return _asked


def leave_if_asked() -> None:
    """End the process, where a SIGTERM came and all is saved that is to be.

    Raises:
      SystemExit: with the status 143.
    """
    if asked():
        print('dvinv: SIGTERM: all is saved; the same command goes on from here.', file=sys.stderr, flush=True)
        raise SystemExit(STATUS)


def _listen(bell: socket.socket, grace: float) -> None:
    """Leaves the note at SIGTERM, and ends the process where it is not looked at."""
    global _asked
    while signal.SIGTERM not in (rung := bell.recv(64)):  # another signal that has a handler
        if not rung:  # `install` was called again
            bell.close()
            return
    _asked = True
    patience = grace
    while _looked.wait(patience):
        _looked.clear()
        patience = SAVING * grace
    print(
        'dvinv: SIGTERM: this process is in a long computation and ends now; the same command goes on from what was saved.',
        file=sys.stderr,
        flush=True,
    )
    sys.stdout.flush()
    os._exit(STATUS)
