"""The study of rounds on the same scans: how Eq. 17, tempering, averaging and factors go on where one round ends.

Every method has the same sites, the same first round of training and as many steps. They differ in the prior and start
of a site's next training, and in how the answers are put together.
"""

from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd

from dwc.report import studies as pictures
from dwc.study.context import Study
from dwc.study.graph import Network, variational
from dwc.study.networks import Networks
from dwc.study.rows import Result, compare_rows, mixed_names, score_row, simulate_mixed

__all__ = ["Method", "rounds", "trajectory"]

Method = Literal["dwc", "tempered", "average", "factors"]
_JOINT: dict[Method, Literal["consolidated", "tempered", "mean", "factors"]] = {
    "dwc": "consolidated",  # Eq. 17, from the joint network of the round before
    "tempered": "tempered",  # the same to the power 1/S
    "average": "mean",  # federated averaging: prior q_0, start and result the mean of the sites' networks
    "factors": "factors",  # prior the cavity, start the joint network, damping 1/S
}


def rounds(study: Study, folder: Path) -> Result:
    """Repeat the cycle over the same sites and scans; score the joint network of each method after each round.

    The sites are the study's own or, if `many_sites` is set, the first S of its simulated ones, for each S. Columns: S,
    method, round, then Dice on the origin, on the ``sites`` together and on each unseen site, and ``nll`` (mean
    negative log-likelihood, nats per voxel) of the same.
    """
    settings = study.settings
    networks, q0 = Networks(study), variational(settings.origin)
    if settings.many_sites is None:
        counts: tuple[int, ...] = (len(settings.sites),)
        names = list(settings.sites)
        scored = [scan for name in names for scan in study.held_out_scans(name)]
    else:
        counts, names = settings.many_sites.counts, mixed_names(settings)
        simulate_mixed(study, names, settings.many_sites.n_train)
        scored = [scan for name in names[: settings.many_sites.n_scored] for scan in study.held_out_scans(name)]
    held_out = {settings.origin: study.held_out(settings.origin), "sites": study.prepare(scored)}
    held_out |= {site: study.held_out(site) for site in settings.unseen}

    volumes = [score_row(study, networks.get(q0), held_out, "0")]
    rows: list[dict[str, Any]] = [{"row": "0", "S": 0, "method": "start", "round": 0}]
    pairs = []
    for n_sites in counts:
        for method in get_args(Method):
            for number, joint in enumerate(trajectory(method, q0, names[:n_sites], settings.rounds), start=1):
                row = f"{n_sites}, {method}, {number}"
                volumes.append(score_row(study, networks.get(joint), held_out, row))
                rows.append({"row": row, "S": n_sites, "method": method, "round": number})
            pairs.append((row, f"{n_sites}, {method}, 1"))  # the last round against the first
        last = f"{n_sites}, factors, {settings.rounds}"
        pairs += [(last, f"{n_sites}, {other}, {settings.rounds}") for other in ("dwc", "tempered", "average")]
        pairs.append((last, "0"))
    joined = pd.concat(volumes, ignore_index=True)
    means = joined.pivot_table(index="row", columns="column", values=["dice", "nll"])
    dice = means["dice"][list(held_out)]
    nll = means["nll"][list(held_out)].add_prefix("nll ")
    table = pd.DataFrame(rows).join(dice, on="row").join(nll, on="row").drop(columns="row")
    pictures.rounds(table, settings.origin, folder / "rounds.png")
    training = settings.training_sites
    tests = [compare_rows(training, joined, pairs, value).assign(value=value) for value in ("dice", "nll")]
    return table, joined, pd.concat(tests)


def trajectory(method: Method, q0: Network, sites: list[str], n_rounds: int) -> list[Network]:
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
