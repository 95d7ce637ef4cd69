"""Mutated headers and compressed streams: the readers must refuse each in one line, or read what nibabel reads.

    python -m tests.data.fuzz_readers --count 20000 --state fuzz.json

A run is a function of its seed. It keeps its counts in the state file and goes on from there when it is called again.
"""

import argparse
import gzip
import io
import json
import logging
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np

from dwc.base.errors import InputError
from dwc.data.conform import conform_image, to_native
from dwc.data.grid import Grid
from dwc.data.reading import load_image, load_labels, open_scan

GRID = Grid(32, 4.0)
MEMORY = 4 << 30  # bytes of address space
PATIENCE = 20.0  # CPU seconds for one file
KINDS = (
    (nib.Nifti1Image, ".nii", (np.uint8, np.int16, np.float32, np.float64, np.int8, np.uint16)),
    (nib.Nifti2Image, ".nii", (np.uint8, np.int16, np.float32, np.int64)),
    (nib.MGHImage, ".mgh", (np.uint8, np.int16, np.float32, np.int32)),
)
EXTREMES = (b"\x00", b"\xff", b"\x7f", b"\x80", b"\x01", b"\xfe")
MAGICS = (b"n+1\0", b"ni1\0", b"n+2\0", b"ni2\0", b"\0\0\0\1", b"\x5c\1\0\0", b"\x1c\2\0\0")


def whole_file(rng: np.random.Generator) -> tuple[bytes, str, int]:
    """A valid volume, its extension and the length of its header."""
    kind, extension, dtypes = KINDS[rng.integers(len(KINDS))]
    shape = tuple(rng.integers(6, 20, 3))
    voxels = rng.integers(0, 120, shape).astype(dtypes[rng.integers(len(dtypes))])
    affine = np.diag([*rng.choice([1.0, 2.0, 0.8], 3), 1.0])
    image = kind(voxels, affine, dtype=voxels.dtype) if kind is not nib.MGHImage else kind(voxels, affine)
    if kind is not nib.MGHImage:
        if rng.random() < 0.3:
            image = kind(voxels, affine, image.header.as_byteswapped(), dtype=voxels.dtype)
        image.set_qform(affine, 1)
        image.set_sform(affine, int(rng.integers(0, 2)))
        if rng.random() < 0.3:
            image.header.set_slope_inter(0.5, 1.0)
    file_map = kind.make_file_map({"image": io.BytesIO()})
    image.to_file_map(file_map)
    return file_map["image"].fileobj.getvalue(), extension, {".nii": 352, ".mgh": 90}[extension]


def with_a_mutated_header(content: bytes, length: int, rng: np.random.Generator) -> bytes:
    """Bytes or short fields of the header replaced, or the magic by that of another kind of file."""
    mutated = bytearray(content)
    if rng.random() < 0.1:
        place = (0, 4, 344)[rng.integers(3)]
        mutated[place : place + 4] = MAGICS[rng.integers(len(MAGICS))]
        return bytes(mutated)
    if rng.random() < 0.1:
        length = min(length * 2, len(content))
    for _ in range(rng.integers(1, 6)):
        place = int(rng.integers(length))
        if rng.random() < 0.5:
            mutated[place] = rng.integers(256)
        else:
            width = int(rng.choice([2, 4, 8]))
            place -= place % width
            mutated[place : place + width] = EXTREMES[rng.integers(len(EXTREMES))] * width
    return bytes(mutated[: len(content)])


def with_a_mutated_stream(packed: bytes, rng: np.random.Generator) -> bytes:
    """Flipped, cut, repeated or extended compressed bytes."""
    mutated = bytearray(packed)
    choice = rng.integers(7)
    if choice == 0:
        for _ in range(rng.integers(1, 5)):
            mutated[rng.integers(len(mutated))] ^= 1 << int(rng.integers(8))
    elif choice == 1:
        del mutated[rng.integers(len(mutated)) :]
    elif choice == 2:
        mutated[-8:] = rng.bytes(8)  # checksum and length
    elif choice == 3:
        mutated += rng.bytes(int(rng.integers(1, 200)))
    elif choice == 4:
        mutated += gzip.compress(bytes(int(rng.integers(1 << 20))))
    elif choice == 5:
        mutated += ZEROS * int(rng.integers(1, 60))  # up to 4 GiB
    else:
        place = int(rng.integers(len(mutated)))
        mutated[place:place] = rng.bytes(int(rng.integers(1, 50)))
    return bytes(mutated)


