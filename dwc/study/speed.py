"""How many steps VCL (variational continual learning) takes, compared with MAP training on the same site.

With a falling learning rate, plateaus would measure the length of the schedule, so VCL is compared with a control: a
MAP network from scratch with as many steps. Steps of the prior that VCL starts from are never counted.
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

MARGIN = 0.05  # relative to the MAP network's last Dice; a Dice this close counts as reached
_Log = Sequence[Mapping[str, Any]]


def plateaus_compare(settings: StudySettings) -> bool:
    """Whether the plateaus of MAP and VCL are comparable: constant learning rates and the same window."""
    stages = settings.map, settings.vcl
    return len({(stage.schedule, stage.plateau_window) for stage in stages}) == 1 and stages[0].schedule == "constant"


def controls(settings: StudySettings, networks: Iterable[Network]) -> list[Network]:
    """The controls to train: one for each site whose MAP and VCL networks are both among `networks`."""
    there, trios = set(networks), [_trio(settings, site) for site in settings.sites]
    return [control for full, control, ours in trios if {full, ours} <= there]


def speed_table(networks: Networks) -> pd.DataFrame:
    """One line per site whose networks are all trained: site and the values of `compared`."""
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
    """Compare the logs of a site's MAP network, its control and its VCL network (`ours`, from step 0 on).

    All three must be validated on the same sub-volumes. ``steps`` is the last step logged by both control and VCL, with
    ``map_dice`` and ``vcl_dice``; ``target_dice`` is `MARGIN` below ``map_last_dice``, the last of the MAP network.
    With `plateaus`, the first steps of the training losses' plateaus are included. Missing values are None.
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
    """A site's MAP network, control and VCL network; the MAP network is the control if plateaus compare."""
    full = map_network(site)
    control = full if plateaus_compare(settings) else control_network(site)
    return full, control, vcl(variational(settings.origin), site)


def _reached(log: _Log, target: float) -> int | None:
    return next((line["step"] for line in log if line["dice"] is not None and line["dice"] >= target), None)


def _dice_of_prior(networks: Networks, site: str) -> float | None:
    """The prior's Dice on the held-out sub-volumes that the site's training logs, that is, VCL's at step 0."""
    study = networks.study
    prior = MeshNet.from_posterior(networks.get(variational(study.settings.origin)))
    return validation_dice(prior, study.held_out(site), study.settings, study.device)
