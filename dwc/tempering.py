"""Choose the power lambda that tempers a consolidation, from validation data of the organization that made the prior.

Each lambda of a grid is scored by the log-likelihood of held-out voxels under the mean softmax over weight samples.
Log-likelihood is a proper score and depends on the standard deviations; Dice is reported but does not decide.
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

__all__ = ["TemperScore", "choose_temper", "format_scores", "score_network", "temper_grid"]

_LARGEST = 2.0


@dataclass(frozen=True)
class TemperScore:
    """Score of one lambda.

    Attributes
    ----------
    temper : float
        lambda; 0 stands for the prior.
    log_likelihood : float
        Mean over voxels of the log-probability of the true class, in nats.
    dice : float or None
        Mean over the classes present in the truth, without class 0; None if there is none.
    """

    temper: float
    log_likelihood: float
    dice: float | None


def temper_grid(n_sites: int) -> tuple[float, ...]:
    """Powers to try for S sites, ascending: half octaves from about 1/(4S) to 2, with 1 (Eq. 17) and 1/S among them."""
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
    """Score every lambda of `temper_grid` on the same sub-volumes with the same noise, and choose the best.

    Parameters
    ----------
    consolidation : Consolidation
        With all sites added, not tempered; it is not changed.
    data : SubVolumes
        Held-out scans of the organization that trained the prior.
    n_samples, at_most, seed, device
        See `score_network`.
    progress : bool
        Show a progress bar.

    Returns
    -------
    float
        The lambda of the highest log-likelihood; the smallest of equals.
    list of TemperScore
        The prior's score (lambda = 0, which cannot be chosen), then the grid's.
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
    """Log-likelihood per voxel (nats) and mean Dice of a Bayesian network's predictive distribution.

    Parameters
    ----------
    network : MeshNet
        Bayesian; moved to `device`.
    data : SubVolumes
        Labelled scans.
    n_samples : int
        Weight samples per sub-volume, in one batch.
    at_most : int
        Maximum number of sub-volumes; where there are more, `seed` draws them.
    seed : int
        Also seeds the noise: two networks with the same seed see the same noise.
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
    """Log of the mean softmax over samples, [n_classes, D, H, W], without leaving the log domain."""
    logits = network(image[None].expand(n_samples, -1, -1, -1, -1), sample=True).float()
    return logits.log_softmax(dim=1).logsumexp(dim=0) - math.log(n_samples)


def format_scores(scores: Sequence[TemperScore], chosen: float) -> str:
    """The scores as a text table, one line per lambda."""
    lines = [f"{'lambda':>8}{'log-likelihood':>16}{'Dice':>8}"]
    for score in scores:
        dice = "-" if score.dice is None else f"{score.dice:.4f}"
        note = {0: "  the prior", chosen: "  chosen"}.get(score.temper, "")
        lines.append(f"{score.temper:>8.4g}{score.log_likelihood:>16.5f}{dice:>8}{note}")
    if all(score.log_likelihood <= scores[0].log_likelihood for score in scores[1:]):
        lines.append("no lambda makes these scans more likely than the prior does")
    elif chosen in (scores[1].temper, scores[-1].temper):
        lines.append("chosen at the end of the grid; the most likely lambda may lie beyond it")
    return "\n".join(lines)
