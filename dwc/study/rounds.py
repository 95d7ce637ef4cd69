"""The study of rounds on the same scans: how Eq. 17, tempering, averaging and factors go on where one round ends.

Every method has the same sites, the same first round of training and as many steps. They differ in the prior and start
of a site's next training, and in how the answers are put together. Rows of the paper and pooled training are beside
them.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import pandas as pd

from dwc.data.dataset import SubVolumes
from dwc.metrics.calibration import expected_calibration_error
from dwc.report import studies as pictures
from dwc.study.context import Study
from dwc.study.graph import Network, finetuned, variational
from dwc.study.networks import Networks
from dwc.study.rows import Result, compare_rows, mixed_names, simulate_mixed
from dwc.study.scoring import Kind, Row, Scores
from dwc.study.settings import StudySettings
from dwc.study.sites import pool

__all__ = ["Line", "Method", "lines_of", "rounds", "trajectory"]

Method = Literal["dwc", "tempered", "average", "factors"]
_JOINT: dict[Method, Literal["consolidated", "tempered", "mean", "factors"]] = {
    "dwc": "consolidated",  # Eq. 17, from the joint network of the round before
    "tempered": "tempered",  # the same to the power 1/S
    "average": "mean",  # federated averaging: prior q_0, start and result the mean of the sites' networks
    "factors": "factors",  # prior the cavity, start the joint network, damping 1/S
}


@dataclass(frozen=True)
class Line:
    """A line of the table: a method with S sites after a number of rounds."""

    n_sites: int
    method: str
    round: int
    networks: tuple[Network, ...]  # that predict
    trained: tuple[Network, ...] = ()  # in this round; from pooled scans, in as many steps as in all rounds
    kind: Kind = "consolidated"

    @property
    def name(self) -> str:
        return f"{self.n_sites}, {self.method}, {self.round}" if self.n_sites else "0"

    @property
    def row(self) -> Row:
        return Row(self.name, self.kind, self.networks)


def rounds(study: Study, folder: Path) -> Result:
    """Repeat the cycle over the same sites and scans; score the joint network of each method after each round.

    The sites are the study's own or, if `many_sites` is set, the first S of its simulated ones, for each S. Besides the
    methods: ``chain``, one site after another; ``ensemble`` of the sites' networks of round 1; ``finetuned``, Eq. 17
    and then the origin, as in the paper; ``pooled``, one training on all sites' scans that takes as many steps as all
    sites in 1 round, or in all.

    Columns: S, method, round; on the origin, on the ``sites`` together and on each unseen site: Dice, ``nll`` (mean
    negative log-likelihood, nats per voxel), ``ece`` (expected calibration error, 0..1) and, if one site lacks a class,
    the Dice of that class; seconds of training (wall time) and MB to and from the sites (one network each way), in the
    round and so far.
    """
    settings = study.settings
    networks = Networks(study)
    if settings.many_sites is None:
        missing, names, scored = None, list(settings.sites), settings.sites
        counts: tuple[int, ...] = (len(names),)
    else:
        counts, missing, names = settings.many_sites.counts, settings.many_sites.missing, mixed_names(settings)
        simulate_mixed(study, names)
        scored = tuple(names[: settings.many_sites.n_scored])
    for n_sites in counts:
        pool(study, _scans_of(n_sites), names[:n_sites])
    held_out = {settings.origin: study.held_out(settings.origin)}
    held_out |= {"sites": study.prepare([scan for name in scored for scan in study.held_out_scans(name)])}
    held_out |= {site: study.held_out(site) for site in settings.unseen}

    lines = [Line(0, "start", 0, (variational(settings.origin),), kind="vi")]
    lines += [line for n_sites in counts for line in lines_of(settings, names[:n_sites])]
    networks.make(network for line in lines for network in line.networks)
    table, volumes = _scored(networks, lines, held_out, missing)
    table = table.join(_costs(networks, lines, names))
    pictures.rounds(table, settings.unseen, folder / "rounds.png")
    values = ["dice", "nll"] + ([_of(missing)] if missing else [])
    pairs = [pair for n_sites in counts for pair in _pairs(n_sites, settings.rounds)]
    tests = pd.concat(compare_rows(settings.training_sites, volumes, pairs, value) for value in values)
    return table, volumes, tests


def trajectory(method: Method, q0: Network, sites: Sequence[str], n_rounds: int) -> list[Network]:
    """The joint network after each round."""
    joint, joints = q0, []
    for number in range(1, n_rounds + 1):
        label = f"{method} of {len(sites)} round {number}"
        trained = []
        for site in sites:
            if method == "factors":
                prior = joint if joint == q0 else Network(f"{label} {site} cavity", "cavity", site, (q0, joint))
            else:
                prior = q0 if method == "average" else joint
            parents = (prior,) if prior == joint else (prior, joint)
            name = f"round 1 {site}" if joint == q0 else f"{label} {site}"  # the first is the same for all methods
            trained.append(Network(name, "vcl", site, parents, round=number))
        roots = (q0, joint) if method == "factors" else (joint if method in ("dwc", "tempered") else q0,)
        damping = 1 / len(sites) if method == "factors" else 1.0
        joint = Network(label, _JOINT[method], None, (*roots, *trained), damping=damping)
        joints.append(joint)
    return joints


def lines_of(settings: StudySettings, sites: Sequence[str]) -> Iterator[Line]:
    """The lines of S sites."""
    q0, n_sites, n_rounds = variational(settings.origin), len(sites), settings.rounds
    joints = {method: trajectory(method, q0, sites, n_rounds) for method in get_args(Method)}
    for method, networks in joints.items():
        for number, joint in enumerate(networks, 1):
            yield Line(n_sites, method, number, (joint,), _trained(joint))
    dwc = joints["dwc"][0]
    first = _trained(dwc)
    chain = [first[0]]
    for site in sites[1:]:
        chain.append(Network(f"chain to {site}", "vcl", site, (chain[-1],), round=1))
    yield Line(n_sites, "chain", 1, (chain[-1],), tuple(chain), "chain")
    yield Line(n_sites, "ensemble", 1, first, first, "ensemble")
    fine = finetuned(dwc, settings.origin)
    yield Line(n_sites, "finetuned", 1, (fine,), (*first, fine), "dwc")
    for number in sorted({1, n_rounds}):
        name = f"pooled of {n_sites} round {number}"
        network = Network(name, "vcl", _scans_of(n_sites), (q0,), times=n_sites * number)
        yield Line(n_sites, "pooled", number, (network,), (network,), "pooled")


def _pairs(n_sites: int, n_rounds: int) -> Iterator[tuple[str, str]]:
    """The rows to compare: each method's last round with its first, the factors' last with everything else."""
    last, methods = f"{n_sites}, factors, {n_rounds}", get_args(Method)
    if n_rounds > 1:
        yield from ((f"{n_sites}, {method}, {n_rounds}", f"{n_sites}, {method}, 1") for method in methods)
    yield last, "0"
    yield from ((last, f"{n_sites}, {other}, {n_rounds}") for other in (*methods, "pooled") if other != "factors")
    yield from ((last, f"{n_sites}, {other}, 1") for other in ("chain", "ensemble", "finetuned"))


def _scored(
    networks: Networks, lines: Sequence[Line], held_out: dict[str, SubVolumes], missing: str | None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The table without its costs, and a line per row and held-out volume, with the Dice of each class too."""
    rows = [line.row for line in lines]
    scores = Scores(networks, held_out)
    scores.score(rows)
    tables = scores.table("volumes", rows), scores.table("classes", rows), scores.table("calibration", rows)
    volumes, classes, counts = (_with_column(table, held_out) for table in tables)
    volume = ["row", "column", "site", "subject", "image"]
    of_class = classes.pivot_table(index=volume, columns="name", values="dice", sort=False)
    volumes = volumes.join(of_class.rename(columns=_of), on=volume)
    ece = pd.DataFrame(
        {"row": row, "column": column, "ece": expected_calibration_error(part)}
        for (row, column), part in counts.groupby(["row", "column"])
    )
    means = volumes.groupby(["row", "column"])[["dice", "nll", *([_of(missing)] if missing else [])]].mean()
    means = means.join(ece.set_index(["row", "column"]))
    table = pd.DataFrame({"S": line.n_sites, "method": line.method, "round": line.round} for line in lines)
    for value in means:
        of_value = means[value].unstack("column").loc[[row.name for row in rows], list(held_out)]
        prefix = "" if value == "dice" else f"{value} "
        table = table.join(of_value.add_prefix(prefix).reset_index(drop=True))
    return table, volumes


