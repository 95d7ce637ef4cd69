"""Record SIGINT and SIGTERM, so that a loop can stop at a safe point instead of ending at once."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from dwc.base.errors import Interrupted

__all__ = ["Caught", "catch_signals", "deferred_signals", "ignore_signals", "interrupted_by_signals"]


@dataclass
class Caught:
    """The signal received, if any."""

    number: int | None = None


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle SIGINT and SIGTERM within a block; outside the main thread, where that is impossible, do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextmanager
def catch_signals() -> Iterator[Caught]:
    """Note SIGINT and SIGTERM for a loop to see; a second one of a kind ends the process as usual."""
    caught = Caught()
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        caught.number = number
        signal.signal(number, usual[signal.Signals(number)])

    with _handled(note):
        yield caught


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Let SIGINT and SIGTERM wait until the block is done; a second one of a kind takes effect at once."""
    with catch_signals() as caught:
        yield
    if caught.number is not None:
        signal.raise_signal(caught.number)


@contextmanager
def interrupted_by_signals(remedy: str) -> Iterator[None]:
    """Turn SIGINT and SIGTERM into `Interrupted` at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number, f"stopped by {signal.Signals(number).name}", remedy)

    with _handled(stop):
        yield


def ignore_signals(worker: int = 0) -> None:
    """Ignore SIGINT and SIGTERM in a data worker; they reach the whole process group, and the parent handles them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
