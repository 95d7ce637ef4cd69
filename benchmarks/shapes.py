"""The convolutions of Table 1 (McClure et al. 2018), one row per layer; benchmarks and tests share it."""

from dataclasses import dataclass

__all__ = ["LAYERS", "SAMPLES", "SIZE", "Layer"]

SAMPLES = 10  # sub-volumes per batch
SIZE = (32, 32, 32)  # voxels of a sub-volume


@dataclass(frozen=True)
class Layer:
    """One convolution with padding = dilation * (kernel - 1) / 2, so that the volume keeps its size."""

    name: str
    channels: int
    filters: int
    kernel: int
    dilation: int

    @property
    def padding(self) -> int:
        return self.dilation * (self.kernel - 1) // 2

    @property
    def macs(self) -> int:
        """Multiply-adds of one product (mean or variance) per voxel, padding included."""
        return self.channels * self.filters * self.kernel**3


LAYERS = (
    Layer("conv1", 1, 96, 3, 1),
    Layer("conv2", 96, 96, 3, 1),
    Layer("conv3", 96, 96, 3, 1),
    Layer("conv4", 96, 96, 3, 2),
    Layer("conv5", 96, 96, 3, 4),
    Layer("conv6", 96, 96, 3, 8),
    Layer("conv7", 96, 96, 3, 1),
    Layer("classes", 96, 50, 1, 1),
)
