"""One process at a time: a lock that the kernel frees when its holder ends, however it ends.

A process id written to a file can outlive its process and be given to another; an flock cannot. A child that is handed
the descriptor holds the lock for as long as it lives, which is how what runs on its own is found again; the id in its
lock file counts only while the lock is held.
"""

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from dwc.errors import InputError

__all__ = ["claimed", "end", "held", "hold", "start_once"]

_T = TypeVar("_T")
_LOOK_S = 0.2


def hold(path: Path, patience_s: float = 0.0) -> int | None:
    """Descriptor of the lock file, which holds the lock until it is closed; None if another process holds it.

    Parameters
    ----------
    path : Path
        The lock file, made if need be.
    patience_s : float
        Seconds to wait for another process to let go.

    Raises
    ------
    InputError
        If the file cannot be written or its file system keeps no locks.
    """
    until = time.monotonic() + patience_s
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
            except BlockingIOError:
                if time.monotonic() >= until:
                    os.close(descriptor)
                    return None
            time.sleep(_LOOK_S)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be locked ({error.strerror}); give a writable folder on a file system that keeps locks"
        ) from error


@contextmanager
def held(path: Path, patience_s: float = 0.0) -> Iterator[bool]:
    """Hold the lock within a block; the block is told whether it does."""
    descriptor = hold(path, patience_s)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def claimed(
    work: Iterable[_T],
    is_done: Callable[[_T], bool],
    lock: Callable[[_T], Path],
    is_ready: Callable[[_T], bool] = lambda _: True,
) -> Iterator[_T]:
    """The pieces of a work that are this process's to do, one at a time; ends when every piece is done.

    Processes that are given the same work share it: a piece that another one holds is passed over, and taken if that
    one ends without having done it.

    Parameters
    ----------
    work : iterable
        The pieces, in the order in which they had better be done.
    is_done, is_ready : callable
        Whether a piece is done already, seen from any process; whether it may be begun.
    lock : callable
        Its lock file, held until the next piece is asked for.

    Raises
    ------
    InputError
        If a lock file cannot be written.
    """
    left, told = list(work), False
    while left := [piece for piece in left if not is_done(piece)]:
        for piece in filter(is_ready, left):
            with held(lock(piece)) as mine:
                if mine and not is_done(piece):
                    yield piece
                    break
        else:
            if not told:
                print("waiting for what another process is at", flush=True)
            told = True
            time.sleep(_LOOK_S)


def start_once(words: Sequence[str | Path], lock: Path, log: Path, **options) -> subprocess.Popen | None:
    """Start a process that holds the lock while it lives, in a process group of its own; None if one holds it.

    The lock file tells its id, for `end` and for people.

    Parameters
    ----------
    words : sequence
        Program and arguments.
    lock, log : Path
        The lock file; where its output is added.
    **options
        Of `subprocess.Popen`.

    Raises
    ------
    InputError
        If the program cannot be started or the log cannot be written.
    """
    descriptor = hold(lock)
    if descriptor is None:
        return None
    try:
        output = log.open("ab")
    except OSError as error:
        os.close(descriptor)
        raise InputError(f"{log}: cannot be written ({error.strerror}); make it writable") from error
    try:
        _note(descriptor, 0)  # nobody takes the last one's id for this one's
        process = subprocess.Popen(
            [str(word) for word in words], stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True, pass_fds=[descriptor], **options,
        )  # fmt: skip
        _note(descriptor, process.pid)
        return process
    except OSError as error:
        raise InputError(f"{words[0]}: cannot be started ({error.strerror}); give a program that can") from error
    finally:
        output.close()
        os.close(descriptor)  # the child's copy holds it from here on


def end(lock: Path, patience_s: float) -> None:
    """End the process group that `start_once` has started with a lock, whoever called it; killed if it takes long."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with held(lock) as free:
            if free or not (pid := int(lock.read_text() or 0)):
                return
            with suppress(ProcessLookupError):
                os.killpg(pid, number)
        with held(lock, patience_s):
            pass


def _note(descriptor: int, pid: int) -> None:
    """Write a process id over the last one, in as many bytes: what has been written once, a full disk takes too."""
    os.pwrite(descriptor, b"%-10d\n" % pid, 0)
