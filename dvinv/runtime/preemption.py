"""SIGTERM and Ctrl-C: the machine is wanted for something else. The run saves what it is at, and ends.

The signal only leaves a note. Loops look at it between two dispatches, where all is whole, save, and leave with the exit
status 143 (130 after Ctrl-C), as if the signal had ended them.

Python hears of a signal between two of its own instructions, so not while XLA compiles, which can take minutes. A thread
hears of it at once, and where the loops do not look at the note for `GRACE` seconds, or at a second Ctrl-C, it ends the
process as it is. Nothing that was saved is lost: files are written atomically, and locks end with their process. Code that
keeps Python's lock is out of its reach.
"""

import itertools
import os
import signal
import socket
import sys
import threading

from dvinv.errors import say

NAMES = {signal.SIGTERM: 'SIGTERM', signal.SIGINT: 'Ctrl-C'}
GRACE = 20.0  # seconds until somebody has looked at the note; where Kubernetes and SLURM wait for 30 before SIGKILL
SAVING = 10  # times as long, from one look at the note to the next or to the end: to save takes its time
HINT = 3.0  # seconds after Ctrl-C until it is said how to end at once

_came = None  # the note: the signal that came first
_looked = threading.Event()  # at the note
_bell = None  # what is sent there wakes the thread
_points = itertools.count(1)  # at which several processes ask for a signal
_agreed = False  # that all processes leave now


def install(grace: float = GRACE) -> None:
    """Makes the signals leave a note instead of ending the process. For main alone: a library leaves signals be.

    Of several processes JAX has taken SIGTERM over, which it reports to all; Ctrl-C is handed to it as one. Ctrl-C stays
    ignored where it is, as in what a shell starts in its background.

    Args:
      grace: seconds after which the process ends where nobody looks at the note; 0: nothing is to be saved.
    """
    global _bell
    listening, bell = socket.socketpair()
    bell.setblocking(False)
    signal.set_wakeup_fd(bell.fileno(), warn_on_full_buffer=False)  # Python's handler in C writes the signal's number there
    _bell = bell  # lets go of an earlier one
    for number in NAMES:
        if signal.getsignal(number) is not signal.SIG_IGN and not (number == signal.SIGTERM and _several()):
            signal.signal(number, _handle)
    threading.Thread(target=_listen, args=(listening, grace), daemon=True).start()


def asked() -> bool:
    """Returns whether a signal came. Of several processes all get the same answer: each calls this at the same points."""
    if _came and threading.current_thread() is threading.main_thread():
        _looked.set()
    return _asked_anywhere() if _several() else bool(_came)


def leave_if_asked(saved: str = '', alone: bool = False) -> None:
    """Ends the process, where a signal came and all is saved that is to be.

    Args:
      saved: what was saved, as a main clause; '': nothing is under way here that a new start would lose.
      alone: the caller does what not all of several processes do, or not at the same points: only a single process leaves.

    Raises:
      SystemExit: with the status 143, or 130 after Ctrl-C.
    """
    if not (alone and _several()) and asked():
        say(f'{NAMES[_came]}: {saved or "nothing under way had to be saved"}; the same command goes on from here.')
        raise SystemExit(128 + _came)


def _several() -> bool:
    """Returns whether this is one of several processes, without importing JAX for the answer."""
    return 'jax' in sys.modules and sys.modules['jax'].distributed.is_initialized()


def _asked_anywhere() -> bool:
    """Returns whether a signal came to any of several processes, the same on all: JAX agrees on a point after it."""
    global _agreed
    from jax.experimental import multihost_utils

    if not _agreed and multihost_utils.reached_preemption_sync_point(next(_points)):
        _agreed = True
        _note(signal.SIGTERM)
    return _agreed


def _handle(number: int, _) -> None:
    _note(number)
    if _several():
        os.kill(os.getpid(), signal.SIGTERM)


def _note(number: int) -> None:
    """Leaves the note; the signal that came first stays on it."""
    global _came
    _came = _came or signal.Signals(number)


def _listen(bell: socket.socket, grace: float) -> None:
    """Leaves the note at the first signal, and ends the process at a second Ctrl-C."""
    came = False
    while rung := bell.recv(64):
        for number in rung:
            if number not in NAMES:  # another signal that has a handler
                continue
            if came and number == signal.SIGINT:
                _end('Ctrl-C again: this process ends at once; the same command goes on from what was saved.')
            if not came:
                came = True
                _note(number)
                threading.Thread(target=_wait, args=(grace,), daemon=True).start()
    bell.close()  # `install` was called again


def _wait(grace: float) -> None:
    """Ends the process where the note is not looked at."""
    if not grace:
        _end(f'{NAMES[_came]}: this process ends at once.')
    patience = grace
    if _came == signal.SIGINT and grace > HINT and not _looked.wait(HINT):
        say('Ctrl-C: this process ends when it has saved what it is at; Ctrl-C again ends it at once.')
        patience -= HINT
    while _looked.wait(patience):
        _looked.clear()
        patience = SAVING * grace
    what = 'this process is in a long computation and ends now; the same command goes on from what was saved.'
    _end(f'{NAMES[_came]}: {what}')


def _end(sentence: str) -> None:
    """Ends the process as it is, with the status of the signal that came first."""
    say(sentence)
    sys.stdout.flush()
    os._exit(128 + _came)
