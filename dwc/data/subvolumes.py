"""Sub-volumes: conformed scans cut into 32^3 cubes, in a memory-mapped cache, as a dataset for training and scoring.

Each scan becomes one folder of the cache, named by the hash of everything that went into it, so nothing is computed
twice and nothing stale is read. Samplers, batches and augmentation are the trainer's.
"""

import hashlib
import io
import json
import os
import shutil
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dwc import distributed, launcher
from dwc.data.conform import Grid, conform_image, conform_labels
from dwc.data.labels import LabelMap
from dwc.data.manifest import Scan
from dwc.errors import InputError
from dwc.files import write_whole

__all__ = [
    "SIDE", "SubVolumes", "digest_of_scans", "is_prepared", "join_volume", "moments", "prepare", "split_volume",
    "z_score",
]  # fmt: skip

SIDE = 32  # voxels along each edge of a sub-volume
_CACHE_FORMAT = 2  # raise it when the same inputs give other files
_UNFINISHED = ".unfinished-"
_MOMENTS = "moments.json"
_DIGESTS = ".digests.json"  # absolute path -> size, date in ns, SHA-256
_DAY = 24 * 3600  # s
_SETTLED = 2_000_000_000  # ns; a file as young as this may still change within one tick of its date


def split_volume(volume: np.ndarray, side: int = SIDE) -> np.ndarray:
    """Cut a volume [D, H, W] into its non-overlapping cubes [n, side, side, side], in C order of their places.

    Raises
    ------
    ValueError
        An edge of the volume is not a multiple of `side`.
    """
    if volume.ndim != 3 or any(size % side for size in volume.shape):
        raise ValueError(f"a volume of shape {volume.shape} does not split into cubes of {side}")
    d, h, w = (size // side for size in volume.shape)
    cubes = volume.reshape(d, side, h, side, w, side).transpose(0, 2, 4, 1, 3, 5)
    return np.ascontiguousarray(cubes).reshape(-1, side, side, side)


def join_volume(cubes: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Put cubes [n, side, side, side] back into a volume of `shape`: the inverse of `split_volume`."""
    side = cubes.shape[-1]
    d, h, w = (size // side for size in shape)
    return cubes.reshape(d, h, w, side, side, side).transpose(0, 3, 1, 4, 2, 5).reshape(shape)


def moments(image: np.ndarray) -> tuple[np.float32, np.float32]:
    """Mean and standard deviation over all voxels of an image, summed in float64."""
    return np.float32(image.mean(dtype=np.float64)), np.float32(image.std(dtype=np.float64))


def z_score(voxels: np.ndarray, mean: np.float32, sd: np.float32) -> np.ndarray:
    """(voxels - mean) / sd, computed in float32: what a network takes in, with the `moments` of the whole volume."""
    return (voxels.astype(np.float32) - np.float32(mean)) / np.float32(sd)


class SubVolumes(torch.utils.data.Dataset):
    """The 32^3 sub-volumes of prepared scans, scan by scan; made by `prepare`.

    Item i is `(image, label)`: image float32 [1, 32, 32, 32], `z_score` of its voxels with the `moments` of its volume,
    and label int64 [32, 32, 32], the classes. Only the pages asked for are read from disk, so the memory in use does
    not grow with the number of volumes.

    Attributes
    ----------
    scans : list[Scan]
        The scans, in the order of the volumes.
    grid, label_map : Grid, LabelMap
        What they were conformed to.
    n_volumes, sub_volumes_per_volume : int
        Their product is `len(self)`; sub-volume i belongs to volume i // sub_volumes_per_volume.
    """

    def __init__(self, scans: Sequence[Scan], folders: Sequence[Path], label_map: LabelMap, grid: Grid):
        self.scans, self.label_map, self.grid = list(scans), label_map, grid
        self._folders = list(folders)
        self._moments = [_read_moments(folder) for folder in self._folders]
        self.n_volumes = len(self.scans)
        self.sub_volumes_per_volume = (grid.size // SIDE) ** 3

    @property
    def digest(self) -> str:
        """SHA-256, hex, of what the items are made of: bytes and order of the scans, label map and grid, not names."""
        keys = [folder.name for folder in self._folders]
        return hashlib.sha256(json.dumps(keys).encode()).hexdigest()

    def __len__(self) -> int:
        return self.n_volumes * self.sub_volumes_per_volume

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"sub-volume {index} of {len(self)}")
        volume, place = divmod(index, self.sub_volumes_per_volume)
        image = self.z_score(volume, self._cubes(volume, "image")[place])
        label = self._cubes(volume, "label")[place].astype(np.int64)
        return torch.from_numpy(image)[None], torch.from_numpy(label)

    def volume(self, v: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Image and classes of volume v, both uint8 [size, size, size]; the classes are None without a label."""
        image = join_volume(self._cubes(v, "image"), self.grid.shape)
        if self.scans[v].label is None:
            return image, None
        return image, join_volume(self._cubes(v, "label"), self.grid.shape)

    def z_score(self, v: int, voxels: np.ndarray) -> np.ndarray:
        """`z_score` of voxels of volume v with the moments of all its voxels."""
        return z_score(voxels, *self._moments[v])

    def _cubes(self, v: int, name: str) -> np.ndarray:
        if name == "label" and self.scans[v].label is None:
            raise InputError(f"{self.scans[v].image}: has no label; name one in the manifest to train or score on it")
        return _memory_map(self._folders[v] / f"{name}.npy")


def prepare(
    scans: Sequence[Scan],
    label_map: LabelMap,
    grid: Grid,
    cache_dir: str | os.PathLike,
    *,
    workers: int | None = None,
    progress: bool = True,
) -> SubVolumes:
    """Conform scans and cut them into sub-volumes, or find that already done in the cache; ranks share the work.

    Parameters
    ----------
    scans : sequence of Scan
        Those without label serve for prediction only.
    label_map, grid : LabelMap, Grid
        Classes of the labels; the grid, its size a multiple of 32.
    cache_dir : path
        Folder of the cache, made if need be. It holds 2 bytes per voxel and scan. Any number of processes may share it.
        Entries are named by the content of the scans; a scan is hashed again when its size or date has changed.
    workers : int
        Threads that read and resample (both leave Python's lock); 0 counts as 1. None: one per core of this process's
        share of the machine, up to 8. The
        result does not depend on it. Each holds one scan in memory, 0.3 GB at 256^3.
    progress : bool
        Show a progress bar while scans are prepared.

    Raises
    ------
    InputError
        A scan is bad input for `conform_image` or `conform_labels`, or the cache cannot be written or is full.
    """
    if grid.size % SIDE:
        raise InputError(f"grid size {grid.size} does not split into sub-volumes of {SIDE}; take a multiple of {SIDE}")
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
            distributed.share(scans), workers, progress and distributed.is_main(),
        )  # fmt: skip
        folders, digests = _together(folders, digests, known)
        if digests != known and distributed.is_main():
            write_whole(cache_dir / _DIGESTS, json.dumps(digests).encode())
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"{cache_dir}: cannot write the cache ({reason}); free space or choose another folder"
        ) from error
    return SubVolumes(scans, folders, label_map, grid)


