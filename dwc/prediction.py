"""Segment conformed scans with one network or an ensemble, in blocks that give the result of one pass over the scan."""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear
from tqdm import tqdm

from dwc.base import launcher
from dwc.base.errors import InputError, difference
from dwc.base.memory import free_memory
from dwc.base.seeds import seed_of
from dwc.blocks import extent, plan_blocks
from dwc.data.constants import SIDE
from dwc.data.dataset import SubVolumes
from dwc.data.grid import Grid
from dwc.data.head import Region, head_box
from dwc.data.intensity import Scheme, scaling_of
from dwc.data.labels import LabelMap
from dwc.data.paths import network_file
from dwc.meshnet import MeshNet
from dwc.posterior import Posterior
from dwc.preprocessing import Preprocessing

__all__ = ["Ensemble", "Prediction", "block_logits", "blocks_of", "load_network", "load_networks", "predict_volume"]

_SLAB = 1 << 16  # voxels classified at a time
_LEAST = 1e-6  # probability that a true label is given at least
_FREE_PART = 0.5  # of the free memory, for a block, by default
_MOST_ON_CPU = 4e9  # bytes, by default: others work on the machine too, and more saves little time


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
    log_likelihood : float, optional
        Of the true labels, if they were given: nats, summed over the volume. No probability counts as less than 1e-6.
    """

    labels: np.ndarray
    entropy: np.ndarray
    confidence: np.ndarray
    draws: np.ndarray
    mutual_information: np.ndarray | None = None
    variance: np.ndarray | None = None
    log_likelihood: float | None = None


@dataclass(frozen=True)
class Ensemble:
    """One or more networks that predict together, their posteriors, and the label map and preprocessing they share."""

    posteriors: tuple[Posterior, ...]
    networks: tuple[MeshNet, ...]
    label_map: LabelMap
    grid: Grid
    intensity: Scheme


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
    first, preprocessing = posteriors[0], Preprocessing.of(posteriors[0], label_map)
    classes = preprocessing.label_map
    for position, (posterior, network) in enumerate(zip(posteriors, members, strict=True)):
        for key in ("label_map", "preprocessing"):
            if posterior.shared(key) != first.shared(key):
                theirs, ours = difference(posterior.entry(key), first.entry(key))
                raise InputError(
                    f"{posterior.name}: its {key.replace('_', ' ')} {theirs} is not {ours} as in "
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
        network.preprocessing = preprocessing
    return Ensemble(posteriors, members, classes, preprocessing.grid, preprocessing.intensity)


def load_network(network: str | Path | Posterior, label_map: str | None = None) -> MeshNet:
    """Read a network as a PyTorch module in eval mode, where a Bayesian one returns the logits at its means.

    Its `preprocessing` makes the input of a scan: `net(net.preprocessing("scan.nii.gz")).argmax(1)`. A whole scan takes
    the memory of two layers at once; `predict` works in blocks and brings labels back onto the scan's grid.

    Parameters
    ----------
    network
        A posterior, its file or the folder of its run.
    label_map : str, optional
        The TSV that the network was trained on, if it is not one shipped with dwc.
    """
    if not isinstance(network, str | Path | Posterior):
        raise InputError(f"`network` {network!r}: give one posterior, its file or the folder of its run")
    return load_networks(network, label_map).networks[0].eval()


def predict_volume(
    networks: Sequence[MeshNet],
    image: np.ndarray,
    *,
    intensity: Scheme = "z_score",
    n_samples: int = 10,
    seed: int = 0,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    memory_limit: float | None = None,
    progress: str | None = None,
    truth: np.ndarray | None = None,
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
        uint8 [D, H, W] on the networks' grid, from `conform_image`.
    intensity : str
        The networks' intensity scheme, by which the image is scaled.
    n_samples, seed : int
        Draws per Bayesian network, >= 1, and their seed, >= 0.
    precision : str
        "fp32", or "bf16" for autocast.
    memory_limit : float, optional
        GB for one block, estimated. By default half of the device's free memory, on the CPU at most 4 and
        shared by this machine's processes.
    progress : str, optional
        Label of a progress bar; without it, none is shown.
    truth : ndarray, optional
        Classes, uint8 [D, H, W], whose log-likelihood is wanted.
    """
    if n_samples < 1 or seed < 0 or not networks:
        raise ValueError(f"{len(networks)} networks, n_samples {n_samples}, seed {seed}; need >= 1, >= 1 and >= 0")
    device = torch.device(device)
    networks = [network.to(device) for network in networks]
    draws = [(j, k) for j, network in enumerate(networks) for k in range(n_samples if network.bayesian else 1)]
    n_classes = networks[0].architecture["n_classes"]
    box = head_box(image)
    blocks = _blocks(networks, box, image.shape, len(draws), _limit(memory_limit, device))
    maps = _Maps.of(image.shape)
    counts = torch.zeros(len(draws), n_classes, dtype=torch.int64)
    counts[:, 0] = image.size - math.prod(extent(box))
    log_likelihood = 0.0
    with (
        torch.inference_mode(),
        torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
        tqdm(
            total=len(blocks) * len(draws), desc=progress, unit="pass", disable=None if progress else True,
            dynamic_ncols=True,
        ) as bar,
    ):  # fmt: skip
        x = torch.from_numpy(scaling_of(image, intensity)(image))[None].to(device)
        for block in blocks:
            sums: deque[Tensor] = deque()  # over the draws so far, a few planes each
            for n, ((j, k), count) in enumerate(zip(draws, counts, strict=True), start=1):
                network = networks[j]
                weights = network.convolutions(seed_of(seed, j, k))
                share = 1 / (len(networks) * (n_samples if network.bayesian else 1))
                start = block[0].start
                for features in _thinner(network.block_features(x, block, weights)):
                    probability = _classify(features, *weights[-1]).softmax(dim=-1)
                    count += torch.bincount(probability.max(dim=-1).indices.flatten(), minlength=n_classes).cpu()
                    part = (slice(start, start + len(probability)), *block[1:])
                    start += len(probability)
                    if len(draws) > 1:
                        maps.add(part, probability, share)
                    mean = probability * share if n == 1 else sums.popleft().add_(probability, alpha=share)
                    if n < len(draws):
                        sums.append(mean)
                        continue
                    maps.finish(part, mean, spread=len(draws) > 1)
                    if truth is not None:
                        log_likelihood += _log_likelihood(mean, truth[part])
                bar.update()
    if truth is not None:
        log_likelihood += math.log(_LEAST) * (np.count_nonzero(truth) - np.count_nonzero(truth[box]))
    return Prediction(
        maps.labels, maps.entropy, maps.confidence, counts.numpy(), maps.information, maps.variance,
        None if truth is None else log_likelihood,
    )  # fmt: skip


