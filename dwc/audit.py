"""Membership inference: can it be told from a posterior which scans it was trained on?

Every scan of the site, used for training or held out, gets a score: the log-likelihood of its labels (loss threshold),
or how much more likely the posterior makes them than reference networks do that never saw the scan (likelihood ratio).
If the scores of both groups do not differ, the posterior does not give its training scans away to this attack.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from dwc.base.errors import InputError
from dwc.data.cache import prepare
from dwc.data.dataset import SubVolumes
from dwc.evaluation import scans_to_score
from dwc.meshnet import MeshNet
from dwc.prediction import Ensemble, block_logits, blocks_of
from dwc.training.validation import draw_sub_volumes

__all__ = ["attack", "auc_interval", "audit_posterior", "scan_log_likelihoods", "wilson_interval"]

_Z = 1.959964  # of a two-sided 95 % interval
_FALSE_POSITIVES = 0.01


def audit_posterior(
    networks: Ensemble, manifest: Path, cache_dir: Path, sub_volumes: int, seed: int, device: torch.device
) -> str:
    """Attack the first network of an ensemble, with the others as references; a report for people."""
    split = networks.posteriors[:1]
    groups = []
    for part in ("train", "test"):
        scans = scans_to_score(manifest, split, split=part)
        if len(scans) < 2:
            raise InputError(f"{manifest}: has {len(scans)} {part} scans; an audit needs two of each at least")
        where = networks.label_map, networks.grid, cache_dir
        data = prepare(scans, *where, intensity=networks.intensity)
        groups.append([scan_log_likelihoods(network, data, sub_volumes, seed, device) for network in networks.networks])
    members, others = groups
    lines = [f"{networks.posteriors[0].name}: {len(members[0])} training scans, {len(others[0])} held out"]
    lines += _report("loss threshold", members[0], others[0])
    if len(networks.networks) > 1:
        lines += _report("likelihood ratio", _ratios(members), _ratios(others))
    lines.append("AUC 0.5 and a true-positive rate of 0.01 mean that the attack learns nothing")
    return "\n".join(lines)


@torch.inference_mode()
def scan_log_likelihoods(
    network: MeshNet, data: SubVolumes, sub_volumes: int, seed: int, device: torch.device
) -> list[float]:
    """Mean log-likelihood per voxel (nats) of each scan's labels, with the weights at their means."""
    network = network.to(device).eval()
    per_volume, weights, scores = data.sub_volumes_per_volume, network.convolutions(), []
    for volume in range(data.n_volumes):
        chosen = [volume * per_volume + place for place in draw_sub_volumes(per_volume, sub_volumes, seed)]
        total = 0.0
        for image, truth, block in blocks_of(data, chosen, device):
            logits = block_logits(network, image, block, weights)
            total -= cross_entropy(logits.flatten(0, 2), truth.flatten()).item()
        scores.append(total / len(chosen))
    return scores


def attack(members: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """Area under the ROC curve, and true-positive rate at 1 % false positives, where high scores mark members."""
    wins = sum((m > o) + 0.5 * (m == o) for m in members for o in others)
    allowed = math.floor(_FALSE_POSITIVES * len(others))
    threshold = sorted(others, reverse=True)[allowed]
    return wins / (len(members) * len(others)), sum(m > threshold for m in members) / len(members)


def auc_interval(auc: float, n_members: int, n_others: int) -> tuple[float, float]:
    """95 % interval of an AUC: those values whose own standard error (Newcombe 2006, method 5) covers the estimate.

    Unlike the bootstrap it keeps its width where every member scores above every other scan.
    """
    extra = (n_members + n_others) / 2 - 1

    def covers(theta: float) -> bool:
        spread = 1 + extra * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return abs(auc - theta) <= _Z * math.sqrt(theta * (1 - theta) * spread / (n_members * n_others))

    return _edge(covers, auc, 0.0), _edge(covers, auc, 1.0)


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share of n."""
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n * n)) / (1 + _Z**2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def _edge(covers: Callable[[float], bool], inside: float, outside: float) -> float:
    """The last value from `inside` towards `outside` that is covered."""
    for _ in range(60):
        middle = (inside + outside) / 2
        if covers(middle):
            inside = middle
        else:
            outside = middle
    return inside


def _ratios(scores: list[list[float]]) -> list[float]:
    """Of each scan, the score under the first network less the mean score under the references."""
    own, *references = scores
    return [score - sum(others) / len(others) for score, others in zip(own, zip(*references, strict=True), strict=True)]


def _report(name: str, members: Sequence[float], others: Sequence[float]) -> list[str]:
    auc, rate = attack(members, others)
    low, high = auc_interval(auc, len(members), len(others))
    least, most = wilson_interval(rate, len(members))
    line = f"  {name}: AUC {auc:.3f} [{low:.3f}, {high:.3f}], true positives at 1 % false positives {rate:.3f} "
    line += f"[{least:.3f}, {most:.3f}]"
    if len(others) < 1 / _FALSE_POSITIVES:
        return [line, f"    with {len(others)} held-out scans, 1 % means none: the rate is a rough one"]
    return [line]
