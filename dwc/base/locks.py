"""One process at a time: a lock that the kernel frees when its holder ends, however it ends.

A process id written to a file can outlive its process and be given to another; an flock cannot. A child that is handed
the descriptor holds the lock for as long as it lives, which is how what runs on its own is found again; the id in its
lock file counts only while the lock is held.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from dwc.base.errors import InputError

__all__ = [
    "held",
    "hold",
]

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
