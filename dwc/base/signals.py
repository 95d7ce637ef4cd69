"""Record SIGINT and SIGTERM, so that a loop can stop at a safe point instead of ending at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

__all__ = ["Caught", "catch_signals", "ignore_signals"]


@dataclass
class Caught:
    """The signal received, if any."""

    number: int | None = None


@contextmanager
def catch_signals() -> Iterator[Caught]:
    """Record SIGINT and SIGTERM; a second one ends the process as usual. Does nothing outside the main thread."""
    caught = Caught()
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def note(number: int, frame: FrameType | None) -> None:
        caught.number = number
        signal.signal(number, previous[signal.Signals(number)])

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def ignore_signals(worker: int = 0) -> None:
    """Ignore SIGINT and SIGTERM in a data worker; they reach the whole process group, and the parent handles them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
