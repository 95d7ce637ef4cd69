"""MeshNet, the dilated convolutional network of Table 1, plain or Bayesian: 3x3x3 layers with ReLU or ELU, then 1x1x1.

It returns logits. In a Bayesian network the weights have a fully factorized Gaussian (FFG) posterior.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import conv3d, elu, relu
from torch.nn.utils.parametrizations import weight_norm as normalize_weight
from torch.utils.checkpoint import checkpoint

from dwc.base.errors import InputError
from dwc.blocks import PLANES, grow, stream
from dwc.data.head import Region
from dwc.posterior import Posterior
from dwc.preprocessing import Preprocessing
from dwc_kernels import FFGConv3d
from dwc_kernels.drawing import drawn_weights

__all__ = ["DILATIONS", "Activation", "MeshNet", "checked_architecture", "describe"]

Activation = Literal["relu", "elu"]
WIDTH = 96
_MAX_SIZE = 10_000  # of any number in an architecture that comes in a file
DILATIONS = (1, 1, 1, 2, 4, 8, 1)  # Table 1, layers 1 to 7
_ACTIVATIONS: dict[Activation, Callable[..., Tensor]] = {"relu": relu, "elu": elu}


def describe(
    n_classes: int,
    width: int = 96,
    dilations: Sequence[int] = DILATIONS,
    in_channels: int = 1,
    activation: Activation = "relu",
) -> dict[str, Any]:
    """The ``architecture`` of a MeshNet, as JSON: everything that determines the names and shapes of its weights."""
    return {
        "network": "MeshNet",
        "n_classes": n_classes,
        "width": width,
        "dilations": list(dilations),
        "in_channels": in_channels,
        "activation": activation,
    }


def checked_architecture(posterior: Posterior) -> dict[str, Any]:
    """The ``architecture`` in a posterior's header, checked to be a complete MeshNet."""
    theirs = posterior.entry("architecture")
    if not isinstance(theirs, dict) or theirs.get("network") != "MeshNet":
        raise InputError(f"{posterior.name}: holds no MeshNet; give a network trained with dwc train")
    if odd := theirs.keys() ^ describe(1).keys():
        what = "unknown" if min(odd) in theirs else "missing"
        raise InputError(f"{posterior.name}: its architecture's {min(odd)!r} is {what}; write it again with dwc train")
    for key, value in theirs.items():
        if not _is_valid(key, value):
            raise InputError(
                f"{posterior.name}: its architecture's {key} is {str(value)[:40]!r}; write it again with dwc train"
            )
    shapes = _shapes(theirs)
    misfits = [name for name, mu in posterior.mu.items() if name in shapes and list(mu.shape) != shapes[name]]
    if misfits:  # before memory is taken for the network
        raise InputError(
            f"{posterior.name}: {misfits[0]} has shape {list(posterior.mu[misfits[0]].shape)}, the network's "
            f"{shapes[misfits[0]]}; give networks of one architecture"
        )
    if missing := shapes.keys() - posterior.mu.keys():
        raise InputError(
            f"{posterior.name}: {min(missing)} exists only in the network; give networks of one architecture"
        )
    return theirs


def _is_valid(key: str, value: Any) -> bool:
    """Whether an entry of an architecture has a value that makes a network."""
    if key == "network":
        return True
    if key == "activation":
        return value in get_args(Activation)
    numbers = value if key == "dilations" else [value]
    return isinstance(numbers, list) and bool(numbers) and all(type(n) is int and 0 < n <= _MAX_SIZE for n in numbers)


def _shapes(architecture: Mapping[str, Any]) -> dict[str, list[int]]:
    """Names and shapes of a network's weights in a posterior."""
    width, n_channels = architecture["width"], architecture["in_channels"]
    shapes: dict[str, list[int]] = {}
    for number in range(len(architecture["dilations"])):
        shapes |= {f"layers.{number}.weight": [width, n_channels, 3, 3, 3], f"layers.{number}.bias": [width]}
        n_channels = width
    last, n_classes = len(architecture["dilations"]), architecture["n_classes"]
    return {**shapes, f"layers.{last}.weight": [n_classes, width, 1, 1, 1], f"layers.{last}.bias": [n_classes]}


