"""What bad sites do to the consolidated network under several rules: `python -m benchmarks.robust_consolidation`.

Simulated sites train from one prior; a share of them is replaced by bad ones, and each rule combines them. Prints Dice
and log-likelihood per voxel on scans of honest sites. Takes minutes on a CPU; a second call reuses the networks.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dwc.data.cache import prepare
from dwc.data.dataset import SubVolumes
from dwc.data.grid import Grid
from dwc.data.labels import LabelMap
from dwc.data.manifest import read_manifest
from dwc.influence import limit_powers, measure
from dwc.meshnet import MeshNet
from dwc.posterior import Posterior
from dwc.simulation.scans import load_sites, write_site
from dwc.tempering import score_network
from dwc.training.loop import train_network
from dwc.training.settings import TrainSettings

N_SITES = 5
GRID = Grid(32, 6.0)
Shifts = dict[str, tuple[Tensor, Tensor]]  # per tensor: natural-parameter shifts of all sites [S, ...], fp64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("robust-consolidation"))
    parser.add_argument("--steps", type=int, default=150)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    manifests = [_scans(arguments.out, number) for number in range(N_SITES + 1)]
    prior, sites = _networks(arguments.out, manifests, arguments.steps)
    scans = [scan for path in manifests[1:] for scan in read_manifest(path) if scan.split == "test"]
    held_out = prepare(scans, LabelMap.load("coarse"), GRID, arguments.out / "cache", progress=False)
    print(f"prior: {_score(prior, held_out)}; cells are Dice / log-likelihood per voxel (nats), lambda 1/{N_SITES}")
    print("| bad sites | kind | " + " | ".join(RULES) + " |")
    print("| --- " * (2 + len(RULES)) + "|")
    for n_bad in (0, 1, 2):
        kinds = KINDS if n_bad else {"none": lambda prior, site, seed: site}
        for kind, spoil in kinds.items():
            all_sites = [spoil(prior, sites[s], s) if s < n_bad else sites[s] for s in range(N_SITES)]
            if kind == "copies" and n_bad:
                all_sites[:n_bad] = [spoil(prior, sites[-1], s) for s in range(n_bad)]
            cells = [_score(_combined(prior, all_sites, rule), held_out) for rule in RULES.values()]
            print(f"| {100 * n_bad // N_SITES} % | {kind} | " + " | ".join(cells) + " |", flush=True)


def _scans(out: Path, number: int) -> Path:
    """The manifest of the organization (0) or of a site: two training scans and one held-out scan."""
    kinds = list(load_sites())
    folder = out / "scans" / str(number)
    if (folder / "manifest.csv").exists():
        return folder / "manifest.csv"
    return write_site(folder, kinds[number % len(kinds)], 2, 1, grid=GRID, seed=10 + number)


def _networks(out: Path, manifests: list[Path], steps: int) -> tuple[Posterior, list[Posterior]]:
    base = TrainSettings(
        mode="map", data=manifests[0], out=out / "map", label_map="coarse", grid_size=32, voxel_size=6.0, width=6,
        dilations=(1, 2), lr=1e-2, batch_size=2, epochs=1, steps_per_epoch=steps, device="cpu", cache_dir=out / "cache",
    )  # fmt: skip
    start = replace(base, mode="vi", init=out / "map" / "posterior.safetensors", out=out / "vi", rho_lr=3e-2)
    prior_file = out / "vi" / "posterior.safetensors"
    shared = {"label_map": None, "grid_size": None, "voxel_size": None, "width": None, "dilations": None}
    _trained(base)
    prior = _trained(start)
    sites = [
        replace(base, mode="vcl", prior=prior_file, data=data, out=out / f"site-{n}", stream=n, rho_lr=3e-2, **shared)
        for n, data in enumerate(manifests[1:], 1)
    ]
    return prior, [_trained(site) for site in sites]


def _trained(settings: TrainSettings) -> Posterior:
    path = settings.out / "posterior.safetensors"
    return Posterior.load(path) if path.exists() else train_network(settings)


def _changed(prior: Posterior, site: Posterior, mu: Callable[[Tensor], Tensor], sigma: float) -> Posterior:
    """A site with changed shifts (in units of sigma_0) and scaled sigmas."""
    means = {
        name: prior.mu[name] + prior.sigma[name] * mu((site.mu[name] - prior.mu[name]) / prior.sigma[name])
        for name in prior.mu
    }
    sigmas = {name: (sigma * width).clamp(min=1e-30) for name, width in site.sigma.items()}
    return Posterior(means, sigmas, site.metadata, name=site.name)


def _noise(scale: float, seed: int) -> Callable[[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda shift: scale * torch.randn(shift.shape, generator=generator)


KINDS: dict[str, Callable[[Posterior, Posterior, int], Posterior]] = {
    "sure: sigma x 1e-8": lambda prior, site, seed: _changed(prior, site, lambda shift: shift, 1e-8),
    "far: shifts x 1e6": lambda prior, site, seed: _changed(prior, site, lambda shift: 1e6 * shift, 1.0),
    "flipped: shifts x -1": lambda prior, site, seed: _changed(prior, site, lambda shift: -shift, 1.0),
    "flipped, x -2": lambda prior, site, seed: _changed(prior, site, lambda shift: -2 * shift, 1.0),
    "noise of 3 sigma_0": lambda prior, site, seed: _changed(prior, site, _noise(3.0, seed), 1.0),
    "noise, sigma x 0.3": lambda prior, site, seed: _changed(prior, site, _noise(3.0, seed), 0.3),
    "copies": lambda prior, site, seed: _changed(prior, site, lambda shift: shift + 1e-4 * seed, 1.0),
}


def _shifts(prior: Posterior, sites: list[Posterior]) -> Shifts:
    shifts = {}
    for name in prior.mu:
        ours = prior.sigma[name].double().pow(-2)
        theirs = torch.stack([site.sigma[name].double().pow(-2) for site in sites])
        means = torch.stack([site.mu[name].double() for site in sites])
        shifts[name] = means * theirs - prior.mu[name].double() * ours, theirs - ours
    return shifts


def _equation_17(prior: Posterior, sites: list[Posterior]) -> Tensor:
    return torch.ones(len(sites), dtype=torch.float64)


def _limited(multiple: float) -> Callable[[Posterior, list[Posterior]], Tensor]:
    """Powers that limit each site's influence."""
    return lambda prior, sites: torch.tensor(limit_powers([measure(s, prior) for s in sites], multiple)).double()


