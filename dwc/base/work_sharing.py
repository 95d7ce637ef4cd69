"""Several processes share one list of work, without a scheduler: each piece is done by whoever gets its lock."""

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from dwc.base.locks import held

__all__ = ["claimed"]

_T = TypeVar("_T")
_LOOK_S = 0.2


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
