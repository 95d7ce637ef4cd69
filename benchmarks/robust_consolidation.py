"""What bad sites do to the consolidated network under several rules: `python -m benchmarks.robust_consolidation`.

Simulated sites train from one prior; then a share of them is replaced by bad ones of one kind, and every rule combines
them. Printed are Dice and log-likelihood per voxel on scans of honest sites, means over the seeds, and how often bad
and honest sites are warned of. Networks and scores are kept in the output folder: a second call goes on where the first
one stopped.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from dwc.base.files import write_whole
from dwc.data.cache import prepare
from dwc.data.grid import Grid
from dwc.data.labels import LabelMap
from dwc.data.manifest import read_manifest
from dwc.influence import limit_powers, measure, warnings_about
from dwc.meshnet import MeshNet
from dwc.posterior import Posterior
from dwc.simulation.scans import load_sites, write_site
from dwc.tempering import score_network
from dwc.training.loop import train_network
from dwc.training.settings import TrainSettings

N_SITES = 5
GRID = Grid(32, 6.0)
COLUMNS = ["bad", "kind", "rule", "dice", "log_likelihood"]
Shifts = dict[str, tuple[Tensor, Tensor]]  # per tensor, of all sites: natural-parameter shifts [S, ...], fp64


def main() -> None:
    """Train or reuse the networks, score what is not scored yet, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("robust-consolidation"))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for seed in range(arguments.seeds):
        _score_seed(arguments.out / f"seed-{seed}", seed, arguments.steps)
    files = [arguments.out / f"seed-{seed}" / "scores.csv" for seed in range(arguments.seeds)]
    scores = pd.concat([pd.read_csv(file, keep_default_na=False) for file in files], keys=range(len(files)))
    print(f"Dice / log-likelihood per voxel (nats), mean of {len(files)} seeds, lambda 1/{N_SITES}")
    print(_table(scores))
    print("standard deviation between seeds of the difference from Eq. 17 without bad sites, in the same units")
    print(_spread(scores))
    print("warned of, of all sites of the kind and of the honest ones beside them")
    print(_warned(arguments.out, arguments.seeds))


def _score_seed(out: Path, seed: int, steps: int) -> None:
    """Score every kind under every rule and add the rows to `scores.csv`."""
    manifests = [_scans(out, number, seed) for number in range(N_SITES + 1)]
    prior, sites = _networks(out, manifests, steps, seed)
    scans = [scan for path in manifests[1:] for scan in read_manifest(path) if scan.split == "test"]
    held_out = prepare(scans, LabelMap.load("coarse"), GRID, out / "cache", progress=False)
    path = out / "scores.csv"
    done = pd.read_csv(path, keep_default_na=False) if path.exists() else pd.DataFrame(columns=COLUMNS)
    known = set(zip(done["bad"], done["kind"], done["rule"], strict=True))
    cases = [(0, "prior", "prior"), *((n_bad, kind, rule) for n_bad, kind in _mixes() for rule in RULES)]
    for n_bad, kind, rule in cases:
        if (n_bad, kind, rule) in known:
            continue
        mixed = prior if kind == "prior" else _combined(prior, _mixed(prior, sites, n_bad, kind), RULES[rule])
        log_likelihood, dice = score_network(MeshNet.from_posterior(mixed), held_out, n_samples=5)
        done.loc[len(done)] = [n_bad, kind, rule, dice or 0.0, log_likelihood]
        write_whole(path, done.to_csv(index=False).encode())


def _mixes() -> list[tuple[int, str]]:
    """Numbers and kinds of bad sites."""
    return [(0, "none"), *((n_bad, kind) for n_bad in (1, 2) for kind in KINDS)]


def _mixed(prior: Posterior, sites: list[Posterior], n_bad: int, kind: str) -> list[Posterior]:
    """All sites, the first `n_bad` of them bad; copies are of the last site."""
    copied = kind.startswith("copies")
    bad = [KINDS[kind](prior, sites[-1] if copied else sites[s], s) for s in range(n_bad)]
    return [*bad, *sites[n_bad:]]