def _clipped(shift: Tensor) -> Tensor:
    """Each coordinate clipped to within three robust standard deviations of the median site."""
    median = shift.quantile(0.5, dim=0)
    spread = 3 * 1.4826 * (shift - median).abs().quantile(0.5, dim=0)
    return torch.minimum(torch.maximum(shift, median - spread), median + spread).sum(dim=0)


def _median(shift: Tensor) -> Tensor:
    return len(shift) * shift.quantile(0.5, dim=0)


RULES: dict[str, Callable] = {
    "Eq. 17": _equation_17,
    "limit 3": _limited(3.0),
    "limit 1.5": _limited(1.5),
    "clipped": _clipped,
    "median": _median,
}


def _combined(prior: Posterior, sites: list[Posterior], rule: Callable) -> Posterior:
    """The prior plus 1/S times the combined shifts."""
    weights = rule(prior, sites) if rule not in (_clipped, _median) else None
    mu, sigma = {}, {}
    for name, (eta_1, eta_2) in _shifts(prior, sites).items():
        ours = prior.sigma[name].double().pow(-2)
        # Relative to the prior's mean, so that both natural parameters of a coordinate have the same scale.
        pull = eta_1 - prior.mu[name].double() * eta_2
        if weights is None:
            pull, added = rule(pull), rule(eta_2)
        else:
            shape = (-1,) + (1,) * (pull.dim() - 1)
            pull, added = (weights.view(shape) * pull).sum(dim=0), (weights.view(shape) * eta_2).sum(dim=0)
        precision = ours + added / len(sites)
        mu[name], sigma[name] = prior.mu[name].double() + pull / len(sites) / precision, precision.rsqrt()
    return Posterior(mu, {n: s.clamp(min=1e-30) for n, s in sigma.items()}, prior.metadata)


def _score(posterior: Posterior, data: SubVolumes) -> str:
    log_likelihood, dice = score_network(MeshNet.from_posterior(posterior), data, n_samples=5)
    return f"{dice or 0:.3f} / {log_likelihood:.3f}"


if __name__ == "__main__":
    main()
