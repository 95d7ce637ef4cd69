"""Let several processes share one list of work through locks, without a scheduler."""

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from dwc.base.locks import held

__all__ = ["claimed"]

_T = TypeVar("_T")
_POLL_S = 0.2


def claimed(
    work: Iterable[_T],
    is_done: Callable[[_T], bool],
    lock: Callable[[_T], Path],
    is_ready: Callable[[_T], bool] = lambda _: True,
) -> Iterator[_T]:
    """Yield the pieces of work that this process should do, one at a time, until every piece is done.

    Processes given the same work share it. A piece held by another process is skipped, and taken over if that process
    ends without finishing it. Pieces are in order of preference; `is_done` and `is_ready` say whether a piece is done,
    as seen from any process, and can be started; `lock` names its lock file, which is held until the next piece is
    requested.
    """
    left = list(work)
    announced = False
    while left := [piece for piece in left if not is_done(piece)]:
        for piece in filter(is_ready, left):
            with held(lock(piece)) as mine:
                if mine and not is_done(piece):
                    yield piece
                    break
        else:
            if not announced:
                print("waiting for work that another process holds", flush=True)
            announced = True
            time.sleep(_POLL_S)
