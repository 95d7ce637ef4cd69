"""Choosing the power lambda that tempers a consolidation, on the origin's own validation data alone.

Each lambda of a grid is scored by the log-likelihood of held-out voxels under the predictive distribution that
`prediction` would use, the mean of softmax over samples of the weights. It is a proper score, which sees the standard
deviations that lambda changes along with the means, and moves with every voxel; Dice of few scans moves in steps, so it
is told but does not decide. No site's data is needed. What lambda means is `consolidation`'s business.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from dwc.base.seeds import seed_of
from dwc.consolidation import Consolidation
from dwc.data.dataset import SubVolumes
from dwc.meshnet import MeshNet
from dwc.metrics.confusion import confusion_matrix, mean_dice
from dwc.posterior import Posterior
from dwc.training.validation import draw_sub_volumes

__all__ = ["TemperScore", "choose_temper", "score_network", "table", "temper_grid"]

_LARGEST = 2.0


@dataclass(frozen=True)
class TemperScore:
    """What a power lambda scores.

    Attributes
    ----------
    temper : float
        lambda; 0 is the prior, which no site has changed.
    log_likelihood : float
        Nats per voxel, <= 0: log of the probability of the true class, mean over the voxels.
    dice : float or None
        Mean over the classes present in the truth, without class 0; None if there is none.
    """

    temper: float
    log_likelihood: float
    dice: float | None


def temper_grid(n_sites: int) -> tuple[float, ...]:
    """Powers worth trying for S sites: half octaves from 1/(4S) or just below to 2, and 1/S itself, ascending.

    1, Eq. 17, is always among them.
    """
    first = math.floor(2 * math.log2(1 / (4 * n_sites)))
    last = round(2 * math.log2(_LARGEST))
    return tuple(sorted({1 / n_sites, *(2.0 ** (k / 2) for k in range(first, last + 1))}))


def choose_temper(
    consolidation: Consolidation,
    data: SubVolumes,
    *,
    n_samples: int = 10,
    at_most: int = 256,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> tuple[float, list[TemperScore]]:
    """The lambda of `temper_grid` under which held-out voxels are the most likely, the smallest if several are.

    Every lambda is scored on the same sub-volumes with the same noise, so that the choice is a function of the
    arguments and differences are lambda's.

    Parameters
    ----------
    consolidation : Consolidation
        With the sites in and not tempered yet; not changed.
    data : SubVolumes
        Held-out scans of the origin, which trained the prior.
    n_samples, at_most, seed, device
        As `score_network` takes them.
    progress : bool
        Show a bar.

    Returns
    -------
    float
        lambda.
    list of TemperScore
        First the prior's, for comparison (lambda = 0, which cannot be chosen), then the grid's.
    """
    tempers = temper_grid(consolidation.n_sites)

    def networks() -> Iterator[tuple[float, Posterior]]:
        yield 0.0, consolidation.prior
        for temper in tempers:
            yield temper, consolidation.tempered(temper).posterior(f"consolidated with lambda {temper:g}")

    scores = []
    bar = tqdm(networks(), desc="lambda", total=1 + len(tempers), disable=None if progress else True)
    for temper, posterior in bar:
        log_likelihood, dice = score_network(
            MeshNet.from_posterior(posterior), data, n_samples=n_samples, at_most=at_most, seed=seed, device=device
        )
        scores.append(TemperScore(temper, log_likelihood, dice))
    return max(scores[1:], key=lambda score: score.log_likelihood).temper, scores


@torch.inference_mode()
def score_network(
    network: MeshNet,
    data: SubVolumes,
    *,
    n_samples: int = 10,
    at_most: int = 256,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[float, float | None]:
    """Log-likelihood per voxel and mean Dice of a Bayesian network's predictive distribution.

    Parameters
    ----------
    network : MeshNet
        Bayesian; moved to `device`.
    data : SubVolumes
        Labelled scans.
    n_samples : int
        Samples of the weights per sub-volume, which pass together.
    at_most : int
        Sub-volumes to score, drawn by the seed where there are more.
    seed : int
        Of the draw and the noise; the same for two networks makes their noise the same.
    device
        Where to compute.

    Returns
    -------
    (float, float or None)
        Nats per voxel; Dice as `metrics.mean_dice`.
    """
    device = torch.device(device)
    network = network.to(device)
    n_classes = network.architecture["n_classes"]
    log_likelihood, n_voxels = 0.0, 0
    confusion = torch.zeros(n_classes, n_classes, dtype=torch.int64)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for i in draw_sub_volumes(len(data), at_most, seed):
            image, truth = data[i]
            torch.manual_seed(seed_of(seed, i))
            log_probability = _log_predictive(network, image.to(device), n_samples)
            of_truth = log_probability.gather(0, truth[None].to(device))
            log_likelihood += of_truth.sum(dtype=torch.float64).item()
            n_voxels += truth.numel()
            confusion += confusion_matrix(truth, log_probability.argmax(dim=0).cpu(), n_classes)
    return log_likelihood / n_voxels, mean_dice(confusion, with_background=False)


def _log_predictive(network: MeshNet, image: Tensor, n_samples: int) -> Tensor:
    """Log of the mean softmax over samples, [n_classes, D, H, W]; in logarithms, where no probability becomes 0."""
    logits = network(image[None].expand(n_samples, -1, -1, -1, -1), sample=True).float()
    return logits.log_softmax(dim=1).logsumexp(dim=0) - math.log(n_samples)


def table(scores: Sequence[TemperScore], chosen: float) -> str:
    """The grid for people, a line per lambda."""
    lines = [f"{'lambda':>8}{'log-likelihood':>16}{'Dice':>8}"]
    for score in scores:
        dice = "-" if score.dice is None else f"{score.dice:.4f}"
        note = "  the prior" if score.temper == 0 else "  chosen" if score.temper == chosen else ""
        lines.append(f"{score.temper:>8.4g}{score.log_likelihood:>16.5f}{dice:>8}{note}")
    if all(score.log_likelihood <= scores[0].log_likelihood for score in scores[1:]):
        lines.append("no lambda makes these scans more likely than the prior does")
    elif chosen in (scores[1].temper, scores[-1].temper):
        lines.append("chosen at the end of the grid; the most likely lambda may lie beyond it")
    return "\n".join(lines)
