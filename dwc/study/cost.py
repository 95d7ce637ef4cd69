"""Estimate the cost of a study before it runs: the work left, and its time, from a few steps timed on noise."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dwc.data.constants import SIDE
from dwc.meshnet import MeshNet
from dwc.study.context import Study
from dwc.study.graph import Network, with_parents
from dwc.study.networks import Networks
from dwc.study.scoring import Row, Scores
from dwc.training.objective import Objective
from dwc.training.step import Optimization, logits_of

__all__ = ["Left", "estimate", "what_is_left"]

_PATIENCE = 5.0  # s for all timed calls
_AT_MOST = 3  # timed calls, after a warm-up
# On a CPU, time batches of two and scale up, because a step of a wide network may take minutes. Batches of one would
# mislead: PyTorch uses a slow convolution for them in narrow networks.
_CPU_BATCH = 2


@dataclass(frozen=True)
class Left:
    """The remaining work of a study."""

    steps: dict[Network, int]  # left of each trained network, parents first; 0 if done
    n_rows: int  # not yet scored everywhere
    predictions: dict[bool, int]  # of one volume by one network: deterministic (False), Bayesian (True)

    def lines(self, *, each: bool) -> str:
        """A printable summary; with `each`, one line per network too."""
        left = {network.name: f"{steps} steps" if steps else "done" for network, steps in self.steps.items()}
        listed = [f"  {name:<24}{steps:>14}" for name, steps in left.items()] if each else []
        n_left, n_predictions = sum(map(bool, self.steps.values())), sum(self.predictions.values())
        return "\n".join(
            (
                *listed,
                f"to train: {n_left} of {len(left)} networks, {sum(self.steps.values())} steps",
                f"to score: {self.n_rows} rows, {n_predictions} predictions of a volume by a network",
            )
        )


def what_is_left(networks: Networks, needed: Sequence[Network], rows: Sequence[Row]) -> Left:
    """The remaining work, with all networks to be made given parents first; writes nothing, needs no scans yet."""
    study = networks.study
    sites = study.settings.all_sites
    there = {site: study.manifests[site].exists() for site in sites}
    n_volumes = {
        site: len(study.held_out_scans(site)) if there[site] else study.settings.n_scans(site)[1] for site in sites
    }
    scores = Scores(networks, {site: study.held_out(site) for site in sites if study.is_prepared(site)})
    n_rows, predictions = 0, {False: 0, True: 0}
    for row in rows:
        n_left = sum(n_volumes[site] for site in _sites_left(scores, row))
        n_rows += bool(n_left)
        for network in row.networks:
            predictions[network.mode not in ("map", "average")] += n_left
    steps = {network: _steps_left(networks, network) for network in needed if network.is_trained}
    return Left(steps, n_rows, predictions)


def estimate(study: Study, left: Left) -> str:
    """The estimated time as a printable sentence; times optimizer steps and predictions now."""
    steps = {bayesian: sum(n for network, n in left.steps.items() if (network.mode != "map") == bayesian)
             for bayesian in (False, True)}  # fmt: skip
    seconds = {kind: _measure(study, kind) for kind in steps if steps[kind] or left.predictions[kind]}
    if not seconds:
        return "nothing is left to train or to score"
    training = sum(steps[kind] * step for kind, (step, _) in seconds.items())
    passes = {False: 1, True: study.settings.n_samples}
    n_cubes = (study.grid.size // SIDE) ** 3
    scoring = sum(left.predictions[kind] * n_cubes * passes[kind] * once for kind, (_, once) in seconds.items())
    on_gpu = study.device.type == "cuda"
    threads = f"{torch.get_num_threads()} CPU threads of {os.cpu_count()}"
    where = torch.cuda.get_device_name(study.device) if on_gpu else threads
    names = {False: "MAP", True: "variational"}
    basis = " and ".join(f"{step:.2g} s per {names[kind]} step" for kind, (step, _) in seconds.items())
    return (
        f"training {_span(training)}, scoring {_span(scoring)}, estimated from {basis}, measured just now on {where}; "
        "simulating and conforming scans, validation and figures are not included"
    )


def _steps_left(networks: Networks, network: Network) -> int:
    """Steps that a network still needs; all of them if scans it depends on do not exist yet."""
    steps = networks.stage(network).steps
    if not _has_its_scans(networks, [network]):
        return steps
    return 0 if networks.is_done(network) else steps - networks.steps(network)


def _sites_left(scores: Scores, row: Row) -> list[str]:
    """Sites where a row is not scored, or whose scans do not exist or are not prepared yet."""
    sites = scores.study.settings.all_sites
    if not _has_its_scans(scores.networks, row.networks):
        return list(sites)
    missing = scores.missing(row)
    return [site for site in sites if site in missing or site not in scores.sites]


def _has_its_scans(networks: Networks, of: Sequence[Network]) -> bool:
    sites = {network.site for network in with_parents(of) if network.site is not None}
    return all(networks.study.manifests[site].exists() for site in sites)


def _measure(study: Study, bayesian: bool) -> tuple[float, float]:
    """Seconds per optimizer step, and per prediction of one sub-volume."""
    settings, device = study.settings, study.device
    batch = settings.batch_size if device.type == "cuda" else min(settings.batch_size, _CPU_BATCH)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        network = MeshNet(study.label_map.n_classes, settings.width, settings.dilations, bayesian=bayesian).to(device)
        stage = settings.vi if bayesian else settings.map
        optimization = Optimization(network, stage, Objective(1, SIDE**3), settings.precision)
        images = torch.randn(batch, 1, *[SIDE] * 3, device=device)
        labels = torch.zeros(batch, *[SIDE] * 3, dtype=torch.int64, device=device)

        def step() -> None:
            optimization.step(network, images, labels)

        @torch.inference_mode()
        def predict() -> None:
            logits_of(network.eval(), images, settings.precision, sample=bayesian)

        return _seconds(step, device) * settings.batch_size / batch, _seconds(predict, device) / batch


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    """The shortest of a few calls after a warm-up call; other processes may slow down any of them."""
    taken: list[float] = []
    while not taken[1:] or (len(taken) <= _AT_MOST and sum(taken) < _PATIENCE):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - began)
    return min(taken[1:])


def _span(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"about {seconds / length:.1f} {unit}"
    return f"about {seconds:.0f} s"