class MeshNet(nn.Module):
    """The network of Table 1: a 3x3x3 layer per dilation, padded by it, and a 1x1x1 convolution to the classes.

    Parameters
    ----------
    n_classes : int
        Channels of the output.
    width : int
        Filters of each hidden layer.
    dilations : sequence of int
        One per 3x3x3 layer.
    in_channels : int
        Channels of the input.
    activation : str
        "relu", as in the paper, or "elu", after each hidden layer.
    bayesian : bool
        Use `FFGConv3d` with an N(0, 1) prior and sigma = 1e-3, instead of `torch.nn.Conv3d`.
    weight_norm : bool
        Normalize the means, w = g v / |v| per filter, as the paper did for all networks.
    activation_checkpointing : bool
        Recompute hidden layers in the backward pass, with the same noise. Halves the memory held between forward and
        backward and reduces the peak to 60 %, at the cost of one extra forward pass; bitwise the same result.
    """

    def __init__(
        self,
        n_classes: int = 50,
        width: int = 96,
        dilations: Sequence[int] = DILATIONS,
        in_channels: int = 1,
        activation: Activation = "relu",
        bayesian: bool = True,
        weight_norm: bool = True,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"n_classes": (n_classes,), "width": (width,), "in_channels": (in_channels,), "dilations": dilations}
        for name, values in sizes.items():
            if not values or not all(isinstance(value, int) and value > 0 for value in values):
                raise InputError(f"`{name}` {values}: give positive whole numbers")
        if activation not in get_args(Activation):
            raise InputError(f"`activation` {activation!r}: choose one of {', '.join(get_args(Activation))}")
        self.architecture = describe(n_classes, width, dilations, in_channels, activation)
        self._activate: Callable[..., Tensor] = _ACTIVATIONS[activation]
        convolution = FFGConv3d if bayesian else nn.Conv3d
        mean = "weight_mu" if bayesian else "weight"
        self.layers = nn.ModuleList()
        for dilation in dilations:
            self.layers.append(convolution(in_channels, width, 3, padding=dilation, dilation=dilation))
            in_channels = width
        self.layers.append(convolution(in_channels, n_classes, 1))
        for layer in self.layers:
            # He et al. 2015: preserves the variance under ReLU and nearly so under ELU; the last layer has neither.
            gain: Literal["linear", "relu"] = "linear" if layer is self.layers[-1] else "relu"
            nn.init.kaiming_normal_(getattr(layer, mean), nonlinearity=gain)
            nn.init.zeros_(getattr(layer, "bias_mu" if bayesian else "bias"))
            if weight_norm:
                normalize_weight(layer, mean)
        self.bayesian = bayesian
        self.activation_checkpointing = activation_checkpointing
        self.preprocessing: Preprocessing | None = None  # of a network that was loaded from a file

    def forward(self, x: Tensor, sample: bool | None = None) -> Tensor:
        """Logits [N, n_classes, D, H, W] of images `x` [N, in_channels, D, H, W].

        `sample` decides whether a Bayesian network draws noise or returns the output at its means; by default it draws
        in training mode only.
        """
        options = {"sample": sample} if self.bayesian else {}
        x = x.to(memory_format=torch.channels_last_3d)  # fastest for cuDNN, oneDNN and the Triton kernels
        again = self.activation_checkpointing and torch.is_grad_enabled()

        def hidden(layer: nn.Module, x: Tensor) -> Tensor:
            return self._activate(layer(x, **options), inplace=True)  # safe: no layer's backward needs its own output

        for layer in self.layers[:-1]:
            x = checkpoint(hidden, layer, x, use_reentrant=False) if again else hidden(layer, x)
        return self.layers[-1](x, **options)

    def convolutions(self, seed: int | None = None) -> list[tuple[Tensor, Tensor | None]]:
        """Weight and bias of each layer: the means or, with a seed, one draw of a Bayesian network's weights.

        The draw depends only on the seed and the weight's position.
        """
        if self.bayesian and seed is not None:
            return list(drawn_weights(self, seed, rank=0).values())
        weight, bias = ("weight_mu", "bias_mu") if self.bayesian else ("weight", "bias")
        return [(getattr(layer, weight), getattr(layer, bias)) for layer in self.layers]

    def block_features(
        self, image: Tensor, block: Region, weights: Sequence[tuple[Tensor, Tensor | None]]
    ) -> Iterator[Tensor]:
        """The last layer's input in a block, a few planes at a time: [planes, h, w, width] along the first axis.

        Together they equal a pass over the whole image but for rounding. `image` is the whole one, [in_channels, D, H,
        W]; `weights` come from `convolutions`. Each layer computes the margin that the next layers need.
        """
        reach = sum(self.architecture["dilations"])
        seen = grow(block, reach, image.shape[1:])
        slabs = iter(image[(slice(None), *seen)][None].split(PLANES, dim=2))
        for (weight, bias), dilation in zip(weights[:-1], self.architecture["dilations"], strict=True):
            reach -= dilation
            wanted = grow(block, reach, image.shape[1:])
            layer = partial(self._hidden, weight, bias, dilation)
            slabs = stream(slabs, seen, wanted, dilation, layer)
            seen = wanted
        return (slab[0].movedim(0, -1) for slab in slabs)

    def _hidden(self, weight: Tensor, bias: Tensor | None, dilation: int, x: Tensor) -> Tensor:
        return self._activate(conv3d(x, weight, bias, dilation=dilation), inplace=True)

    def kl_loss(self) -> Tensor:
        """KL[q(w) || p(w)] in nats, summed over all weights (Eq. 5); a TypeError for a plain network."""
        if not self.bayesian:
            raise TypeError("a plain network has no KL; use dwc.training.objective.negative_log_prior")
        layers = (layer for layer in self.layers if isinstance(layer, FFGConv3d))
        return torch.stack([layer.kl_loss() for layer in layers]).sum()

    @classmethod
    def from_architecture(cls, architecture: Mapping[str, Any], *, bayesian: bool, **options: Any) -> "MeshNet":
        """A new network with this ``architecture``, plain or `bayesian`.

        `options` are weight_norm and activation_checkpointing.
        """
        shape = {key: value for key, value in architecture.items() if key != "network"}
        return cls(**shape, bayesian=bayesian, **options)

    @classmethod
    def from_posterior(cls, posterior: Posterior) -> "MeshNet":
        """The network in a posterior: Bayesian if it has standard deviations, else plain."""
        network = cls.from_architecture(checked_architecture(posterior), bayesian=posterior.is_bayesian)
        posterior.to_model(network)
        return network
