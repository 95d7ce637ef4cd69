"""Segment conformed scans with one network or an ensemble, in blocks that give the result of one pass over the scan."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear
from tqdm import tqdm

from dwc.base import launcher
from dwc.base.errors import InputError, brief
from dwc.base.memory import free_memory
from dwc.base.seeds import seed_of
from dwc.blocks import extent, plan_blocks
from dwc.data.constants import SHIPPED, SIDE
from dwc.data.grid import Grid
from dwc.data.head import Region, head_box
from dwc.data.intensity import moments, z_score
from dwc.data.labels import LabelMap
from dwc.data.paths import network_file
from dwc.meshnet import MeshNet
from dwc.posterior import Posterior

__all__ = ["Ensemble", "Prediction", "load_networks", "predict_volume"]

_SLAB = 1 << 16  # voxels classified at a time
_FREE_PART = 0.5  # of the free memory, for a block, by default


@dataclass(frozen=True)
class Prediction:
    """A volume's segmentation on the conformed grid; all arrays but `draws` are [size, size, size].

    Attributes
    ----------
    labels, entropy, confidence : ndarray
        uint8, the most probable class; float32, entropy of the predictive distribution, 0 to ln n_classes nats;
        float32, probability of the predicted class.
    draws : ndarray
        int64 [n_draws, n_classes], voxels of each class in the segmentation of each draw alone: every draw of a
        Bayesian network, and each MAP network once. Their spread is the uncertainty of the volumes.
    mutual_information, variance : ndarray
        float32, how far the draws disagree: the entropy minus the mean entropy of each draw, in nats, and the variance
        of the probabilities over the draws, summed over the classes, 0 to 1. Both are 0 for a single draw.
    """

    labels: np.ndarray
    entropy: np.ndarray
    confidence: np.ndarray
    draws: np.ndarray
    mutual_information: np.ndarray | None = None
    variance: np.ndarray | None = None


@dataclass(frozen=True)
class Ensemble:
    """One or more networks that predict together, their posteriors, and the label map and grid they share."""

    posteriors: tuple[Posterior, ...]
    networks: tuple[MeshNet, ...]
    label_map: LabelMap
    grid: Grid


def load_networks(
    networks: str | Path | Posterior | Sequence[str | Path | Posterior], label_map: str | None = None
) -> Ensemble:
    """Read networks from `dwc train` or `dwc consolidate`, files or run folders, and check that they go together.

    Widths and dilations may differ, and MAP and Bayesian networks may be mixed. `label_map` is the TSV that the
    networks were trained on, if it is not one shipped with dwc.
    """
    given = [networks] if isinstance(networks, str | Path | Posterior) else networks
    if not given:
        raise InputError("no `network`: give a posterior.safetensors, several for an ensemble")
    posteriors = tuple(item if isinstance(item, Posterior) else Posterior.load(network_file(item)) for item in given)
    members = tuple(MeshNet.from_posterior(posterior) for posterior in posteriors)
    first, classes, grid = posteriors[0], _label_map(posteriors[0], label_map), _grid(posteriors[0])
    for position, (posterior, network) in enumerate(zip(posteriors, members, strict=True)):
        for key in ("label_map", "preprocessing"):
            if posterior.shared(key) != first.shared(key):
                theirs, ours = posterior.metadata.get(key), first.metadata[key]
                raise InputError(
                    f"{posterior.name}: its {key.replace('_', ' ')} {brief(theirs)} is not {brief(ours)} as in "
                    f"{first.name}; give networks that share it"
                )
        if network.architecture["n_classes"] != classes.n_classes:
            raise InputError(
                f"{posterior.name}: has {network.architecture['n_classes']} classes, but its label map "
                f"{classes.name} has {classes.n_classes}; train it again"
            )
        for twin in posteriors[:position]:
            if twin.sha256 == posterior.sha256:
                raise InputError(f"{posterior.name}: is the same network as {twin.name}; give each network once")
    return Ensemble(posteriors, members, classes, grid)


def predict_volume(
    networks: Sequence[MeshNet],
    image: np.ndarray,
    *,
    n_samples: int = 10,
    seed: int = 0,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    memory_limit: float | None = None,
    progress: str | None = None,
) -> Prediction:
    """Segment a conformed volume.

    A voxel's predictive distribution is the mean of p(y | x) over the networks: for a Bayesian network the mean softmax
    over `n_samples` draws of its weights, for a MAP network its softmax. Draw k of network j depends only on (seed, j,
    k). Voxels outside the head's box (`head_box`) are background with confidence 1. Blocks and threads change the
    result by rounding only.

    Parameters
    ----------
    networks : sequence of MeshNet
        Moved to `device`; the probabilities of several are averaged.
    image : ndarray
        uint8 [D, H, W] on the networks' grid, from `conform_image`; z-scored here over all voxels.
    n_samples, seed : int
        Draws per Bayesian network, >= 1, and their seed, >= 0.
    precision : str
        "fp32", or "bf16" for autocast.
    memory_limit : float, optional
        GB for one block, estimated. By default half of the device's free memory, shared by this machine's processes.
    progress : str, optional
        Label of a progress bar; without it, none is shown.
    """
    if n_samples < 1 or seed < 0 or not networks:
        raise ValueError(f"{len(networks)} networks, n_samples {n_samples}, seed {seed}; need >= 1, >= 1 and >= 0")
    device = torch.device(device)
    networks = [network.to(device) for network in networks]
    draws = [(j, k) for j, network in enumerate(networks) for k in range(n_samples if network.bayesian else 1)]
    n_classes = networks[0].architecture["n_classes"]
    box = head_box(image)
    blocks = _blocks(networks, box, image.shape, _limit(memory_limit, device))
    labels = np.zeros(image.shape, np.uint8)
    entropy, information, variance = (np.zeros(image.shape, np.float32) for _ in range(3))
    confidence = np.ones(image.shape, np.float32)
    counts = torch.zeros(len(draws), n_classes, dtype=torch.int64)
    counts[:, 0] = image.size - math.prod(extent(box))
    with (
        torch.inference_mode(),
        torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
        tqdm(
            total=len(blocks) * len(draws), desc=progress, unit="pass", disable=None if progress else True,
            dynamic_ncols=True,
        ) as bar,
    ):  # fmt: skip
        x = torch.from_numpy(z_score(image, *moments(image)))[None].to(device)
        for block in blocks:
            mean = torch.zeros(*extent(block), n_classes, device=device)
            of_draws, squares = (torch.zeros(extent(block), device=device) for _ in range(2))
            for (j, k), count in zip(draws, counts, strict=True):
                network = networks[j]
                weights = network.convolutions(seed_of(seed, j, k))
                features = network.block_features(x, block, weights)
                share = 1 / (len(networks) * (n_samples if network.bayesian else 1))
                for part in _slabs(block):
                    probability = _classify(features[part], *weights[-1]).softmax(dim=-1)
                    count += torch.bincount(probability.max(dim=-1).indices.flatten(), minlength=n_classes).cpu()
                    mean[part].add_(probability, alpha=share)
                    if len(draws) > 1:
                        of_draws[part].add_(torch.special.entr(probability).sum(dim=-1), alpha=share)
                        squares[part].add_(probability.square_().sum(dim=-1), alpha=share)
                del features  # frees memory for the next pass
                bar.update()
            for part in _slabs(block):
                highest, chosen = mean[part].max(dim=-1)
                labels[block][part] = chosen.to(torch.uint8).cpu()
                total = torch.special.entr(mean[part]).sum(dim=-1).clamp_min_(0)
                entropy[block][part] = total.cpu()
                if len(draws) > 1:
                    information[block][part] = (total - of_draws[part]).clamp_min_(0).cpu()
                    variance[block][part] = (squares[part] - mean[part].square().sum(dim=-1)).clamp_min_(0).cpu()
                confidence[block][part] = highest.clamp_max_(1).cpu()
    return Prediction(labels, entropy, confidence, counts.numpy(), information, variance)


def _classify(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Logits fp32 [..., n_classes] of a 1x1x1 convolution."""
    return linear(features, weight[..., 0, 0, 0], bias).float()


