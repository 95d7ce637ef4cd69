"""How often honest sites are limited or warned of, and bad ones that steer one weight: `benchmarks.honest_sites`.

Six simulated sites of one to six volumes train from one prior, for short and longer trainings. Then each of them in
turn is replaced by one that moves a single weight far and is sure of it, and the largest effect is searched that is
neither limited nor warned of. Networks are kept in the output folder: a second call goes on where the first stopped.
"""

import argparse
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median

import torch

from benchmarks.robust_consolidation import GRID, _trained
from dwc.consolidation import consolidate
from dwc.influence import limit_powers, measure, warnings_about
from dwc.posterior import Posterior
from dwc.simulation.scans import load_sites, write_site
from dwc.training.settings import TrainSettings

N_VOLUMES = (2, 1, 2, 3, 4, 6, 2)  # of the organization, then of the sites
STEERED = ((90.0, 0.1), (90.0, 1.0), (30.0, 0.1), (0.0, 0.03))  # shift and sigma of one weight, in sigma_0
SHIFTS, RATIOS = (
    (2.0, 5.0, 10.0, 20.0, 30.0, 50.0, 90.0),
    (1.0, 0.5, 0.3, 0.2, 0.1, 0.05),
)  # searched for what is unseen
LIMIT = 3.0


def main() -> None:
    """Train or reuse the networks, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("honest-sites"))
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 60, 150])
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| steps | sites | limited | warned of | largest multiple |", "| --- " * 5 + "|", sep="\n")
    steered = []
    for steps in arguments.steps:
        rounds = [_networks(arguments.out / f"seed-{seed}", seed, steps) for seed in range(arguments.seeds)]
        print(_honest_row(str(steps), rounds), flush=True)
        steered += rounds
    print("| one weight: shift, sigma | sites | limited | left out | warned of |", "| --- " * 5 + "|", sep="\n")
    for shift, ratio in STEERED:
        print(_steered_row(shift, ratio, steered), flush=True)
    unseen, honest = zip(*(_unseen(*one_round) for one_round in steered), strict=True)
    print(
        f"one weight of the result moved unseen by up to {max(unseen):.1f} sigma_0, median {median(unseen):.1f};",
        end=" ",
    )
    print(f"the furthest that an honest site moves one: up to {max(honest):.1f}, median {median(honest):.1f}")


def _honest_row(name: str, rounds: list[tuple[Posterior, list[Posterior]]]) -> str:
    limited = warned = n_sites = 0
    largest = 0.0
    for prior, sites in rounds:
        influences = [measure(site, prior) for site in sites]
        n_sites += len(sites)
        limited += sum(power < 1 for power in limit_powers(influences, LIMIT))
        warned += len(warnings_about({str(n): one for n, one in enumerate(influences)}))
        multiple = next(m / 10 for m in range(1, 1000) if min(limit_powers(influences, m / 10)) == 1)
        largest = max(largest, multiple)
    return f"| {name} | {n_sites} | {limited} | {warned} | {largest:.1f} |"


def _steered_row(shift: float, ratio: float, rounds: list[tuple[Posterior, list[Posterior]]]) -> str:
    """Each site in turn is the bad one, for the first and the middle weight of each tensor."""
    powers, warned = [], 0
    for prior, sites in rounds:
        honest = [measure(site, prior) for site in sites]
        for bad, site in enumerate(sites):
            for tensor, mu in prior.mu.items():
                for place in (0, mu.numel() // 2):
                    influences = list(honest)
                    influences[bad] = measure(_steering(site, prior, tensor, place, shift, ratio), prior)
                    powers.append(limit_powers(influences, LIMIT)[bad])
                    warned += str(bad) in warnings_about({str(n): one for n, one in enumerate(influences)})
    left_out, limited = sum(power == 0 for power in powers), sum(power < 1 for power in powers)
    return f"| {shift:g} sigma_0, {ratio:g} sigma_0 | {len(powers)} | {limited} | {left_out} | {warned} |"


def _unseen(prior: Posterior, sites: list[Posterior]) -> tuple[float, float]:
    """How far (in sigma_0) the second site moves a weight of the result unseen, and the furthest honest move."""
    honest = [measure(site, prior) for site in sites]
    before, most = consolidate(prior, sites), 0.0
    for tensor, (shift, ratio) in product(prior.mu, product(SHIFTS, RATIOS)):
        bad = _steering(sites[1], prior, tensor, 0, shift, ratio)
        influences = [honest[0], measure(bad, prior), *honest[2:]]
        warned = "1" in warnings_about({str(n): one for n, one in enumerate(influences)})
        if limit_powers(influences, LIMIT)[1] == 1 and not warned:
            after = consolidate(prior, [sites[0], bad, *sites[2:]])
            moved = (after.mu[tensor] - before.mu[tensor]).view(-1)[0] / prior.sigma[tensor].view(-1)[0]
            most = max(most, moved.item())
    return most, max(one.furthest for one in honest)


def _steering(site: Posterior, prior: Posterior, tensor: str, place: int, shift: float, ratio: float) -> Posterior:
    mu, sigma = ({name: part.clone() for name, part in parts.items()} for parts in (site.mu, site.sigma))
    width = prior.sigma[tensor].view(-1)[place]
    mu[tensor].view(-1)[place] = prior.mu[tensor].view(-1)[place] + shift * width
    sigma[tensor].view(-1)[place] = ratio * width
    return Posterior(mu, sigma, site.metadata)


def _networks(out: Path, seed: int, steps: int) -> tuple[Posterior, list[Posterior]]:
    """The organization's network and the sites', trained unless an earlier call has."""
    manifests = [_scans(out, number, seed) for number in range(len(N_VOLUMES))]
    base = TrainSettings(
        mode="map", data=manifests[0], out=out / "map", label_map="coarse", grid_size=32, voxel_size=6.0, width=6,
        dilations=(1, 2), lr=1e-2, batch_size=2, epochs=1, steps_per_epoch=150, device="cpu", cache_dir=out / "cache",
        seed=seed,
    )  # fmt: skip
    prior_file = out / "vi" / "posterior.safetensors"
    _trained(base)
    _trained(replace(base, mode="vi", init=out / "map" / "posterior.safetensors", out=out / "vi", rho_lr=3e-2))
    vcl = replace(
        base, mode="vcl", prior=prior_file, rho_lr=3e-2, steps_per_epoch=steps, label_map=None, grid_size=None,
        voxel_size=None, width=None, dilations=None,
    )  # fmt: skip
    folders = [out / f"steps-{steps}" / f"site-{number}" for number in range(1, len(N_VOLUMES))]
    for number, folder in enumerate(folders, 1):
        _trained(replace(vcl, data=manifests[number], out=folder, stream=number))
    return Posterior.load(prior_file), [Posterior.load(folder / "posterior.safetensors") for folder in folders]


def _scans(out: Path, number: int, seed: int) -> Path:
    folder, kinds = out / "scans" / str(number), list(load_sites())
    if (folder / "manifest.csv").exists():
        return folder / "manifest.csv"
    kind = kinds[number % len(kinds)]
    return write_site(folder, kind, N_VOLUMES[number], 1, grid=GRID, seed=100 * seed + 10 + number)


if __name__ == "__main__":
    main()
