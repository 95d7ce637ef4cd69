"""Choose the power lambda that tempers a consolidation, from validation data of the organization that made the prior.

Each lambda of a grid is scored by the log-likelihood of held-out voxels under the mean softmax over weight samples.
Log-likelihood is a proper score and depends on the standard deviations; Dice is reported but does not decide.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from dwc.base.errors import InputError
from dwc.base.seeds import seed_of
from dwc.consolidation import Consolidation
from dwc.data.dataset import SubVolumes
from dwc.meshnet import MeshNet
from dwc.metrics.confusion import confusion_matrix, mean_dice
from dwc.posterior import Posterior
from dwc.prediction import block_logits, blocks_of
from dwc.training.validation import draw_sub_volumes

__all__ = [
    "LeftOut", "TemperScore", "choose_temper", "format_scores", "gain", "score_left_out", "score_network",
    "score_sub_volumes", "temper_grid",
]  # fmt: skip

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
    usable = [score for score in scores[1:] if math.isfinite(score.log_likelihood)]
    if not usable:
        raise InputError(
            "`temper` auto: no lambda gives a network whose log-likelihood is finite; look at the sites' verdicts"
        )
    return max(usable, key=lambda score: score.log_likelihood).temper, scores


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
        Samples per sub-volume.
    at_most : int
        Maximum number of sub-volumes; where there are more, `seed` draws them.
    seed : int
        Also seeds the noise: two networks with the same seed see the same noise.
    """
    sums, n_voxels, dice = _scored(network, data, n_samples, at_most, seed, torch.device(device))
    log_likelihood = 0.0
    for value in sums:
        log_likelihood += value
    return log_likelihood / n_voxels, dice


@dataclass(frozen=True)
class LeftOut:
    """What the organization's held-out scans say about one site.

    Attributes
    ----------
    site : str
        Its name.
    log_likelihood : float
        Per voxel (nats), of the consolidation without it.
    gain : float
        The same less that of all sites: above 0, the scans are likelier without the site.
    standard_error : float
        Of the gain, over the sub-volumes; NaN with one. Neighbouring sub-volumes are alike, so it is rather too small.
    """

    site: str
    log_likelihood: float
    gain: float
    standard_error: float

    def __str__(self) -> str:
        """In plain words; a gain within two standard errors of 0 is no clear difference."""
        verdict = "better" if self.gain > 0 else "worse"
        if not abs(self.gain) > 2 * self.standard_error:
            verdict = "no clear difference"
        error = "unknown with one sub-volume" if math.isnan(self.standard_error) else f"{self.standard_error:.5f}"
        return (
            f"log-likelihood {self.log_likelihood:.5f} without {self.site}: {verdict} without it "
            f"({self.gain:+.5f}, standard error {error})"
        )


def score_left_out(
    consolidation: Consolidation,
    sites: Iterable[Posterior],
    data: SubVolumes,
    *,
    n_samples: int = 10,
    at_most: int = 256,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[LeftOut]:
    """Score the consolidation without each of these sites, on the same sub-volumes with the same noise."""

    def scores(posterior: Posterior) -> tuple[Tensor, float]:
        return score_sub_volumes(posterior, data, n_samples=n_samples, at_most=at_most, seed=seed, device=device)

    with_all, n_voxels = scores(consolidation.posterior())
    for site, rest in consolidation.leave_one_out(sites):
        without, _ = scores(rest)
        yield LeftOut(site.name, without.mean().item() / n_voxels, *gain(without, with_all, n_voxels))


def score_sub_volumes(
    posterior: Posterior,
    data: SubVolumes,
    *,
    n_samples: int = 10,
    at_most: int = 256,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, float]:
    """Log-likelihood of each sub-volume, summed over its voxels (nats, fp64), and the number of voxels in one.

    See `score_network` for the parameters.
    """
    network = MeshNet.from_posterior(posterior)
    sums, n_voxels, _ = _scored(network, data, n_samples, at_most, seed, torch.device(device))
    return torch.tensor(sums, dtype=torch.float64), n_voxels / len(sums)


def gain(after: Tensor, before: Tensor, n_voxels: float) -> tuple[float, float]:
    """Mean gain per voxel from the scores of one network to another's, and its standard error; NaN with one sub-volume.

    Neighbouring sub-volumes are alike, so the error is rather too small.
    """
    gains = (after - before) / n_voxels
    error = gains.std().item() / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
    return gains.mean().item(), error


@torch.inference_mode()
def _scored(
    network: MeshNet, data: SubVolumes, n_samples: int, at_most: int, seed: int, device: torch.device
) -> tuple[list[float], int, float | None]:
    """Summed log-likelihood of each sub-volume (nats), number of all voxels, and mean Dice."""
    network = network.to(device)
    n_classes = network.architecture["n_classes"]
    sums, n_voxels = [], 0
    confusion = torch.zeros(n_classes, n_classes, dtype=torch.int64)
    weights = [network.convolutions(seed_of(seed, 0, k)) for k in range(n_samples)]  # as `predict_volume` draws them
    for image, truth, block in blocks_of(data, draw_sub_volumes(len(data), at_most, seed), device):
        samples = [block_logits(network, image, block, drawn).log_softmax(dim=-1) for drawn in weights]
        log_probability = torch.stack(samples).logsumexp(dim=0) - math.log(n_samples)  # of the mean
        sums.append(log_probability.gather(-1, truth[..., None]).sum(dtype=torch.float64).item())
        n_voxels += truth.numel()
        confusion += confusion_matrix(truth.cpu(), log_probability.argmax(dim=-1).cpu(), n_classes)
    return sums, n_voxels, mean_dice(confusion, with_background=False)


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
