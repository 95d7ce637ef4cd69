"""How soon VCL gets where MAP gets on the same site: at equal steps, to a Dice, to plateaus where those compare.

A falling learning rate settles every network near the end of its own schedule, so that steps to a plateau would measure
the schedule's length. There VCL's network is set against a control, a MAP network from scratch with as many steps,
each at the end of its whole schedule. The room says which controls a study needs and reads the logs; training is
`networks`' business. Steps behind the prior that VCL starts from are never counted.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch

from dwc.base.devices import choose_device
from dwc.meshnet import MeshNet
from dwc.metrics.confusion import mean_dice
from dwc.study.networks import Network, Networks, control_network, map_network, variational, vcl
from dwc.study.settings import ORIGIN, SITES, StudySettings
from dwc.study.sites import held_out_volumes
from dwc.training.validation import draw_sub_volumes, validation_confusion

__all__ = ["MARGIN", "compared", "controls", "plateaus_compare", "speed_table"]

MARGIN = 0.05  # of the MAP network's last Dice: nearer than that counts as reached
_PRIOR = variational(ORIGIN)
_Log = Sequence[Mapping[str, Any]]


def plateaus_compare(settings: StudySettings) -> bool:
    """Whether MAP's and VCL's plateaus are one measure: constant learning rates, judged over one window."""
    stages = settings.map, settings.vcl
    return len({(stage.schedule, stage.plateau_window) for stage in stages}) == 1 and stages[0].schedule == "constant"


def controls(settings: StudySettings, networks: Sequence[Network]) -> list[Network]:
    """The controls of a study, of each site whose MAP and VCL network are among its networks.

    Where plateaus compare it is the MAP network itself, which under a constant learning rate has been at VCL's steps.
    """
    pairs = {site: {map_network(site), vcl(_PRIOR, site)} for site in SITES}
    return [_control(settings, site) for site, pair in pairs.items() if pair <= set(networks)]


def speed_table(networks: Networks) -> pd.DataFrame:
    """A line per site whose networks are all trained: site, and what `compared` gives."""
    settings, rows = networks.settings, []
    for site in SITES:
        trio = map_network(site), _control(settings, site), vcl(_PRIOR, site)
        if all(map(networks.is_done, trio)):
            full, control, ours = map(networks.log, trio)
            ours = [{"step": 0, "dice": _dice_of_prior(networks, site)}, *ours]
            rows.append({"site": site, **compared(full, control, ours, plateaus=plateaus_compare(settings))})
    table = pd.DataFrame(rows)
    return table.astype({column: "Int64" for column in table if column.endswith(("step", "steps"))})


def compared(full: _Log, control: _Log, ours: _Log, *, plateaus: bool) -> dict[str, float | None]:
    """What the logs of a site's networks say, trained on the same scans and validated on the same sub-volumes.

    Parameters
    ----------
    full, control, ours : sequence of mapping
        Lines of log.jsonl: of the MAP network, of the MAP network with VCL's steps, of the VCL network, its first line
        step 0.
    plateaus : bool
        Whether the plateaus of the training losses are told.

    Returns
    -------
    dict
        ``steps``, the last that both control and VCL network logged, and there ``map_dice`` (the control's) and
        ``vcl_dice``; ``vcl_start_dice``, at step 0; ``map_steps`` and ``map_last_dice`` of the MAP network in full;
        ``target_dice``, that less `MARGIN` of it, ``map_target_step`` and ``vcl_target_step``, the first logged ones
        with it; ``map_plateau_step`` and ``vcl_plateau_step``. None where there is no such step.
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


def _control(settings: StudySettings, site: str) -> Network:
    return map_network(site) if plateaus_compare(settings) else control_network(site)


def _reached(log: _Log, target: float) -> int | None:
    return next((line["step"] for line in log if line["dice"] is not None and line["dice"] >= target), None)


def _dice_of_prior(networks: Networks, site: str) -> float | None:
    """The prior's Dice on the held-out sub-volumes that the site's trainings log: VCL's before its first step."""
    settings = networks.settings
    device, data = choose_device(settings.device), held_out_volumes(settings, site, networks.manifests[site])
    network = MeshNet.from_posterior(networks.get(_PRIOR)).to(device).eval()

    def logits(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            return network(images, sample=False)

    draw = draw_sub_volumes(len(data), settings.validation_sub_volumes, settings.seed)
    n_classes, batch_size = data.label_map.n_classes, settings.batch_size
    return mean_dice(
        validation_confusion(logits, data, draw, n_classes=n_classes, batch_size=batch_size, device=device)
    )
