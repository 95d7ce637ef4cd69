"""How soon VCL gets to where MAP gets on the same site: at equal steps, to a Dice, and to plateaus where those compare.

A falling learning rate settles every network near the end of its schedule, so steps to a plateau would measure the
schedule's length. VCL's network is then compared with a control, a MAP network from scratch with as many steps. The
steps of the prior that VCL starts from are never counted.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from dwc.meshnet import MeshNet
from dwc.study.graph import Network, control_network, map_network, variational, vcl
from dwc.study.networks import Networks
from dwc.study.settings import StudySettings
from dwc.training.validation import validation_dice

__all__ = ["MARGIN", "compared", "controls", "plateaus_compare", "speed_table"]

MARGIN = 0.05  # of the MAP network's last Dice: nearer than that counts as reached
_Log = Sequence[Mapping[str, Any]]


def plateaus_compare(settings: StudySettings) -> bool:
    """Whether MAP's and VCL's plateaus are one measure: constant learning rates, judged over one window."""
    stages = settings.map, settings.vcl
    return len({(stage.schedule, stage.plateau_window) for stage in stages}) == 1 and stages[0].schedule == "constant"


def controls(settings: StudySettings, networks: Iterable[Network]) -> list[Network]:
    """The controls that a study needs: of each site whose MAP and VCL networks are among its networks."""
    there, trios = set(networks), [_trio(settings, site) for site in settings.sites]
    return [control for full, control, ours in trios if {full, ours} <= there]


def speed_table(networks: Networks) -> pd.DataFrame:
    """A line per site whose networks are all trained: site, and what `compared` gives."""
    settings, rows = networks.study.settings, []
    for site in settings.sites:
        trio = _trio(settings, site)
        if all(map(networks.is_done, trio)):
            full, control, ours = map(networks.log, trio)
            ours = [{"step": 0, "dice": _dice_of_prior(networks, site)}, *ours]
            rows.append({"site": site, **compared(full, control, ours, plateaus=plateaus_compare(settings))})
    table = pd.DataFrame(rows)
    return table.astype({column: "Int64" for column in table if column.endswith(("step", "steps"))})


def compared(full: _Log, control: _Log, ours: _Log, *, plateaus: bool) -> dict[str, float | None]:
    """What the logs of a site's networks say, trained on the same scans and validated on the same sub-volumes.

    `full`, `control` and `ours` are the lines of log.jsonl of the MAP network, of its control, and of the VCL network,
    here from step 0; `plateaus` says whether to report the plateaus of the training losses.

    Returns
    -------
    dict
        ``steps``, the last that control and VCL network both logged, with ``map_dice`` and ``vcl_dice`` there;
        ``vcl_start_dice`` at step 0; ``map_steps`` and ``map_last_dice`` of the MAP network; ``target_dice``, that less
        `MARGIN` of it, with the first steps that reach it; the plateaus' first steps. None where there is none.
    """
    theirs, mine = ({line["step"]: line["dice"] for line in log} for log in (control, ours))
    steps = max(theirs.keys() & mine.keys(), default=None)
    target = (1 - MARGIN) * (full[-1]["dice"] or 0)
    return {
        "steps": steps, "map_dice": theirs.get(steps), "vcl_dice": mine.get(steps), "vcl_start_dice": ours[0]["dice"],
        "map_steps": full[-1]["step"], "map_last_dice": full[-1]["dice"],
        "target_dice": target, "map_target_step": _reached(full, target), "vcl_target_step": _reached(ours, target),
        "map_plateau_step": full[-1]["plateau_step"] if plateaus else None,
        "vcl_plateau_step": ours[-1]["plateau_step"] if plateaus else None,
    }  # fmt: skip


def _trio(settings: StudySettings, site: str) -> tuple[Network, Network, Network]:
    """A site's MAP network, its control and its VCL network; if plateaus compare, the MAP network is the control."""
    full = map_network(site)
    control = full if plateaus_compare(settings) else control_network(site)
    return full, control, vcl(variational(settings.origin), site)


def _reached(log: _Log, target: float) -> int | None:
    return next((line["step"] for line in log if line["dice"] is not None and line["dice"] >= target), None)


def _dice_of_prior(networks: Networks, site: str) -> float | None:
    """The prior's Dice on the held-out sub-volumes that the site's training logs: VCL's before its first step."""
    study = networks.study
    prior = MeshNet.from_posterior(networks.get(variational(study.settings.origin)))
    return validation_dice(prior, study.held_out(site), study.settings, study.device)
