"""File locks (flock), which the kernel releases when their holder exits, however it exits.

A process id in a file may be stale or reused; an flock cannot be. A child process that inherits the descriptor keeps
the lock, so that a detached process can be found by its lock. The process id in a lock file is valid only while the
lock is held.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dwc.base.errors import InputError

__all__ = ["held", "hold"]

_POLL_S = 0.2


def hold(path: Path, patience_s: float = 0.0) -> int | None:
    """Descriptor that holds the lock until it is closed; None if another process still has it after `patience_s`."""
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
            time.sleep(_POLL_S)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be locked ({error.strerror}); give a writable folder on a file system that supports locks"
        ) from error


@contextmanager
def held(path: Path, patience_s: float = 0.0) -> Iterator[bool]:
    """Hold the lock within a block; yields whether the lock was free."""
    descriptor = hold(path, patience_s)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)
