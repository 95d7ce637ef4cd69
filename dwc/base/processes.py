"""Start and end detached processes, each of which holds a lock while it runs."""

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dwc.base.errors import InputError
from dwc.base.locks import held, hold

__all__ = ["end", "rotate", "start_once"]

_LOG_BYTES = 10_000_000
_OLD_LOGS = 3


def start_once(words: Sequence[str | Path], lock: Path, log: Path, **options: Any) -> subprocess.Popen | None:
    """Start a process that holds the lock while it runs, in its own process group; None if the lock is already held.

    Its process id is in the lock file, for `end`. Its output is appended to `log`; options are those of
    `subprocess.Popen`.
    """
    descriptor = hold(lock)
    if descriptor is None:
        return None
    try:
        rotate(log)
        output = log.open("ab")
    except OSError as error:
        os.close(descriptor)
        raise InputError(f"{log}: cannot be written ({error.strerror}); make it writable") from error
    try:
        _note(descriptor, 0)  # so that the previous process id is not taken for this one's
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
        os.close(descriptor)  # from here on the child's copy holds the lock


def end(lock: Path, patience_s: float) -> None:
    """End the process group that `start_once` started with this lock; kill it if it takes longer than `patience_s`."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with held(lock) as free:
            if free or not (pid := int(lock.read_text() or 0)):
                return
            with suppress(ProcessLookupError):
                os.killpg(pid, number)
        with held(lock, patience_s):
            pass


def rotate(log: Path) -> None:
    """Move the content of a log of more than 10 MB to `<log>.1`, and older ones up to `<log>.3`.

    The file is truncated, not renamed, so that a process that appends to it can continue.
    """
    if not log.is_file() or log.stat().st_size <= _LOG_BYTES:
        return
    for number in range(_OLD_LOGS, 1, -1):
        older = log.with_name(f"{log.name}.{number - 1}")
        if older.exists():
            os.replace(older, log.with_name(f"{log.name}.{number}"))
    shutil.copyfile(log, log.with_name(f"{log.name}.1"))
    os.truncate(log, 0)


def _note(descriptor: int, pid: int) -> None:
    """Overwrite the process id; always the same number of bytes, so that it works on a full disk."""
    os.pwrite(descriptor, b"%-10d\n" % pid, 0)