def _table(scores: pd.DataFrame) -> str:
    """Means over the seeds."""
    means = scores.groupby(["bad", "kind", "rule"])[["dice", "log_likelihood"]].mean()
    return _rows(means)


def _spread(scores: pd.DataFrame) -> str:
    """Standard deviations over the seeds, each seed against its own result without bad sites."""
    values = scores.set_index(["bad", "kind", "rule"], append=True).droplevel(1)[["dice", "log_likelihood"]]
    clean = values.xs((0, "none", "Eq. 17"), level=("bad", "kind", "rule"))
    difference = values.sub(clean, level=0)
    return _rows(difference.groupby(level=["bad", "kind", "rule"]).std())


def _rows(values: pd.DataFrame) -> str:
    def cell(case: tuple[int, str, str]) -> str:
        dice, log_likelihood = values.loc[case]
        return f"{dice:.3f} / " + (f"{log_likelihood:.3f}" if abs(log_likelihood) < 1e4 else f"{log_likelihood:.0e}")

    lines = [f"prior: {cell((0, 'prior', 'prior'))}", "| bad sites | kind | " + " | ".join(RULES) + " |"]
    lines.append("| --- " * (2 + len(RULES)) + "|")
    for n_bad, kind in _mixes():
        cells = " | ".join(cell((n_bad, kind, rule)) for rule in RULES)
        lines.append(f"| {100 * n_bad // N_SITES} % | {kind} | {cells} |")
    return "\n".join(lines)


