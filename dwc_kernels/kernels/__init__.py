"""The Triton backend: forward, input gradient and weight gradient, one file each, behind the same functions as
``reference``, which is their definition. Importing this package imports Triton; ``backends.why_not_triton`` says
beforehand whether it can run.
"""

from dwc_kernels.kernels.forward import forward
from dwc_kernels.kernels.grad_bias import grad_bias
from dwc_kernels.kernels.grad_input import grad_input
from dwc_kernels.kernels.grad_weight import grad_weight

__all__ = ["forward", "grad_bias", "grad_input", "grad_weight"]
