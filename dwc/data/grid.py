"""The network's grid: a cube of isotropic voxels in LIA orientation, and the edge of a sub-volume. numpy only."""

from dataclasses import dataclass

import numpy as np

from dwc.base.errors import InputError

__all__ = ["LIA", "Grid"]

LIA = np.array([[-1.0, 0, 0], [0, 0, 1], [0, -1, 0]])  # columns: voxel axes to the left, inferior, anterior


@dataclass(frozen=True)
class Grid:
    """A cube of `size`^3 voxels of `voxel_size` mm in LIA orientation. FreeSurfer's conformed grid is Grid(256, 1)."""

    size: int = 256
    voxel_size: float = 1.0

    def __post_init__(self) -> None:
        whole = isinstance(self.size, int | np.integer) and not isinstance(self.size, bool)
        number = isinstance(self.voxel_size, int | float | np.number) and not isinstance(self.voxel_size, bool)
        if not whole or not number or self.size < 1 or not 0 < self.voxel_size < np.inf:
            raise InputError(
                f"a grid of size {self.size!r} and voxel size {self.voxel_size!r} mm: give a positive whole number of "
                "voxels and a positive number of mm"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the cube."""
        return (self.size,) * 3

    def affine(self, centre: np.ndarray) -> np.ndarray:
        """Voxel to RAS mm, [4, 4], with voxel size/2 at `centre` (RAS mm), as FreeSurfer counts a volume's centre."""
        affine = np.eye(4)
        affine[:3, :3] = LIA * self.voxel_size
        affine[:3, 3] = np.asarray(centre) - affine[:3, :3] @ np.full(3, self.size / 2)
        return affine