def _warned(out: Path, n_seeds: int) -> str:
    """How many bad and honest sites are warned of, over all seeds."""
    lines = ["| bad sites | kind | bad, warned of | honest, warned of |", "| --- " * 4 + "|"]
    for n_bad, kind in _mixes():
        found: dict[bool, list[bool]] = {True: [], False: []}
        for seed in range(n_seeds):
            prior, sites = _kept(out / f"seed-{seed}")
            influences = {str(s): measure(site, prior) for s, site in enumerate(_mixed(prior, sites, n_bad, kind))}
            warned = warnings_about(influences)
            for s, name in enumerate(influences):
                found[s < n_bad].append(name in warned)
        cells = [f"{sum(found[bad])} of {len(found[bad])}" for bad in (True, False)]
        lines.append(f"| {100 * n_bad // N_SITES} % | {kind} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def _kept(out: Path) -> tuple[Posterior, list[Posterior]]:
    """The networks that an earlier call has trained."""
    folders = [f"site-{n}" for n in range(1, N_SITES + 1)]
    prior, *sites = (Posterior.load(out / folder / "posterior.safetensors") for folder in ("vi", *folders))
    return prior, sites


def _scans(out: Path, number: int, seed: int) -> Path:
    """The manifest of the organization (0) or of a site, with two scans to train on and one to score."""
    kinds = list(load_sites())
    folder = out / "scans" / str(number)
    if (folder / "manifest.csv").exists():
        return folder / "manifest.csv"
    return write_site(folder, kinds[number % len(kinds)], 2, 1, grid=GRID, seed=100 * seed + 10 + number)


def _networks(out: Path, manifests: list[Path], steps: int, seed: int) -> tuple[Posterior, list[Posterior]]:
    base = TrainSettings(
        mode="map", data=manifests[0], out=out / "map", label_map="coarse", grid_size=32, voxel_size=6.0, width=6,
        dilations=(1, 2), lr=1e-2, batch_size=2, epochs=1, steps_per_epoch=steps, device="cpu", cache_dir=out / "cache",
        seed=seed,
    )  # fmt: skip
    start = replace(base, mode="vi", init=out / "map" / "posterior.safetensors", out=out / "vi", rho_lr=3e-2)
    prior_file = out / "vi" / "posterior.safetensors"
    shared: dict[str, Any] = {
        "label_map": None,
        "grid_size": None,
        "voxel_size": None,
        "width": None,
        "dilations": None,
    }
    _trained(base)
    _trained(start)
    vcl = replace(base, mode="vcl", prior=prior_file, rho_lr=3e-2, **shared)
    for n, data in enumerate(manifests[1:], 1):
        _trained(replace(vcl, data=data, out=out / f"site-{n}", stream=n))
    return _kept(out)


def _trained(settings: TrainSettings) -> None:
    if not (settings.out / "posterior.safetensors").exists():
        train_network(settings, resume=settings.out.exists())


def _changed(prior: Posterior, site: Posterior, mu: Callable[[Tensor], Tensor], sigma: float) -> Posterior:
    """A site whose shifts (in sigma_0) and sigmas are changed."""
    means = {
        name: prior.mu[name] + prior.sigma[name] * mu((site.mu[name] - prior.mu[name]) / prior.sigma[name])
        for name in prior.mu
    }
    sigmas = {name: (sigma * width).clamp(min=1e-30) for name, width in site.sigma.items()}
    return Posterior(means, sigmas, site.metadata, name=site.name)


def _noise(scale: float, seed: int) -> Callable[[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda shift: scale * torch.randn(shift.shape, generator=generator)


def _noisy_copy(scale: float) -> Callable[[Posterior, Posterior, int], Posterior]:
    """A copy with noise on its means and other sigmas, so that it shares no tensor with its original."""

    def copy(prior: Posterior, site: Posterior, seed: int) -> Posterior:
        noise = _noise(scale, seed)
        return _changed(prior, site, lambda shift: shift + noise(shift), 0.99 - 0.01 * seed)

    return copy


KINDS: dict[str, Callable[[Posterior, Posterior, int], Posterior]] = {
    "sure: sigma x 1e-8": lambda prior, site, seed: _changed(prior, site, lambda shift: shift, 1e-8),
    "far: shifts x 1e6": lambda prior, site, seed: _changed(prior, site, lambda shift: 1e6 * shift, 1.0),
    "flipped: shifts x -1": lambda prior, site, seed: _changed(prior, site, lambda shift: -shift, 1.0),
    "flipped, x -2": lambda prior, site, seed: _changed(prior, site, lambda shift: -2 * shift, 1.0),
    "noise of 3 sigma_0": lambda prior, site, seed: _changed(prior, site, _noise(3.0, seed), 1.0),
    "noise, sigma x 0.3": lambda prior, site, seed: _changed(prior, site, _noise(3.0, seed), 0.3),
    "copies": lambda prior, site, seed: _changed(prior, site, lambda shift: shift, 1.0),
    "copies + noise of 0.3 sigma_0": _noisy_copy(0.3),
    "copies + noise of 1 sigma_0": _noisy_copy(1.0),
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
    """Powers under a limit of each site's influence."""
    return lambda prior, sites: torch.tensor(limit_powers([measure(s, prior) for s in sites], multiple)).double()


def _clipped(shift: Tensor) -> Tensor:
    """Coordinate by coordinate, no further than three robust standard deviations from the median site."""
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
    """prior + 1/S times the shifts as the rule combines them; means are shifts relative to the prior's mean."""
    weights = rule(prior, sites) if rule not in (_clipped, _median) else None
    mu, sigma = {}, {}
    for name, (eta_1, eta_2) in _shifts(prior, sites).items():
        ours = prior.sigma[name].double().pow(-2)
        # Relative to the prior's mean, so that a coordinate's two parameters are combined on one scale.
        pull = eta_1 - prior.mu[name].double() * eta_2
        if weights is None:
            pull, added = rule(pull), rule(eta_2)
        else:
            shape = (-1,) + (1,) * (pull.dim() - 1)
            pull, added = (weights.view(shape) * pull).sum(dim=0), (weights.view(shape) * eta_2).sum(dim=0)
        precision = ours + added / len(sites)
        mu[name], sigma[name] = prior.mu[name].double() + pull / len(sites) / precision, precision.rsqrt()
    return Posterior(mu, {n: s.clamp(min=1e-30) for n, s in sigma.items()}, prior.metadata)


if __name__ == "__main__":
    main()
