"""Variational 3D convolution by local reparameterization: `FFGConv3d` and the op beneath it."""

from dwc_kernels.functional import ffg_conv3d, gaussian_kl
from dwc_kernels.module import FFGConv3d, convert, inverse_softplus

__version__ = "0.1.0"

__all__ = ["FFGConv3d", "__version__", "convert", "ffg_conv3d", "gaussian_kl", "inverse_softplus"]
