"""Prepared scans as a dataset of sub-volumes."""

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from dwc.base.errors import InputError
from dwc.data.constants import SIDE
from dwc.data.cubes import join_volume
from dwc.data.grid import Grid
from dwc.data.intensity import Scaling, Scheme, scaling_of
from dwc.data.labels import LabelMap
from dwc.data.paths import OUT_OF_HANDLES, unreadable
from dwc.data.scan import Scan

__all__ = ["MOMENTS", "SubVolumes", "read_content", "read_moments"]

MOMENTS = "moments.json"


class SubVolumes(torch.utils.data.Dataset):
    """The 32^3 sub-volumes of prepared scans, scan by scan; made by `prepare`.

    Item i is (image, label): image float32 [1, 32, 32, 32], scaled by the intensity scheme as its whole volume is, and
    label int64 [32, 32, 32]. Its volume is i // sub_volumes_per_volume. Files are memory-mapped, so that memory use
    does not grow with the number of volumes.
    """

    def __init__(
        self,
        scans: Sequence[Scan],
        folders: Sequence[Path],
        label_map: LabelMap,
        grid: Grid,
        intensity: Scheme = "z_score",
    ) -> None:
        self.scans, self.label_map, self.grid, self.intensity = list(scans), label_map, grid, intensity
        self._folders = list(folders)
        self._scalings: dict[int, Scaling] = {}
        self.n_volumes = len(self.scans)
        self.sub_volumes_per_volume = (grid.size // SIDE) ** 3

    @property
    def digest(self) -> str:
        """SHA-256, hex, of content and order of the scans, label map and grid."""
        keys = [folder.name for folder in self._folders]
        return hashlib.sha256(json.dumps(keys).encode()).hexdigest()

    def __len__(self) -> int:
        return self.n_volumes * self.sub_volumes_per_volume

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"sub-volume {index} of {len(self)}")
        volume, place = divmod(index, self.sub_volumes_per_volume)
        image = self.scaling(volume)(self._cubes(volume, "image")[place])
        label = self._cubes(volume, "label")[place].astype(np.int64)
        return torch.from_numpy(image)[None], torch.from_numpy(label)

    def volume(self, v: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Image and classes of volume v, both uint8 [size, size, size]; the classes are None without a label."""
        image = join_volume(self._cubes(v, "image"), self.grid.shape)
        if self.scans[v].label is None:
            return image, None
        return image, join_volume(self._cubes(v, "label"), self.grid.shape)

    def region(self, v: int, start: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
        """Image (float32, not scaled) and classes (uint8) of a cube anywhere in volume v.

        Outside the volume the image is what scales to 0, and the class is 0.
        """
        image = np.full((side,) * 3, self.scaling(v).zero, np.float32)
        labels = np.zeros((side,) * 3, np.uint8)
        first, last = np.maximum(start, 0), np.minimum(start + side, self.grid.size)
        for place in np.ndindex(*(-(-last // SIDE) - first // SIDE)):
            cube = first // SIDE + place
            low, high = np.maximum(cube * SIDE, first), np.minimum((cube + 1) * SIDE, last)
            to, of = (tuple(map(slice, low - corner, high - corner)) for corner in (start, cube * SIDE))
            index = np.ravel_multi_index(cube, (self.grid.size // SIDE,) * 3)
            image[to], labels[to] = (self._cubes(v, name)[index][of] for name in ("image", "label"))
        return image, labels

    def scaling(self, v: int) -> Scaling:
        """The scaling of volume v."""
        if v not in self._scalings:
            is_z_score = self.intensity == "z_score"  # the only scheme whose numbers the cache holds
            self._scalings[v] = (
                Scaling(*read_moments(self._folders[v]))
                if is_z_score
                else scaling_of(join_volume(self._cubes(v, "image"), self.grid.shape), self.intensity)
            )
        return self._scalings[v]

    def _cubes(self, v: int, name: str) -> np.ndarray:
        if name == "label" and self.scans[v].label is None:
            raise InputError(f"{self.scans[v].image}: has no label; add one to the manifest to train or score on it")
        return _memory_map(self._folders[v] / f"{name}.npy")


def read_moments(folder: Path) -> tuple[np.float32, np.float32]:
    """Mean and standard deviation of a prepared scan's image."""
    values = json.loads((folder / MOMENTS).read_text())
    return np.float32(values["mean"]), np.float32(values["sd"])


def read_content(folder: Path) -> str:
    """SHA-256, hex, of a prepared scan's image."""
    return json.loads((folder / MOMENTS).read_text())["content"]


def _memory_map(path: Path) -> np.ndarray:
    try:
        return _opened(path)
    except OSError as error:
        if error.errno not in OUT_OF_HANDLES:
            raise
    _opened.cache_clear()  # free file handles and try again
    try:
        return _opened(path)
    except OSError as error:
        raise unreadable(path, error) from error


@lru_cache(maxsize=128)  # each open map holds a file handle
def _opened(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)
