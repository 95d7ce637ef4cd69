"""The settings of a prediction, shared by `predict` and `evaluate`, and of the files that `predict` writes."""

from dataclasses import dataclass
from typing import Literal, get_args

from dwc.base.settings import Settings

__all__ = ["MAPS", "RESULTS", "Map", "OutputSettings", "PredictionSettings"]

RESULTS = ("per_class.csv", "per_volume.csv", "per_site.csv", "summary.json")  # of an evaluation
Map = Literal["entropy", "mutual_information", "variance", "confidence"]
MAPS: tuple[Map, ...] = get_args(Map)


@dataclass(frozen=True, kw_only=True)
class PredictionSettings(Settings):
    """How networks predict.

    Parameters
    ----------
    n_samples
        Draws of the weights per Bayesian network.
    seed
        Seed of the draws.
    device
        auto (a GPU if there is one), cpu or cuda.
    precision
        fp32, or bf16 for autocast.
    memory_limit
        GB that a block of the scan may take. Default: half of the device's free memory, on the CPU at most 4.
    label_map
        The TSV that the networks were trained on, if it is not one shipped with dwc.
    """

    n_samples: int = 10
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    memory_limit: float | None = None
    label_map: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("n_samples", "memory_limit")
        self._require("seed", self.seed >= 0, "give a number >= 0")


@dataclass(frozen=True, kw_only=True)
class OutputSettings(Settings):
    """What is written for each scan.

    Parameters
    ----------
    maps
        Maps of uncertainty, of `MAPS`.
    conformed
        Write results on the networks' conformed grid, with the conformed scan, instead of on the scan's own grid.
    largest_component
        Clean up: of each structure keep only as many of the largest connected parts as it has label ids, two for left
        and right; each voxel removed takes the label of the nearest one kept.
    picture
        A picture of the scan with its classes in colour.
    """

    maps: tuple[Map, ...] = ("entropy",)
    conformed: bool = False
    largest_component: bool = False
    picture: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("maps", len(set(self.maps)) == len(self.maps), "give each map once")
