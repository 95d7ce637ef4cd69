"""Variational 3D layers by local reparameterization, the op beneath them, and what works over whole networks."""

from dwc_kernels.conversion import Conversion, conversion_report, convert, mean_names
from dwc_kernels.drawing import Prediction, draw_weights, drawn_weights, predict, sampling, seed_noise
from dwc_kernels.factorized import inverse_softplus
from dwc_kernels.functional import ffg_conv3d, ffg_conv_transpose3d, ffg_linear
from dwc_kernels.kl import gaussian_kl
from dwc_kernels.module import FFGConv3d, FFGConvTranspose3d, FFGLinear
from dwc_kernels.network import SigmaProjection, kl_loss, parameter_groups, set_prior, set_sigma_fraction

__version__ = "0.2.0"

__all__ = [
    "Conversion",
    "FFGConv3d",
    "FFGConvTranspose3d",
    "FFGLinear",
    "Prediction",
    "SigmaProjection",
    "__version__",
    "conversion_report",
    "convert",
    "draw_weights",
    "drawn_weights",
    "ffg_conv3d",
    "ffg_conv_transpose3d",
    "ffg_linear",
    "gaussian_kl",
    "inverse_softplus",
    "kl_loss",
    "mean_names",
    "parameter_groups",
    "predict",
    "sampling",
    "seed_noise",
    "set_prior",
    "set_sigma_fraction",
]