def is_prepared(scans: Sequence[Scan], label_map: LabelMap, grid: Grid, cache_dir: str | os.PathLike) -> bool:
    """Whether `prepare` would find all of these scans in the cache; writes nothing.

    Raises
    ------
    InputError
        If a file cannot be read.
    """
    digests, cache_dir = _read_digests(Path(cache_dir)), Path(cache_dir)
    return all(_is_whole(cache_dir / _key(scan, label_map, grid, digests), scan, grid) for scan in scans)


def digest_of_scans(scans: Sequence[Scan], cache_dir: str | os.PathLike) -> str:
    """SHA-256, hex, of the bytes of scans and labels and of the split, in their order; not of names.

    Files that `prepare` has read with this cache are not read again as long as they keep size and date.

    Raises
    ------
    InputError
        If a file cannot be read.
    """
    known = _read_digests(Path(cache_dir))
    parts = [(_digest(scan.image, known), scan.label and _digest(scan.label, known), scan.split) for scan in scans]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _together(folders: list[Path], digests: dict[str, list], known: dict[str, list]) -> tuple[list[Path], dict]:
    """All ranks' folders, in the order of the scans, and digests."""
    new = {path: entry for path, entry in digests.items() if known.get(path) != entry}
    parts = distributed.gather({"folders": list(map(str, folders)), "digests": new})
    for part in parts:
        digests = digests | part["digests"]
    folders = [Path(folder) for folder in distributed.merge([part["folders"] for part in parts])]
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise InputError(f"{missing[0]}: is not seen by all processes; give a --cache_dir that their machines share")
    return folders, digests


def _map(function, scans: Sequence[Scan], workers: int, progress: bool) -> list[Path]:
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
        raise InputError(f"{path}: cannot read the file ({error.strerror}); check the path") from error
    if time.time_ns() - status.st_mtime_ns > _SETTLED:
        digests[str(path.resolve())] = [*state, digest.hexdigest()]
    return digest.hexdigest()


def _read_digests(cache_dir: Path) -> dict[str, list]:
    try:
        return json.loads((cache_dir / _DIGESTS).read_text())
    except (FileNotFoundError, ValueError):
        return {}  # only a memory: it is made again


def _build(folder: Path, scan: Scan, label_map: LabelMap, grid: Grid) -> None:
    """Write the folder under a temporary name and rename it when all of it is on the disk."""
    image = conform_image(scan.image, grid)
    arrays = {"image": image}
    if scan.label is not None:
        arrays["label"] = conform_labels(scan.label, grid, label_map, scan.image)
    mean, sd = (float(moment) for moment in moments(image))
    unfinished = folder.with_name(f"{_UNFINISHED}{uuid.uuid4().hex}")
    unfinished.mkdir()
    try:
        for name, array in arrays.items():
            _write(unfinished / f"{name}.npy", _npy(split_volume(array)))
        _write(unfinished / _MOMENTS, json.dumps({"mean": mean, "sd": sd}).encode())
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
        _read_moments(folder)
    except (OSError, ValueError, KeyError):  # missing, cut short
        return False
    return sizes == {grid.size**3}


def _sweep(cache_dir: Path) -> None:
    """Remove what builds that were killed a day ago or longer have left."""
    for folder in [*cache_dir.glob(f"{_UNFINISHED}*"), *cache_dir.glob(f".{_DIGESTS}.*")]:
        try:
            if time.time() - folder.stat().st_mtime > _DAY:
                shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
        except FileNotFoundError:
            continue  # another process sweeps too


def _read_moments(folder: Path) -> tuple[float, float]:
    values = json.loads((folder / _MOMENTS).read_text())
    return values["mean"], values["sd"]


@lru_cache(maxsize=128)  # each open map holds a file descriptor
def _memory_map(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)
