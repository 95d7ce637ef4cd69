"""The bytes of scans: files or pairs of files, compressed or not, read no further than the volume needs."""

import bz2
import gzip
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

import numpy as np
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from dwc.base.errors import InputError, one_line
from dwc.data.paths import existing_file, unreadable

__all__ = [
    "BZIP2",
    "GZIP",
    "PAIR",
    "check_the_end",
    "enough_memory",
    "exactly",
    "partner",
    "reading",
    "skip",
    "unpacked",
]

GZIP, BZIP2 = b"\x1f\x8b", b"BZh"
PAIR = re.compile(r"(.*)(\.hdr|\.img)(\.gz)?", re.IGNORECASE | re.DOTALL)
_BLOCK = 1 << 20
_MOST_BEHIND = 1 << 24  # bytes behind the voxels: FreeSurfer's tags, padding


def partner(path: Path, extension: str) -> Path:
    """The other file of a .hdr and .img pair, compressed or not, in the same case or another."""
    stem = cast(re.Match, PAIR.fullmatch(path.name))[1]
    wanted = re.compile(rf"{re.escape(stem)}(?i:{re.escape(extension)}(\.gz)?)")
    there = [name for name in os.listdir(path.parent) if wanted.fullmatch(name)]
    if not there:
        raise InputError(f"{path}: there is no {stem}{extension} beside it; a pair needs both files, copy it too")
    return existing_file(path.with_name(min(there, key=lambda name: (len(name), name != stem + extension, name))))


@contextmanager
def unpacked(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked where its first bytes say that it is compressed, whatever its name says."""
    with open(path, "rb") as file:
        magic = file.read(3)
        file.seek(0)
        if magic[:2] == GZIP:
            with gzip.open(file) as unpacked:
                yield cast(IO[bytes], unpacked)
        elif magic == BZIP2:
            with bz2.open(file) as unpacked:
                yield unpacked
        else:
            yield file


def skip(stream: IO[bytes], n_bytes: int) -> None:
    """Read past so many bytes."""
    while n_bytes > 0:
        if not (block := stream.read(min(n_bytes, _BLOCK))):
            raise EOFError("the file ends before its voxels begin")
        n_bytes -= len(block)


def exactly(stream: IO[bytes], n_bytes: int) -> np.ndarray:
    """The next bytes, neither more nor fewer."""
    buffer = np.empty(n_bytes, np.uint8)
    done = 0
    while done < n_bytes:
        block = stream.read(min(n_bytes - done, _BLOCK))
        if not block:
            raise EOFError(f"the voxels need {n_bytes} bytes, {done} are there")
        buffer[done : done + len(block)] = np.frombuffer(block, np.uint8)
        done += len(block)
    return buffer


def check_the_end(stream: IO[bytes], path: Path) -> None:
    """Read what little may follow the voxels: at the end of a compressed stream stands its checksum."""
    for _ in range(_MOST_BEHIND // _BLOCK):
        if not stream.read(_BLOCK):
            return
    raise InputError(
        f"{path}: holds more than {_MOST_BEHIND >> 20} MiB behind the volume that its header describes; export it again"
    )


@contextmanager
def enough_memory(path: str | os.PathLike) -> Iterator[None]:
    """Name the scan that takes more memory than there is."""
    try:
        yield
    except MemoryError as error:
        raise InputError(f"{path}: does not fit into memory; crop the scan, or use a machine with more") from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Name the file that cannot be read, and why."""
    try:
        with enough_memory(path):
            yield
    except InputError:
        raise
    except (HeaderDataError, WrapStructError, KeyError) as error:
        raise InputError(f"{path}: not a NIfTI or mgz volume ({_line(error)}); repair its header") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: truncated or damaged ({_line(error)}); copy the file again") from error
    except OSError as error:
        if error.errno is None:  # bz2's own
            raise InputError(f"{path}: truncated or damaged ({_line(error)}); copy the file again") from error
        raise unreadable(path, error, "check its permissions") from error


def _line(error: Exception) -> str:
    return one_line(" ".join(str(error).split()))