def _slabs(block: Region) -> list[slice]:
    """Ranges of a few planes of a block, so that tensors with a channel per class stay small."""
    depth, *plane = extent(block)
    step = max(1, _SLAB // math.prod(plane))
    return [slice(start, start + step) for start in range(0, depth, step)]


def _limit(gigabytes: float | None, device: torch.device) -> float:
    """Bytes that a block may take."""
    if gigabytes is not None:
        return gigabytes * 1e9
    return _FREE_PART * free_memory(device) / (1 if device.type == "cuda" else launcher.local_processes())


def _blocks(networks: Sequence[MeshNet], box: Region, shape: Sequence[int], limit: float) -> list[Region]:
    """Blocks for all networks: for the widest one, with the dilations of the one with the largest reach."""
    architectures = [network.architecture for network in networks]
    dilations = max((a["dilations"] for a in architectures), key=sum)
    width = max(a["width"] for a in architectures)
    return plan_blocks(box, shape, dilations, width, architectures[0]["n_classes"], limit)


def _label_map(posterior: Posterior, path: str | None) -> LabelMap:
    trained_on = posterior.metadata.get("label_map") or {}
    name = trained_on.get("name")
    if path is None and name not in SHIPPED:
        raise InputError(f"{posterior.name}: was trained on label map {name!r}; give its TSV as `label_map`")
    label_map = LabelMap.load(path or str(name))
    if label_map.sha256 != trained_on.get("sha256"):
        raise InputError(
            f"{posterior.name}: was trained on another table of label map {name!r} than {path or 'the shipped one'}"
            "; give the TSV it was trained on as `label_map`"
        )
    return label_map


def _grid(posterior: Posterior) -> Grid:
    theirs: Any = posterior.metadata.get("preprocessing")
    try:
        grid = Grid(theirs["grid_size"], theirs["voxel_size"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{posterior.name}: names no preprocessing grid; give a network from dwc train") from error
    known = {"sub_volume": SIDE, "intensity": "z-score per volume"}
    if any(theirs.get(key) != value for key, value in known.items()) or grid.size % SIDE:
        raise InputError(
            f"{posterior.name}: this dwc cannot preprocess {brief(theirs)}; use the version that trained it"
        )
    return grid
