"""MONAI's networks converted, against the plain composition in each layer: `python -m benchmarks.whole_networks`.

Forward and backward on the CPU, in turn, the least CPU seconds of each, the median of the ratios of neighbouring runs,
and the bytes kept for the backward; and likewise `kl_loss` with its gradients against the formula as it is usually
written. With several threads CPU seconds count their waiting too, so one thread is the default. Needs MONAI.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from typing import Any
from unittest import mock

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.composition import composition, saved_bytes
from dwc_kernels import convert, kl_loss, module
from dwc_kernels.factorized import FFGModule

__all__ = ["NETWORKS", "compare", "main"]


def unet() -> nn.Module:
    """MONAI's residual U-Net."""
    from monai.networks.nets.unet import UNet

    return UNet(3, 1, 4, channels=(16, 32, 64, 128, 256), strides=(2, 2, 2, 2), num_res_units=2)


def dynunet() -> nn.Module:
    """MONAI's nnU-Net, of five levels."""
    from monai.networks.nets.dynunet import DynUNet

    return DynUNet(3, 1, 4, [3] * 5, [1, 2, 2, 2, 2], [2] * 4)


NETWORKS: dict[str, Callable[[], nn.Module]] = {"UNet": unet, "DynUNet": dynunet}


def transposed_composition(
    x: Tensor,
    weight_mu: Tensor,
    weight_sigma: Tensor,
    bias_mu: Tensor | None,
    bias_sigma: Tensor | None,
    *geometry: Any,
    **_: Any,
) -> Tensor:
    """`composition` for transposed convolutions."""
    bias_var = None if bias_sigma is None else bias_sigma.square()
    mean = F.conv_transpose3d(x, weight_mu, bias_mu, *geometry)
    var = F.conv_transpose3d(x.square(), weight_sigma.square(), bias_var, *geometry)
    return mean + var.sqrt() * torch.randn_like(mean)


def convolution_composition(
    x: Tensor,
    weight_mu: Tensor,
    weight_sigma: Tensor,
    bias_mu: Tensor | None,
    bias_sigma: Tensor | None,
    *geometry: Any,
    **_: Any,
) -> Tensor:
    """`composition` with the arguments of the layer's call."""
    options: dict[str, Any] = dict(zip(("stride", "padding", "dilation", "groups"), geometry, strict=True))
    return composition(x, weight_mu, weight_sigma, bias_mu, bias_sigma, **options)


def naive_kl(net: nn.Module) -> Tensor:
    """The divergence of every layer, in logarithms and squares of fp32."""
    total = torch.zeros(())
    for layer in net.modules():
        for name in layer._names if isinstance(layer, FFGModule) else ():
            mu, sigma = getattr(layer, f"{name}_mu"), F.softplus(getattr(layer, f"{name}_rho"))
            mu_0, sigma_0 = getattr(layer, f"prior_{name}_mu"), getattr(layer, f"prior_{name}_sigma")
            squares = (sigma.square() + (mu - mu_0).square()) / (2.0 * sigma_0.square())
            total = total + (torch.log(sigma_0 / sigma) + squares - 0.5).sum()
    return total


def compare(build: Callable[[], nn.Module], size: int, batch: int, seconds: float) -> dict[str, float]:
    """Milliseconds and megabytes kept of both, and their ratios."""
    torch.manual_seed(0)
    net = convert(build())
    x = torch.randn(batch, 1, size, size, size)
    composed = mock.patch.multiple(
        module, ffg_conv3d=convolution_composition, ffg_conv_transpose3d=transposed_composition
    )
    parameters = list(net.parameters())
    spent: dict[str, list[float]] = {"composition": [], "op": []}
    kept = {}

    def step() -> None:
        y = net(x)
        torch.autograd.grad(y, parameters, torch.ones_like(y))

    divergences: dict[Callable[[nn.Module], Tensor], list[float]] = {naive_kl: [], kl_loss: []}
    start = time.process_time()
    while len(spent["op"]) < 3 or time.process_time() - start < seconds:
        for name, layers in (("composition", composed), ("op", nullcontext())):
            with layers:
                before = time.process_time()
                step()
                spent[name].append(time.process_time() - before)
                if name not in kept:
                    kept[name] = saved_bytes(lambda: net(x), *parameters) / 2**20
        for kl, times in divergences.items():
            before = time.process_time()
            torch.autograd.grad(kl(net), parameters, allow_unused=True)
            times.append(time.process_time() - before)
    theirs_s, ours_s = (min(times[1:]) for times in spent.values())
    ratios = [ours / theirs for theirs, ours in zip(spent["composition"][1:], spent["op"][1:], strict=True)]
    return {
        "composition_ms": 1e3 * theirs_s,
        "op_ms": 1e3 * ours_s,
        "time": median(ratios),
        "composition_MB": kept["composition"],
        "op_MB": kept["op"],
        "naive_kl_ms": 1e3 * min(divergences[naive_kl][1:]),
        "kl_ms": 1e3 * min(divergences[kl_loss][1:]),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64], help="voxels along an axis")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0, help="CPU seconds for each network")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = {
        f"{name}, {size}^3": compare(build, size, arguments.batch, arguments.seconds)
        for name, build in NETWORKS.items()
        for size in arguments.sizes
    }
    print(pd.DataFrame.from_dict(rows, orient="index").to_string(float_format="%.2f"))


if __name__ == "__main__":
    main()
