"""How strongly training cubes are varied; apart from `augmentation`, so that help is printed without PyTorch."""

from dataclasses import dataclass

from dwc.base.settings import Settings

__all__ = ["Augmentation"]


@dataclass(frozen=True, kw_only=True)
class Augmentation(Settings):
    """How strongly training cubes are varied; 0 leaves a kind out.

    Parameters
    ----------
    mirror
        Share of the cubes that are mirrored left to right, which the classes do not tell apart.
    rotation
        Standard deviation of the angle about each axis, degrees.
    scale
        Standard deviation of the log of the size.
    elastic
        Standard deviation of a smooth random displacement, voxels.
    bias
        Standard deviation of the log of a smooth multiplicative field.
    gamma
        Standard deviation of the log of the exponent that intensities are raised to.
    blur
        Largest standard deviation of a Gaussian blur, voxels; drawn evenly from 0 up.
    noise
        Largest standard deviation of added Gaussian noise, as a share of the range of 255; drawn evenly from 0 up.
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
        """Whether it moves voxels."""
        return max(self.rotation, self.scale, self.elastic) > 0