def _with_column(table: pd.DataFrame, columns: Iterable[str]) -> pd.DataFrame:
    """With the column of the study's table that each line counts in: its site or, if that has none, sites."""
    table.insert(1, "column", table["site"].where(table["site"].isin(list(columns)), "sites"))
    return table


def _costs(networks: Networks, lines: Sequence[Line], names: Sequence[str]) -> pd.DataFrame:
    """What each line took: seconds of training and MB sent."""
    costs = []
    for line in lines:
        if line.method == "pooled":
            sent = _size_of_scans(networks.study, names[: line.n_sites])
        else:  # each site gets the network that it starts from, and sends its own
            at_sites = [network for network in line.trained if network.mode != "finetune"]
            sent = sum(_size(networks, network) + _size(networks, network.parents[-1]) for network in at_sites)
        costs.append({"seconds": sum(map(networks.seconds, line.trained)), "MB": sent / 1e6})
    each = pd.DataFrame(costs)
    runs = [line.name if line.method == "pooled" else f"{line.n_sites}, {line.method}" for line in lines]
    return each.join(each.groupby(runs).cumsum().add_prefix("total "))


def _trained(joint: Network) -> tuple[Network, ...]:
    """The sites' networks that a joint one is made of."""
    return tuple(network for network in joint.parents if network.mode == "vcl")


def _scans_of(n_sites: int) -> str:
    """The name of the first sites' scans together; no site can have it, because of the space."""
    return f"{n_sites} sites"


def _of(name: str) -> str:
    """The Dice of a class, as a column."""
    return f"dice of {name}"


def _size(networks: Networks, network: Network) -> int:
    return networks.file(network).stat().st_size


def _size_of_scans(study: Study, sites: Iterable[str]) -> int:
    scans = [scan for site in sites for scan in study.scans(site) if scan.split == "train"]
    return sum(file.stat().st_size for scan in scans for file in (scan.image, scan.label) if file is not None)
