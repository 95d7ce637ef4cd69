"""The cache of conformed scans, cut into 32^3 cubes, in memory-mapped files.

Each scan becomes one folder of the cache, named by the hash of everything that went into it, so nothing is computed
twice and nothing stale is read.
"""

import hashlib
import io
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dwc.base import launcher, ranks
from dwc.base.errors import InputError
from dwc.base.files import write_whole
from dwc.data.conform import conform_image, conform_labels
from dwc.data.constants import SIDE
from dwc.data.cubes import split_volume
from dwc.data.dataset import MOMENTS, SubVolumes, read_content, read_moments
from dwc.data.grid import Grid
from dwc.data.intensity import Scheme, content_of, moments
from dwc.data.labels import LabelMap
from dwc.data.paths import OUT_OF_HANDLES, unreadable
from dwc.data.scan import Scan
from dwc.data.streams import enough_memory

__all__ = ["digest_of_scans", "is_prepared", "prepare", "prepared_contents"]

_CACHE_FORMAT = 4  # raise it when the same inputs give other files
_UNFINISHED = ".unfinished-"
_DIGESTS = ".digests.json"  # absolute path -> size, date in ns, SHA-256
_DAY = 24 * 3600  # s
_SETTLED = 2_000_000_000  # ns; a file as young as this may still change within one tick of its date