@dataclass(frozen=True)
class _Maps:
    """The maps of a whole volume, [D, H, W]; `information` and `variance` hold sums over draws until a part is done."""

    labels: np.ndarray
    entropy: np.ndarray
    confidence: np.ndarray
    information: np.ndarray
    variance: np.ndarray

    @classmethod
    def of(cls, shape: Sequence[int]) -> "_Maps":
        """Background, with confidence 1."""
        entropy, information, variance = (np.zeros(shape, np.float32) for _ in range(3))
        return cls(np.zeros(shape, np.uint8), entropy, np.ones(shape, np.float32), information, variance)

    def add(self, part: Region, probability: Tensor, share: float) -> None:
        """Add a draw's part to the sums."""
        self.information[part] += share * torch.special.entr(probability).sum(dim=-1).cpu().numpy()
        self.variance[part] += share * probability.square().sum(dim=-1).cpu().numpy()

    def finish(self, part: Region, mean: Tensor, *, spread: bool) -> None:
        """Write a part from the mean over all draws; `spread` where there are several."""
        highest, chosen = mean.max(dim=-1)
        self.labels[part] = chosen.to(torch.uint8).cpu()
        self.entropy[part] = torch.special.entr(mean).sum(dim=-1).clamp_min_(0).cpu()
        self.confidence[part] = highest.clamp_max_(1).cpu()
        if spread:
            self.information[part] = np.maximum(self.entropy[part] - self.information[part], 0)
            self.variance[part] = np.maximum(self.variance[part] - mean.square().sum(dim=-1).cpu().numpy(), 0)


def blocks_of(
    data: SubVolumes, sub_volumes: Iterable[int], device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Region]]:
    """For each of the sub-volumes: the scaled volume [1, D, H, W], the true classes in it (int64), and where it is."""
    of, image, truth = -1, torch.empty(0), np.empty(0)
    for index in sub_volumes:
        volume, place = divmod(index, data.sub_volumes_per_volume)
        if volume != of:
            voxels, classes = data.volume(volume)
            assert classes is not None  # `scans_to_score` refuses scans without labels
            of, truth, image = volume, classes, torch.from_numpy(data.scaling(volume)(voxels))[None].to(device)
        corner = SIDE * np.array(np.unravel_index(place, (data.grid.size // SIDE,) * 3))
        block = tuple(slice(int(start), int(start) + SIDE) for start in corner)
        yield image, torch.from_numpy(truth[block].astype(np.int64)).to(device), block


def block_logits(
    network: MeshNet, image: Tensor, block: Region, weights: Sequence[tuple[Tensor, Tensor | None]]
) -> Tensor:
    """Logits fp32 [d, h, w, n_classes] in a block of a scaled image [in_channels, D, H, W], as in a whole scan.

    `weights` come from `MeshNet.convolutions`.
    """
    features = torch.cat(list(network.block_features(image, block, weights)))
    return _classify(features, *weights[-1])


def _log_likelihood(probability: Tensor, truth: np.ndarray) -> float:
    """Of the true classes, in nats, summed."""
    classes = torch.from_numpy(truth.astype(np.int64)).to(probability.device)
    return probability.gather(-1, classes[..., None]).clamp_min_(_LEAST).double().log_().sum().item()


def _classify(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Logits fp32 [..., n_classes] of a 1x1x1 convolution."""
    return linear(features, weight[..., 0, 0, 0], bias).float()


def _thinner(slabs: Iterable[Tensor]) -> Iterator[Tensor]:
    """Slabs [planes, h, w, width] in fewer planes each, so that tensors with a channel per class stay small."""
    for slab in slabs:
        yield from slab.split(max(1, _SLAB // math.prod(slab.shape[1:3])))


def _limit(gigabytes: float | None, device: torch.device) -> float:
    """Bytes that a block may take."""
    if gigabytes is not None:
        return gigabytes * 1e9
    free = _FREE_PART * free_memory(device)
    return free if device.type == "cuda" else min(free / launcher.local_processes(), _MOST_ON_CPU)


def _blocks(networks: Sequence[MeshNet], box: Region, shape: Sequence[int], n_draws: int, limit: float) -> list[Region]:
    """Blocks for all networks: for the widest one, with the dilations of the one with the largest reach."""
    architectures = [network.architecture for network in networks]
    dilations = max((a["dilations"] for a in architectures), key=sum)
    width = max(a["width"] for a in architectures)
    n_summed = architectures[0]["n_classes"] if n_draws > 1 else 0
    return plan_blocks(box, shape, dilations, width, n_summed, limit)
