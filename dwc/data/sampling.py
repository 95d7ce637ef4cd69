"""The training cubes of a run: an endless sequence in which each cube depends only on (seed, position).

The paper's cubes are on a fixed grid and zero-padded, from which a network learns its position in the cube. Random
cubes can be anywhere and have a margin of real neighbours.
"""

from functools import lru_cache

import numpy as np
import torch
from scipy import ndimage
from torch.utils.data import Dataset

from dwc.data.augmentation import Augmentation, augment, reach_of
from dwc.data.constants import SIDE
from dwc.data.dataset import SubVolumes
from dwc.data.head import Region, head_box

__all__ = ["PaperCubes", "RandomCubes", "SurroundedCubes"]

Item = tuple[torch.Tensor, torch.Tensor]


class PaperCubes(Dataset[Item]):
    """The sub-volumes of prepared scans, pass after pass, each pass in a new order."""

    def __init__(self, data: SubVolumes, seed: int) -> None:
        self.data, self.seed = data, seed

    def __getitem__(self, position: int) -> Item:
        return self.data[_in_turn(position, len(self.data), self.seed)]


class SurroundedCubes(Dataset[Item]):
    """The sub-volumes of a dataset with `margin` voxels of their neighbours on each side.

    Item i is (image, labels): image float32 [1, 32 + 2 margin, ...], scaled as in the dataset and 0 outside the
    volume, where a network pads with zeros too; labels int64 [32, 32, 32].
    """

    def __init__(self, data: SubVolumes, margin: int) -> None:
        self.data, self.margin = data, margin

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Item:
        volume, place = divmod(index, self.data.sub_volumes_per_volume)
        start = SIDE * np.array(np.unravel_index(place, (self.data.grid.size // SIDE,) * 3))
        image, labels = self.data.region(volume, start - self.margin, SIDE + 2 * self.margin)
        return _item(self.data.scaling(volume)(image), labels, self.margin)


class RandomCubes(Dataset[Item]):
    """Cubes at random positions in prepared, labelled scans.

    The volumes take turns, each pass in a new order. A cube's centre is anywhere with probability `air_share`; else it
    is in the head's box or, with probability `brain_share`, in the box of the labelled voxels. Cubes stay within the
    volume, their margins may not: `margin` voxels on each side of the image, but not of the labels.
    """

    def __init__(
        self,
        data: SubVolumes,
        seed: int,
        margin: int,
        air_share: float,
        augmentation: Augmentation,
        brain_share: float = 0.0,
    ) -> None:
        self.data, self.seed, self.margin = data, seed, margin
        self.air_share, self.brain_share, self.augmentation = air_share, brain_share, augmentation
        self._boxes: dict[tuple[int, bool], Region] = {}

    def __getitem__(self, position: int) -> Item:
        volume = _in_turn(position, self.data.n_volumes, self.seed)
        rng = np.random.default_rng([self.seed, 3, position])
        start = self._start(volume, rng)
        side = SIDE + 2 * self.margin
        border = self.margin + reach_of(self.augmentation, side)
        image, labels = self.data.region(volume, start - border, SIDE + 2 * border)
        if any(vars(self.augmentation).values()):
            image, labels = augment(image, labels, side, self.augmentation, rng)
        return _item(self.data.scaling(volume)(image), labels, self.margin)

    def _box(self, volume: int, of_brain: bool) -> Region:
        if (volume, of_brain) not in self._boxes:
            image, labels = self.data.volume(volume)
            found = ndimage.find_objects(np.sign(labels))[:1] if of_brain and labels is not None else ()
            self._boxes[volume, of_brain] = found[0] if found else head_box(image)
        return self._boxes[volume, of_brain]

    def _start(self, volume: int, rng: np.random.Generator) -> np.ndarray:
        last = self.data.grid.size - SIDE
        if rng.uniform() < self.air_share:
            return rng.integers(0, last + 1, 3)
        of_brain = self.brain_share > 0 and rng.uniform() < self.brain_share
        corners = [slice(side.start - SIDE // 2, side.stop - SIDE // 2) for side in self._box(volume, of_brain)]
        return np.array([rng.integers(max(0, c.start), min(last, c.stop - 1), endpoint=True) for c in corners])


def _in_turn(position: int, n: int, seed: int) -> int:
    """The number at a position in a sequence of passes over n numbers, each pass in a new order."""
    turn, place = divmod(position, n)
    return int(_order(n, seed, turn)[place])


@lru_cache(maxsize=2)  # a batch may span two passes
def _order(n: int, seed: int, turn: int) -> np.ndarray:
    return np.random.default_rng([seed, 1, turn]).permutation(n)


def _item(image: np.ndarray, labels: np.ndarray, margin: int) -> Item:
    inner = (slice(margin, margin + SIDE),) * 3
    return torch.from_numpy(image)[None], torch.from_numpy(labels[inner].astype(np.int64))