def prepare(
    scans: Sequence[Scan],
    label_map: LabelMap,
    grid: Grid,
    cache_dir: str | os.PathLike,
    *,
    intensity: Scheme = "z_score",
    workers: int | None = None,
    progress: bool = True,
) -> SubVolumes:
    """Conform scans and cut them into sub-volumes, or find them in the cache; ranks share the work.

    Parameters
    ----------
    scans : sequence of Scan
        Those without label serve for prediction only.
    label_map, grid : LabelMap, Grid
        Classes of the labels; the grid, its size a multiple of 32.
    cache_dir : path
        Folder of the cache, made if need be. It holds 2 bytes per voxel and scan. Any number of processes may share it.
        Entries are named by the content of the scans; a scan is hashed again when its size or date has changed.
    intensity : str
        How the items are scaled; the cache does not depend on it.
    workers : int
        Threads that read and resample; 0 counts as 1. None: one per core of this process's share of the machine, up to
        8. The result does not depend on it. Each holds one scan in memory, 0.5 GB at 256^3.
    progress : bool
        Show a progress bar while scans are prepared.
    """
    if grid.size % SIDE:
        raise InputError(
            f"`grid_size` {grid.size} does not split into sub-volumes of {SIDE}; give a multiple of {SIDE}"
        )
    cache_dir = Path(cache_dir)
    if workers is None:
        workers = min(8, (os.cpu_count() or 1) // launcher.local_processes())
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        _sweep(cache_dir)
        digests = _read_digests(cache_dir)
        known = dict(digests)
        folders = _map(
            lambda scan: _prepare(scan, label_map, grid, cache_dir, digests),
            ranks.share(scans), workers, progress and ranks.is_main(),
        )  # fmt: skip
        folders, digests = _together(folders, digests, known)
        if digests != known and ranks.is_main():
            write_whole(cache_dir / _DIGESTS, json.dumps(digests).encode())
    except OSError as error:
        if error.errno in OUT_OF_HANDLES:
            raise unreadable(cache_dir, error) from error
        reason = error.strerror or error
        raise InputError(
            f"{cache_dir}: cannot write the cache ({reason}); free space or choose another folder"
        ) from error
    return SubVolumes(scans, folders, label_map, grid, intensity)


def is_prepared(scans: Sequence[Scan], label_map: LabelMap, grid: Grid, cache_dir: str | os.PathLike) -> bool:
    """Whether `prepare` would find all of these scans in the cache; writes nothing."""
    return None not in prepared_contents(scans, label_map, grid, cache_dir)


def prepared_contents(
    scans: Sequence[Scan], label_map: LabelMap, grid: Grid, cache_dir: str | os.PathLike
) -> list[str | None]:
    """`content_of` each image as the cache holds it; None for those that `prepare` would not find; writes nothing."""
    cache_dir = Path(cache_dir)
    digests = _read_digests(cache_dir)
    folders = [cache_dir / _key(scan, label_map, grid, digests) for scan in scans]
    return [
        read_content(folder) if _is_whole(folder, scan, grid) else None
        for folder, scan in zip(folders, scans, strict=True)
    ]


def digest_of_scans(scans: Sequence[Scan], cache_dir: str | os.PathLike) -> str:
    """SHA-256, hex, of the bytes of scans and labels and of the split, in their order; not of names.

    Files that `prepare` has read with this cache are not read again as long as they keep size and date.
    """
    known = _read_digests(Path(cache_dir))
    parts = [(_digest(scan.image, known), scan.label and _digest(scan.label, known), scan.split) for scan in scans]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _together(folders: list[Path], digests: dict[str, list], known: dict[str, list]) -> tuple[list[Path], dict]:
    """All ranks' folders, in the order of the scans, and digests."""
    new = {path: entry for path, entry in digests.items() if known.get(path) != entry}
    parts = ranks.gather({"folders": list(map(str, folders)), "digests": new})
    for part in parts:
        digests = digests | part["digests"]
    folders = [Path(folder) for folder in ranks.merge([part["folders"] for part in parts])]
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise InputError(f"{missing[0]}: is not seen by all processes; give a `cache_dir` that their machines share")
    return folders, digests


def _map(function: Callable[[Scan], Path], scans: Sequence[Scan], workers: int, progress: bool) -> list[Path]:
    with (
        ThreadPoolExecutor(max(workers, 1)) as pool,
        tqdm(total=len(scans), desc="preparing scans", unit="scan", disable=None if progress else True) as bar,
    ):
        futures = [pool.submit(function, scan) for scan in scans]
        try:
            for future in as_completed(futures):
                future.result()
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [future.result() for future in futures]


def _prepare(scan: Scan, label_map: LabelMap, grid: Grid, cache_dir: Path, digests: dict[str, list]) -> Path:
    """Folder of the cache that holds this scan; built first unless it is there and whole."""
    folder = cache_dir / _key(scan, label_map, grid, digests)
    if not _is_whole(folder, scan, grid):
        with enough_memory(scan.image):
            _build(folder, scan, label_map, grid)
    return folder


def _key(scan: Scan, label_map: LabelMap, grid: Grid, digests: dict[str, list]) -> str:
    """Hash of everything the folder's files depend on: the bytes of the inputs, not their names."""
    parts = {
        "format": _CACHE_FORMAT,
        "side": SIDE,
        "grid": [grid.size, grid.voxel_size],
        "image": _digest(scan.image, digests),
        "label": scan.label and _digest(scan.label, digests),
        "label_map": scan.label and label_map.sha256,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _digest(path: Path, digests: dict[str, list]) -> str:
    """SHA-256 of a file; remembered in `digests` for as long as the file keeps its size and date."""
    try:
        status = path.stat()
        state = [status.st_size, status.st_mtime_ns]
        *known_state, known = digests.get(str(path.resolve()), [None])
        if known_state == state:
            return known
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise unreadable(path, error) from error
    if time.time_ns() - status.st_mtime_ns > _SETTLED:
        digests[str(path.resolve())] = [*state, digest.hexdigest()]
    return digest.hexdigest()


def _read_digests(cache_dir: Path) -> dict[str, list]:
    try:
        return json.loads((cache_dir / _DIGESTS).read_text())
    except (FileNotFoundError, ValueError):
        return {}  # files are hashed again


def _build(folder: Path, scan: Scan, label_map: LabelMap, grid: Grid) -> None:
    """Write the folder under a temporary name and rename it when all of it is on the disk."""
    image = conform_image(scan.image, grid)
    arrays = {"image": image}
    if scan.label is not None:
        arrays["label"] = conform_labels(scan.label, grid, label_map, scan.image)
    mean, sd = (float(moment) for moment in moments(image))
    about = {"mean": mean, "sd": sd, "content": content_of(image)}
    unfinished = folder.with_name(f"{_UNFINISHED}{uuid.uuid4().hex}")
    unfinished.mkdir()
    try:
        for name, array in arrays.items():
            _write(unfinished / f"{name}.npy", _npy(split_volume(array)))
        _write(unfinished / MOMENTS, json.dumps(about).encode())
        if folder.exists() and not _is_whole(folder, scan, grid):
            shutil.rmtree(folder)  # damaged from outside
        os.rename(unfinished, folder)
    except OSError:
        if not _is_whole(folder, scan, grid):
            raise  # else another process has built the same folder meanwhile
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _npy(array: np.ndarray) -> memoryview:
    """The bytes of a .npy file: `np.save` to a disk that fills up counts bytes where `write` gives the reason."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getbuffer()


def _write(path: Path, content: bytes | memoryview) -> None:
    """Write a file of a folder that is not yet finished."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _is_whole(folder: Path, scan: Scan, grid: Grid) -> bool:
    names = ["image.npy"] if scan.label is None else ["image.npy", "label.npy"]
    try:
        sizes = {np.load(folder / name, mmap_mode="r", allow_pickle=False).size for name in names}
        read_moments(folder)
        read_content(folder)
    except (OSError, ValueError, KeyError):  # missing, cut short
        return False
    return sizes == {grid.size**3}


def _sweep(cache_dir: Path) -> None:
    """Remove what builds that were killed a day or more ago have left."""
    for folder in [*cache_dir.glob(f"{_UNFINISHED}*"), *cache_dir.glob(f".{_DIGESTS}.*")]:
        try:
            if time.time() - folder.stat().st_mtime > _DAY:
                shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
        except FileNotFoundError:
            continue  # another process sweeps too
