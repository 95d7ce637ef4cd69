"""The strength of augmentation; separate from `augmentation`, so that help does not import PyTorch."""

from dataclasses import dataclass

from dwc.base.settings import Settings

__all__ = ["Augmentation"]


@dataclass(frozen=True, kw_only=True)
class Augmentation(Settings):
    """The strength of augmentation; 0 disables a kind.

    Parameters
    ----------
    mirror
        Share of the cubes mirrored left to right; the classes do not distinguish sides.
    rotation
        Standard deviation of the angle about each axis, degrees.
    scale
        Standard deviation of the log of the scale.
    elastic
        Standard deviation of a smooth random displacement, voxels.
    bias
        Standard deviation of the log of a smooth multiplicative field.
    gamma
        Standard deviation of the log of the exponent applied to intensities.
    blur
        Maximum standard deviation of a Gaussian blur, voxels; uniform from 0.
    noise
        Maximum standard deviation of added Gaussian noise, as a share of the intensity range; uniform from 0.
    """

    mirror: float = 0.0
    rotation: float = 0.0
    scale: float = 0.0
    elastic: float = 0.0
    bias: float = 0.0
    gamma: float = 0.0
    blur: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in vars(self):
            self._require(name, getattr(self, name) >= 0, "give a number >= 0")
        self._require("mirror", self.mirror <= 1, "give a share, 0 to 1")

    @property
    def warps(self) -> bool:
        """Whether voxels are moved."""
        return max(self.rotation, self.scale, self.elastic) > 0
