"""A posterior's network at its means, made of PyTorch's own layers, and what has to be known to use it without dwc."""

from typing import Any

import numpy as np
from torch import nn

from dwc import __version__
from dwc.data.intensity import IN_HEADERS, QUANTILES, Scheme
from dwc.meshnet import checked_architecture
from dwc.posterior import Posterior
from dwc.preprocessing import Preprocessing

__all__ = ["facts", "plain_layers", "plain_network"]

_FORMULAS: dict[Scheme, str] = {
    "z_score": "(x - mean) / standard deviation",
    "min_max": "(x - minimum) / (maximum - minimum)",
    "quantile": f"(clip(x, low, high) - low) / (high - low), low and high the quantiles {QUANTILES[0]} and "
    f"{QUANTILES[1]}, high kept within 0.9 to 1 times white matter's brightness (dwc.data.intensity.scaling_of)",
}


def plain_layers(posterior: Posterior) -> list[dict[str, Any]]:
    """The layers in their order, as names in `torch.nn`, `_target_`, and arguments."""
    architecture = checked_architecture(posterior)
    width, n_channels = architecture["width"], architecture["in_channels"]
    activation = {"relu": "ReLU", "elu": "ELU"}[architecture["activation"]]
    layers: list[dict[str, Any]] = []
    for dilation in architecture["dilations"]:
        convolution = {"in_channels": n_channels, "out_channels": width, "kernel_size": 3}
        layers.append({"_target_": "torch.nn.Conv3d", **convolution, "padding": dilation, "dilation": dilation})
        layers.append({"_target_": f"torch.nn.{activation}"})
        n_channels = width
    last = {"in_channels": n_channels, "out_channels": architecture["n_classes"], "kernel_size": 1}
    return [*layers, {"_target_": "torch.nn.Conv3d", **last}]


def plain_network(posterior: Posterior) -> nn.Sequential:
    """The network at its means: logits [N, n_classes, D, H, W] of scaled images [N, 1, D, H, W]."""
    layers = [{**layer} for layer in plain_layers(posterior)]
    network = nn.Sequential(*(getattr(nn, layer.pop("_target_").rpartition(".")[2])(**layer) for layer in layers))
    convolutions = [n for n, layer in enumerate(network) if isinstance(layer, nn.Conv3d)]
    state = {
        f"{place}.{part}": posterior.mu[f"layers.{number}.{part}"]
        for number, place in enumerate(convolutions)
        for part in ("weight", "bias")
    }
    network.load_state_dict(state)
    return network.eval()


def facts(posterior: Posterior, preprocessing: Preprocessing) -> dict[str, Any]:
    """What a user of the network alone has to know, as JSON."""
    grid, label_map = preprocessing.grid, preprocessing.label_map
    ids = label_map.to_ids(np.arange(label_map.n_classes)).tolist()
    return {
        "grid_size": grid.size,
        "voxel_size_mm": grid.voxel_size,
        "orientation": "LIA",
        "grey_levels": "0 to 255, as FreeSurfer's mri_convert --conform makes them",
        "intensity": f"{IN_HEADERS[preprocessing.intensity]}: {_FORMULAS[preprocessing.intensity]}, over all voxels",
        "labels": [
            {"class": k, "index": index, "name": title}
            for k, (index, title) in enumerate(zip(ids, label_map.titles, strict=True))
        ],
        "posterior_sha256": posterior.sha256,
        "dwc_version": __version__,
    }
