"""The tile of a kernel: as it was measured on a device of this name, or else as the model of `tiles` chooses.

What `dwc_kernels.tune` measured for the user goes before what is in the package (`measured/`, one file for a device).
"""

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from dwc_kernels.kernels.chips import Chip
from dwc_kernels.kernels.specialized import variant
from dwc_kernels.kernels.tiles import Problem, Tile, choose, fits, programs

__all__ = ["measured_path", "measured_tile", "stored_tiles", "tile_for", "tuned_key", "tuned_path"]

TUNE_AGAIN = "delete it, or run python -m dwc_kernels.tune again"


def tuned_path(device: str) -> Path:
    """Where ``python -m dwc_kernels.tune`` stores what it measured on a device of this name."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "dwc_kernels" / _file_of(device)


def measured_path(device: str) -> Path:
    """Where the package has what was measured on a device of this name, if it was."""
    return Path(__file__).parent / "measured" / _file_of(device)


def _file_of(device: str) -> str:
    return f"{device.replace(' ', '_').replace('/', '_')}.json"


def tuned_key(problem: Problem) -> str:
    """What a measured tile is remembered under: everything but the number of samples and voxels."""
    kernel, stride = ("x".join(map(str, t)) for t in (problem.kernel, problem.stride))
    key = f"{problem.kind} {problem.dtype} {problem.channels}->{problem.columns} {kernel}"
    return key if problem.stride == (1, 1, 1) else f"{key} stride {stride}"


def stored_tile(values: Any) -> Tile:
    """A tile from its JSON; ValueError for what no kernel runs with."""
    if not isinstance(values, dict) or set(values) | {"specialized"} != {f.name for f in fields(Tile)}:
        raise ValueError("its fields are not those of a tile")
    box, specialized = values["box"], values.get("specialized", False)
    if not isinstance(specialized, bool):
        raise ValueError(f"specialized {specialized!r} is neither true nor false")
    if not isinstance(box, list) or len(box) != 3:
        raise ValueError(f"box {box!r} is no list of three")
    numbers = [*box, *(v for name, v in values.items() if name not in ("box", "specialized"))]
    if not all(type(n) is int for n in numbers):
        raise ValueError("a value is no integer")
    tile = Tile(**{**values, "box": tuple(box)})
    powers = [*box, tile.channels, tile.wide, tile.tail or 16, tile.chunk, tile.warps]
    if min(*powers, tile.stages) < 1 or any(n & (n - 1) for n in powers):
        raise ValueError(f"{numbers} are not all powers of two")
    # The least that a product takes, and the runs of four along W in which noise is drawn.
    if min(tile.rows, tile.channels, tile.wide, tile.tail or 16) < 16 or tile.box[2] < 4 or tile.warps > 32:
        raise ValueError(f"{numbers} make no product")
    return tile


def stored_tiles(path: Path) -> dict[str, Tile]:
    """The tiles in a file that `dwc_kernels.tune` wrote; none where there is no file.

    Raises
    ------
    ValueError
        If it holds anything else, naming the file.
    """
    if not path.exists():
        return {}
    key = "the file"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(stored, dict):
            raise ValueError("no object")
        tiles = {}
        for key, values in stored.items():
            # Version 0.1 had several blocks of channels in a step, with which nothing runs now.
            if not isinstance(values, dict) or values.pop("unroll", 1) == 1:
                tiles[key] = stored_tile(values)
        return tiles
    except ValueError as error:
        raise ValueError(f"{path} holds no tiles ({key}: {error}); {TUNE_AGAIN}") from error


def tile_for(problem: Problem, chip: Chip) -> Tile:
    """The tile that was measured best on a device of this name, or else the model's choice for it.

    The model's, too, where there is too little work for a tile that was measured with more.
    """
    for source in (tuned_path(chip.name), measured_path(chip.name)):
        tile = measured_tile(problem, chip, source)
        if tile is not None and _fills(problem, tile, chip):
            return tile
    return choose(problem, chip)


def measured_tile(problem: Problem, chip: Chip, source: Path) -> Tile | None:
    """The tile that a file has for a problem; None without one, or if it is of kernels that this Triton lacks.

    Raises
    ------
    ValueError
        If it does not fit the chip, naming the file.
    """
    key = tuned_key(problem)
    tile = stored_tiles(source).get(key)
    if tile is None or (tile.specialized and not variant.known_triton()):
        return None
    if not (variant.fits if tile.specialized else fits)(problem, tile, chip):
        raise ValueError(f"{source}: the tile of {key} does not fit {chip.name}; {TUNE_AGAIN}")
    return tile


def _fills(problem: Problem, tile: Tile, chip: Chip) -> bool:
    """Whether every multiprocessor has a program; those of a weight gradient divide the voxels until it does."""
    return problem.kind == "grad_weight" or programs(problem, tile) >= chip.multiprocessors
