"""What a study will cost before it is run: what there is to train and to score, and about how long that takes here.

Times come from a few steps on noise, taken now, with the network of the study. They are estimates for the machine as it
is now; nothing in a study depends on them.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dwc.data.labels import LabelMap
from dwc.data.subvolumes import SIDE
from dwc.experiment.networks import Network, Networks
from dwc.experiment.scoring import Row
from dwc.experiment.sites import held_out_scans
from dwc.experiment.study import ALL_SITES, StudySettings
from dwc.meshnet import MeshNet
from dwc.objective import Objective, negative_log_prior
from dwc.runtime import choose_device

__all__ = ["Forecast", "forecast"]

_PATIENCE = 5.0  # s for the steps that are measured
_AT_MOST = 3  # of them, after one that warms up


@dataclass(frozen=True)
class Forecast:
    """What is left to do.

    Attributes
    ----------
    steps : dict of Network to int
        Steps left of each trained network that the rows need, parents first; 0 where it is done.
    n_volumes, n_rows : int
        Held-out volumes, and rows to score on them.
    training, scoring : float
        Estimated seconds.
    basis : str
        Where the estimate comes from.
    """

    steps: dict[Network, int]
    n_volumes: int
    n_rows: int
    training: float
    scoring: float
    basis: str

    def lines(self, *, each: bool) -> str:
        """For people; with a line for each network, or without."""
        left = {network.name: f"{steps} steps" if steps else "done" for network, steps in self.steps.items()}
        listed = [f"  {name:<24}{steps:>14}" for name, steps in left.items()] if each else []
        n_left = sum(map(bool, self.steps.values()))
        return "\n".join(
            (
                *listed,
                f"to train: {n_left} of {len(left)} networks, {sum(self.steps.values())} steps, {_span(self.training)}",
                f"to score: up to {self.n_rows} rows on {self.n_volumes} volumes, {_span(self.scoring)}",
                f"in all {_span(self.training + self.scoring)}, estimated from {self.basis}",
            )
        )


def forecast(settings: StudySettings, manifests: Mapping[str, Path], rows: Sequence[Row]) -> Forecast:
    """What of the rows is left to train and to score, and how long it might take. Writes nothing.

    Parameters
    ----------
    settings : StudySettings
        The study.
    manifests : mapping of str to Path
        By the name of the site; those of sites that are not simulated yet are missing files.
    rows : sequence of Row
        The rows to train and score; all count as not yet scored.
    """
    networks = Networks(settings, manifests)
    device = choose_device(settings.device)
    steps = {network: _steps_left(networks, network) for network in networks.needed(
        network for row in rows for network in row.networks) if network.is_trained}  # fmt: skip
    n_volumes = sum(
        len(held_out_scans(settings, site, manifests[site])) if manifests[site].exists() else settings.n_test[site]
        for site in ALL_SITES
    )
    seconds = {bayesian: _measure(settings, bayesian, device) for bayesian in (False, True)}
    training = sum(n * seconds[network.mode != "map"][0] for network, n in steps.items())
    predictions = sum(
        (settings.n_samples if bayesian else 1) * seconds[bayesian][1]
        for row in rows
        for bayesian in (network.mode not in ("map", "average") for network in row.networks)
    )
    scoring = predictions * n_volumes * (settings.grid_size // SIDE) ** 3
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    basis = f"{seconds[False][0]:.2g} s per MAP step and {seconds[True][0]:.2g} s per variational step, tried just now"
    return Forecast(steps, n_volumes, len(rows), training, scoring, f"{basis} on {where} of {os.cpu_count()}")


def _steps_left(networks: Networks, network: Network) -> int:
    """Steps that a network still needs, by its folder; all of them where scans that it depends on are not there yet."""
    steps = networks.stage(network).steps
    sites = {parent.site for parent in networks.needed([network]) if parent.is_trained}
    if not all(networks.manifests[site].exists() for site in sites):
        return steps
    return 0 if networks.is_done(network) else steps - networks.steps(network)


def _measure(settings: StudySettings, bayesian: bool, device: torch.device) -> tuple[float, float]:
    """Seconds of an optimizer step, and of predicting one sub-volume once."""
    batch = settings.batch_size if device.type == "cuda" else 1  # on a CPU time goes with the batch
    classes = LabelMap.load(settings.label_map).n_classes
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        network = MeshNet(classes, settings.width, settings.dilations, bayesian=bayesian).to(device)
        optimizer, objective = torch.optim.Adam(network.parameters()), Objective(1, SIDE**3)
        images = torch.randn(batch, 1, *[SIDE] * 3, device=device)
        labels = torch.zeros(batch, *[SIDE] * 3, dtype=torch.int64, device=device)

        def step() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                logits = network.train()(images)
            penalty = network.kl_loss() if bayesian else negative_log_prior(network)
            optimizer.zero_grad()
            objective(logits, labels, penalty)[0].backward()
            optimizer.step()

        @torch.inference_mode()
        def predict() -> None:
            network.eval()(images, sample=bayesian)

        return _seconds(step, device) * settings.batch_size / batch, _seconds(predict, device) / batch


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    """The shortest of a few calls: the first warms up, and others may be held up by what else runs."""
    taken: list[float] = []
    while len(taken) <= _AT_MOST and sum(taken) < _PATIENCE:
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - began)
    return min(taken)


def _span(seconds: float) -> str:
    """Seconds in the unit that a person would use."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"about {seconds / length:.1f} {unit}"
    return f"about {seconds:.0f} s"
