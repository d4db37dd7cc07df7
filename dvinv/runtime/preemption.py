"""Preemption by SIGTERM and Ctrl-C: the run saves its work in progress and exits.

The signal handler only sets a flag. Loops check the flag between two dispatches, where the state is consistent, save, and
exit with the status 143 (130 after Ctrl-C), as if the signal had ended the process.

Python runs signal handlers between two bytecode instructions, so not while XLA compiles, which can take minutes. A thread is
notified of the signal at once. If the loops do not check the flag for `GRACE` seconds, or at a second Ctrl-C, the thread
ends the process immediately. Nothing that was saved is lost: files are written atomically, and locks end with their process.
The thread cannot run while other code holds Python's global interpreter lock.
"""

import itertools
import os
import signal
import socket
import sys
import threading

from dvinv.runtime.errors import say

NAMES = {signal.SIGTERM: 'SIGTERM', signal.SIGINT: 'Ctrl-C'}
GRACE = 20.0  # seconds in which the flag must be checked; Kubernetes and SLURM wait for 30 before SIGKILL
SAVING = 10  # factor on `GRACE` from one check of the flag to the next or to the exit, because saving takes time
HINT = 3.0  # seconds after Ctrl-C until a message says how to exit at once

_received: signal.Signals | None = None  # the flag: the first signal that was received
_flag_checked = threading.Event()  # set when the flag is checked
_bell = None  # the socket that wakes the thread
_points = itertools.count(1)  # numbers of the points at which several processes check for a signal
_agreed = False  # whether all processes exit now


def install(grace: float = GRACE) -> None:
    """Installs handlers that set the flag instead of ending the process; for main only, since a library must not do this.

    If there are several processes, JAX handles SIGTERM and reports it to all of them; Ctrl-C is passed on to it as SIGTERM.
    Ctrl-C stays ignored if it is ignored already, as in a process that a shell starts in the background.

    Args:
      grace: seconds after which the process ends if the flag is not checked; 0 if there is nothing to save.
    """
    global _bell
    listening, bell = socket.socketpair()
    bell.setblocking(False)
    signal.set_wakeup_fd(bell.fileno(), warn_on_full_buffer=False)  # Python's handler in C writes the signal's number there
    _bell = bell  # drops the socket of an earlier call
    for number in NAMES:
        if signal.getsignal(number) is not signal.SIG_IGN and not (number == signal.SIGTERM and _several()):
            signal.signal(number, _handle)
    threading.Thread(target=_listen, args=(listening, grace), daemon=True).start()


def asked() -> bool:
    """Returns whether a signal was received.

    If there are several processes, all must call this at the same points, and all get the same answer.
    """
    if _received and threading.current_thread() is threading.main_thread():
        _flag_checked.set()
    return _asked_anywhere() if _several() else bool(_received)


def leave_if_asked(saved: str = '', single_process_only: bool = False) -> None:
    """Exits if a signal was received; the caller must have saved its work.

    Args:
      saved: a main clause that says what was saved; '' if nothing would be lost here.
      single_process_only: whether the caller may run on only some of the processes, or at different points; it then exits
        only if there is a single process.

    Raises:
      SystemExit: a signal was received; the status is 143, or 130 after Ctrl-C.
    """
    if not (single_process_only and _several()) and asked():
        assert _received is not None  # `asked` has set it
        say(f'{NAMES[_received]}: {saved or "nothing under way had to be saved"}; the same command goes on from here.')
        raise SystemExit(128 + _received)


def _several() -> bool:
    """Returns whether this is one of several processes; does not import JAX."""
    return 'jax' in sys.modules and sys.modules['jax'].distributed.is_initialized()


def _asked_anywhere() -> bool:
    """Returns whether any of several processes received a signal; the same on all, since JAX chooses a common point."""
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
    """Sets the flag to a signal, unless an earlier one is set."""
    global _received
    _received = _received or signal.Signals(number)


def _listen(bell: socket.socket, grace: float) -> None:
    """Sets the flag at the first signal, and ends the process at a second Ctrl-C."""
    first: signal.Signals | None = None
    while rung := bell.recv(64):
        for number in rung:
            if number not in NAMES:  # another signal that has a handler
                continue
            if first and number == signal.SIGINT:
                _end('Ctrl-C again: this process ends at once; the same command goes on from what was saved.', first)
            if not first:
                first = signal.Signals(number)
                _note(number)
                threading.Thread(target=_wait, args=(grace, first), daemon=True).start()
    bell.close()  # `install` was called again


def _wait(grace: float, first: signal.Signals) -> None:
    """Ends the process if the flag is not checked in time after the signal `first`."""
    if not grace:
        _end(f'{NAMES[first]}: this process ends at once.', first)
    patience = grace
    if first == signal.SIGINT and grace > HINT and not _flag_checked.wait(HINT):
        say('Ctrl-C: this process ends when it has saved its current work; Ctrl-C again ends it at once.')
        patience -= HINT
    while _flag_checked.wait(patience):
        _flag_checked.clear()
        patience = SAVING * grace
    what = 'this process is in a long computation and ends now; the same command goes on from what was saved.'
    _end(f'{NAMES[first]}: {what}', first)


def _end(sentence: str, first: signal.Signals) -> None:
    """Ends the process immediately, with the status of the first signal."""
    say(sentence)
    sys.stdout.flush()
    os._exit(128 + first)
