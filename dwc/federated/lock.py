"""One process at a time: a lock that the kernel frees when its holder ends, however it ends.

A process id written to a file can outlive its process and be given to another; an flock cannot. A child that inherits
the descriptor holds the lock for as long as it lives.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["held", "hold"]


def hold(path: Path) -> int | None:
    """Descriptor of the lock file, which holds the lock until it is closed; None if another process holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


@contextmanager
def held(path: Path) -> Iterator[bool]:
    """Hold the lock within a block; the block is told whether it does."""
    descriptor = hold(path)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)
