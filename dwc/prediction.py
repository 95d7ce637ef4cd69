"""From a conformed scan to its segmentation: Monte Carlo samples, ensembles and what they disagree about.

A volume is predicted sub-volume by sub-volume, so that memory does not grow with the volume's probabilities, and each
sub-volume has noise of its own, so that a prediction is a function of (networks, image, n_samples, seed) alone. The
room reads networks; scans and result files are `data.conform`'s and `derivatives`' business, scores `evaluation`'s.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dwc.base.errors import InputError, brief
from dwc.base.seeds import seed_of
from dwc.data.cubes import join_volume, split_volume
from dwc.data.grid import SIDE, Grid
from dwc.data.intensity import moments, z_score
from dwc.data.labels import SHIPPED, LabelMap
from dwc.meshnet import MeshNet
from dwc.posterior import Posterior

__all__ = ["Ensemble", "Prediction", "load_networks", "predict_volume"]

# Samples of one sub-volume that pass together. Fixed, because the noise depends on the place in a batch: a setting
# would change predictions. Ten keep 10 x 96 x 32^3 activations near 126 MB each.
_SAMPLES_PER_PASS = 10
# Sub-volumes that pass together, each with noise of its own. A narrow network alone with one would fall back to
# PyTorch's slow convolution.
_SUB_VOLUMES_PER_PASS = 4


@dataclass(frozen=True)
class Prediction:
    """A volume's segmentation on the conformed grid.

    Attributes
    ----------
    labels : ndarray
        uint8 [size, size, size], the most probable class.
    entropy : ndarray
        float32 [size, size, size], entropy of the predictive distribution in nats: 0 where it is certain, ln n_classes
        where every class is as likely.
    confidence : ndarray
        float32 [size, size, size], the probability of the chosen class, 1 / n_classes to 1.
    """

    labels: np.ndarray
    entropy: np.ndarray
    confidence: np.ndarray


@dataclass(frozen=True)
class Ensemble:
    """Networks that predict together, one or more, and what they must share.

    Attributes
    ----------
    posteriors : tuple of Posterior
        The files.
    networks : tuple of MeshNet
        What they hold.
    label_map, grid
        Their classes, and the grid that their images are conformed to.
    """

    posteriors: tuple[Posterior, ...]
    networks: tuple[MeshNet, ...]
    label_map: LabelMap
    grid: Grid


def load_networks(paths: Sequence[str | Path], label_map: str | None = None) -> Ensemble:
    """Read networks and check that they can predict together.

    Parameters
    ----------
    paths : sequence of path
        Files of `dwc train` or `dwc consolidate`; widths and dilations may differ, MAP and Bayesian may mix.
    label_map : str, optional
        The TSV that the networks were trained on, where it is not shipped with dwc.

    Raises
    ------
    InputError
        If a file is no such network, a label map is not at hand or not the one trained on, or networks differ in label
        map or preprocessing; names the files.
    """
    if not paths:
        raise InputError("no network: give --network posterior.safetensors, several for an ensemble")
    posteriors = tuple(Posterior.load(path) for path in paths)
    networks = tuple(MeshNet.from_posterior(posterior) for posterior in posteriors)
    first, classes, grid = posteriors[0], _label_map(posteriors[0], label_map), _grid(posteriors[0])
    for position, (posterior, network) in enumerate(zip(posteriors, networks, strict=True)):
        for key in ("label_map", "preprocessing"):
            if posterior.shared(key) != first.shared(key):
                theirs, ours = posterior.metadata.get(key), first.metadata[key]
                raise InputError(
                    f"{posterior.name}: its {key.replace('_', ' ')} {brief(theirs)} is not {brief(ours)} as in "
                    f"{first.name}; give an ensemble networks trained alike"
                )
        if network.architecture["n_classes"] != classes.n_classes:
            raise InputError(
                f"{posterior.name}: has {network.architecture['n_classes']} classes, its label map {classes.name} "
                f"{classes.n_classes}; train it again"
            )
        for twin in posteriors[:position]:
            if twin.sha256 == posterior.sha256:
                raise InputError(f"{posterior.name}: is the same network as {twin.name}; give each network once")
    return Ensemble(posteriors, networks, classes, grid)


def predict_volume(
    networks: Sequence[MeshNet],
    image: np.ndarray,
    *,
    n_samples: int = 10,
    seed: int = 0,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    progress: str | None = None,
) -> Prediction:
    """Segment a conformed volume.

    The predictive distribution of a voxel is the mean over the networks of p(y | x), which for a Bayesian network is
    the mean of its softmax over `n_samples` draws of the network's noise, and for a MAP network its softmax. The noise
    of draw k on sub-volume i under network j depends on (seed, j, i, k) alone, whatever `n_samples` is, and not on
    PyTorch's generator, whose state is left as it was. Another number of threads changes the result by rounding only.

    Parameters
    ----------
    networks : sequence of MeshNet
        One, or an ensemble whose probabilities are averaged; moved to `device`.
    image : ndarray
        [size, size, size] on the networks' grid, uint8 as `conform_image` gives it; z-scored here over all its voxels.
    n_samples : int
        Draws per Bayesian network.
    seed : int
        Of the noise, >= 0.
    device, precision
        Where to compute, and "fp32" or "bf16" (autocast).
    progress : str, optional
        Name on a progress bar; none is shown without.

    Raises
    ------
    ValueError
        If `n_samples` or the seed is out of range, there is no network, or the volume does not split into sub-volumes.
    """
    if n_samples < 1 or seed < 0 or not networks:
        raise ValueError(f"{len(networks)} networks, n_samples {n_samples}, seed {seed}; need >= 1, >= 1 and >= 0")
    device = torch.device(device)
    networks = [network.to(device) for network in networks]
    cubes = split_volume(image)
    mean, sd = moments(image)
    labels = np.empty(cubes.shape, np.uint8)
    entropy, confidence = (np.empty(cubes.shape, np.float32) for _ in range(2))
    with (
        torch.inference_mode(),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
        tqdm(
            total=len(cubes), desc=progress, unit="sub-volume", disable=None if progress else True, dynamic_ncols=True
        ) as bar,
    ):
        for start in range(0, len(cubes), _SUB_VOLUMES_PER_PASS):
            here = slice(start, start + _SUB_VOLUMES_PER_PASS)
            x = torch.from_numpy(z_score(cubes[here], mean, sd))[:, None].to(device)
            each = (_probability(network, x, n_samples, seed, j, start) for j, network in enumerate(networks))
            probability = sum(each) / len(networks)
            labels[here] = probability.argmax(dim=1).to(torch.uint8).cpu()
            entropy[here] = torch.special.entr(probability).sum(dim=1).clamp_min_(0).cpu()
            confidence[here] = probability.amax(dim=1).clamp_max_(1).cpu()
            bar.update(len(x))
    return Prediction(*(join_volume(part, image.shape) for part in (labels, entropy, confidence)))


def _probability(network: MeshNet, x: Tensor, n_samples: int, seed: int, position: int, first: int) -> Tensor:
    """A network's predictive distribution fp32 [N, n_classes, 32, 32, 32] on sub-volumes [N, 1, 32, 32, 32].

    ``position`` is the network's in the ensemble, ``first`` the first sub-volume's in the volume.
    """
    if not network.bayesian:
        return network(x).float().softmax(dim=1)
    each = (_expected(network, cube, n_samples, (seed, position, first + i)) for i, cube in enumerate(x))
    return torch.stack(list(each))


def _expected(network: MeshNet, cube: Tensor, n_samples: int, entropy: tuple[int, ...]) -> Tensor:
    """A Bayesian network's mean softmax [n_classes, 32, 32, 32] on one sub-volume [1, 32, 32, 32]."""
    total = 0
    for start in range(0, n_samples, _SAMPLES_PER_PASS):
        # The draws are the batch: noise is a function of (seed, element index), so each place has noise of its own.
        torch.manual_seed(seed_of(*entropy, start // _SAMPLES_PER_PASS))
        n = min(_SAMPLES_PER_PASS, n_samples - start)
        logits = network(cube.expand(n, -1, -1, -1, -1), sample=True)
        total = total + logits.float().softmax(dim=1).sum(dim=0)
    return total / n_samples


def _label_map(posterior: Posterior, path: str | None) -> LabelMap:
    trained_on = posterior.metadata.get("label_map") or {}
    name = trained_on.get("name")
    if path is None and name not in SHIPPED:
        raise InputError(f"{posterior.name}: was trained on label map {name!r}; give its TSV as --label_map")
    label_map = LabelMap.load(path or name)
    if label_map.sha256 != trained_on.get("sha256"):
        raise InputError(
            f"{posterior.name}: was trained on another table of label map {name!r} than {path or 'the one of this dwc'}"
            "; give the TSV it was trained on as --label_map"
        )
    return label_map


def _grid(posterior: Posterior) -> Grid:
    theirs = posterior.metadata.get("preprocessing")
    try:
        grid = Grid(theirs["grid_size"], theirs["voxel_size"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{posterior.name}: names no preprocessing grid; give a network of dwc train") from error
    known = {"sub_volume": SIDE, "intensity": "z-score per volume"}
    if any(theirs.get(key) != value for key, value in known.items()) or grid.size % SIDE:
        raise InputError(f"{posterior.name}: this dwc cannot preprocess {brief(theirs)}; use the dwc that trained it")
    return grid
