"""What a network was trained to be given, as its header says: the grid, the scaling of intensities, the label map."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dwc.base.errors import InputError, difference
from dwc.data.conform import conform_image
from dwc.data.constants import SHIPPED, SIDE
from dwc.data.grid import Grid
from dwc.data.intensity import IN_HEADERS, Scheme, scaling_of
from dwc.data.labels import LabelMap
from dwc.inputs import find_scan
from dwc.posterior import Posterior

__all__ = ["Preprocessing"]


@dataclass(frozen=True)
class Preprocessing:
    """From a scan to a network's input, and from its classes to label ids.

    Attributes
    ----------
    grid : Grid
        What scans are conformed to.
    intensity : str
        z_score, min_max or quantile.
    label_map : LabelMap
        `label_map.names[k]` is what class k is called, `label_map.to_ids(classes)` gives label ids.
    """

    grid: Grid
    intensity: Scheme
    label_map: LabelMap

    @classmethod
    def of(cls, posterior: Posterior, label_map: str | None = None) -> "Preprocessing":
        """What a posterior's header says; `label_map` is the TSV that it was trained on, if dwc ships none."""
        classes = _label_map(posterior, label_map)
        return cls(*_scaling(posterior), classes)

    def __call__(self, scan: str | Path) -> Tensor:
        """A scan as a network's input, fp32 [1, 1, size, size, size], conformed to LIA orientation and scaled."""
        image = conform_image(find_scan(scan), self.grid)
        return torch.from_numpy(scaling_of(image, self.intensity)(image))[None, None]


def _label_map(posterior: Posterior, path: str | None) -> LabelMap:
    trained_on = posterior.metadata.get("label_map") or {}
    name = trained_on.get("name")
    if path is None and name not in SHIPPED:
        raise InputError(f"{posterior.name}: was trained on label map {name!r}; give its TSV as `label_map`")
    label_map = LabelMap.load(path or str(name))
    if label_map.sha256 != trained_on.get("sha256"):
        raise InputError(
            f"{posterior.name}: was trained on another table of label map {name!r} than {path or 'the shipped one'}"
            "; give the TSV it was trained on as `label_map`"
        )
    return label_map


def _scaling(posterior: Posterior) -> tuple[Grid, Scheme]:
    theirs: Any = posterior.entry("preprocessing")
    try:
        grid = Grid(theirs["grid_size"], theirs["voxel_size"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{posterior.name}: names no preprocessing grid; give a network from dwc train") from error
    schemes = [scheme for scheme, text in IN_HEADERS.items() if text == theirs["intensity"]]
    if not schemes or theirs.get("sub_volume") != SIDE or grid.size % SIDE:
        asked, _ = difference(theirs, {})
        raise InputError(f"{posterior.name}: this dwc cannot preprocess {asked}; use the version that trained it")
    return grid, schemes[0]
