"""Settings of a simulation of the cycle on one machine."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from dwc.training.settings import NetworkSettings, OptimizerSettings

__all__ = ["SimulationSettings"]


@dataclass(frozen=True, kw_only=True)
class SimulationSettings(OptimizerSettings, NetworkSettings):
    """Settings of a simulation.

    Parameters
    ----------
    out
        New folder for scans, state, networks and tables.
    sites
        Number of sites; all train at once, each in a process of about half a gigabyte.
    rounds
        Number of rounds.
    method
        As in project.yml: ``pvi``, rounds on the same scans, or ``dwc``, new scans in each round.
    damping
        For pvi: share of a new factor; if left out, 1 over the number of sites.
    n_train
        Training scans per site; for dwc, new ones in each round.
    n_test
        Test scans per site, the same in all rounds.
    steps
        Steps of each training.
    batch_size
        Sub-volumes per step.
    temper
        For dwc: lambda of the consolidation, as in project.yml. 1 is Eq. 17; after trainings as short as these it adds
        the sites' shifts up, and 1 over the number of sites averages them.
    max_influence
        Limit of a site's influence, as in project.yml; null switches it off.
    pause_s
        Seconds from one pass over the sites to the next.
    limit_s
        Maximum seconds for all rounds.
    plan_sites
        Numbers of sites to plan for, with the full network.
    link_mbit_s
        Bandwidth of the server's link, for the plan.
    seed
        Seed of scans and trainings.
    """

    out: Path = Path("simulation")
    sites: int = 3
    rounds: int = 1
    method: Literal["pvi", "dwc"] = "pvi"
    damping: float | None = None
    n_train: int = 2
    n_test: int = 1
    grid_size: int = 32
    voxel_size: float = 6.0
    label_map: str = "coarse"
    width: int = 6
    dilations: tuple[int, ...] = (1, 2)
    lr: float = 1e-2
    rho_lr: float = 3e-2
    steps: int = 60
    batch_size: int = 2
    temper: float = 1.0
    max_influence: float | None = 3.0
    pause_s: float = 1.0
    limit_s: float = 7200.0
    plan_sites: list[int] = field(default_factory=lambda: [10, 100, 1000])
    link_mbit_s: float = 100.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("sites", "rounds", "n_train", "n_test", "steps", "batch_size")
        self._require_positive("temper", "max_influence", "limit_s", "link_mbit_s")
        self._require("pause_s", self.pause_s >= 0, "give 0 or more")
        self._require("seed", self.seed >= 0, "give 0 or more")
        self._require("plan_sites", not self.plan_sites or min(self.plan_sites) > 0, "give positive numbers")

    def training(self) -> dict[str, Any]:
        """The settings that all trainings share."""
        optimizer = {item.name: getattr(self, item.name) for item in fields(OptimizerSettings)}
        own = {"batch_size": self.batch_size, "steps_per_epoch": self.steps, "seed": self.seed}
        return {**optimizer, **own, "epochs": 1}

    def network(self) -> dict[str, Any]:
        """Network and grid, as `TrainSettings` takes them."""
        return {item.name: getattr(self, item.name) for item in fields(NetworkSettings)}