ZEROS = gzip.compress(bytes(1 << 26), compresslevel=1)


def written(folder: Path, seed: int, number: int) -> Path:
    """The file of a number."""
    rng = np.random.default_rng((seed, number))
    content, extension, length = whole_file(rng)
    if rng.random() < 0.7:
        content = with_a_mutated_header(content, length, rng)
    if rng.random() < 0.6:
        content = gzip.compress(content, compresslevel=1, mtime=0)
        extension = ".mgz" if extension == ".mgh" else extension + ".gz"
        if rng.random() < 0.6:
            content = with_a_mutated_stream(content, rng)
    path = folder / f"scan{extension}"
    path.write_bytes(content)
    return path


def outcome(path: Path) -> str:
    """How a file was taken, in a word or two; an AssertionError if it should not have been."""
    results = [_taken(load_image, path), _taken(load_labels, path), _taken(lambda one: conform_image(one, GRID), path)]
    read, _, conformed = results
    if isinstance(read, str):
        return "refused"
    if not isinstance(conformed, str):
        assert conformed.dtype == np.uint8
        assert conformed.shape == GRID.shape
        to_native(conformed, path, GRID, order=0)
    try:
        with np.errstate(all="ignore"):
            theirs = nib.load(path)
            voxels = np.asanyarray(theirs.dataobj).reshape(theirs.shape[:3])
    except Exception as error:  # whatever nibabel raises for files that this package mends
        return f"read, but not by nibabel: {type(error).__name__} {' '.join(str(error).split()[:4])}"
    header = open_scan(path).header
    if isinstance(header, nib.Nifti1Header) and header["vox_offset"] == 0:
        return "read, where nibabel takes the header for voxels"
    ours = np.asanyarray(read.dataobj)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(ours, voxels.astype(ours.dtype))
    unit = 1.0
    if isinstance(theirs.header, nib.Nifti1Header):
        unit = {1: 1000.0, 3: 0.001}.get(int(theirs.header["xyzt_units"]) & 7, 1.0)
    np.testing.assert_allclose(read.affine[:3], theirs.affine[:3] * unit, rtol=1e-5, atol=1e-4)
    return "read as nibabel reads it"


def _taken(function, path: Path):
    """The result, or the one line of the refusal."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a warning would be a second line
            return function(path)
    except InputError as error:
        line = str(error)
    assert "\n" not in line
    assert path.name in line
    assert len(line) < 1000
    return line


def run(seed: int, count: int, state_path: Path | None, folder: Path) -> dict:
    """Try files up to number `count`; returns the counts, with each failure in a line."""
    state = {"seed": seed, "next": 0, "outcomes": {}, "failures": [], "slowest_cpu_s": 0.0}
    if state_path is not None and state_path.exists():
        state = json.loads(state_path.read_text())
    outcomes = Counter(state["outcomes"])
    for number in range(state["next"], count):
        path = written(folder, state["seed"], number)
        begin = time.process_time()
        try:
            outcomes[outcome(path)] += 1
        except Exception as error:
            outcomes["failed"] += 1
            first = " ".join(str(error).split())[:200]
            state["failures"].append(f"{number} {path.name}: {type(error).__name__}: {first}")
        took = time.process_time() - begin
        if took > PATIENCE:
            state["failures"].append(f"{number} {path.name}: took {took:.1f} CPU-s")
        state |= {"next": number + 1, "outcomes": dict(outcomes), "slowest_cpu_s": max(state["slowest_cpu_s"], took)}
        path.unlink()
        if state_path is not None and (number % 100 == 99 or number + 1 == count):
            state_path.write_text(json.dumps(state, indent=1))
    return state


def main() -> int:
    """Run from the command line; the exit code says whether all went well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--state", type=Path)
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL + 1)
    with tempfile.TemporaryDirectory() as folder:
        state = run(arguments.seed, arguments.count, arguments.state, Path(folder))
    print(json.dumps(state, indent=1))
    return len(state["failures"]) > 0


if __name__ == "__main__":
    sys.exit(main())
