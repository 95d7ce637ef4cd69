"""What a person can set about a simulation of the cycle, and the checks that need nothing else."""

from dataclasses import dataclass, field
from pathlib import Path

from dwc.base.errors import InputError

__all__ = ["SimulationSettings"]


@dataclass(frozen=True)
class SimulationSettings:
    """Settings of a simulation.

    Parameters
    ----------
    out
        New folder for scans, books, networks and tables.
    sites
        How many; all train at once, each in a process of about half a gigabyte.
    rounds
        How many.
    n_train
        Training scans per site, other ones for each round.
    n_test
        Held-out scans per site, on which each round is scored.
    grid_size
        Voxels along each edge of the simulated scans.
    voxel_size
        Millimetres.
    label_map
        Classes to learn.
    width
        Filters of each layer.
    dilations
        One per 3x3x3 layer.
    steps
        Of each training.
    lr
        Learning rate of the means.
    rho_lr
        Learning rate of rho.
    batch_size
        Sub-volumes per step.
    temper
        Power of each site in the consolidation, as in project.yml. 1 is Eq. 17; where trainings are too short to narrow
        the posteriors, as here, it adds the sites' shifts up, and 1 over the number of sites averages them.
    pause_s
        From one pass over the sites to the next.
    limit_s
        For all rounds together.
    plan_sites
        Numbers of sites to plan for, at full size of the network.
    link_mbit_s
        The server's link, for the plan.
    seed
        Of scans and trainings.
    """

    out: Path = Path("simulation")
    sites: int = 3
    rounds: int = 1
    n_train: int = 2
    n_test: int = 1
    grid_size: int = 32
    voxel_size: float = 6.0
    label_map: str = "coarse"
    width: int = 6
    dilations: tuple[int, ...] = (1, 2)
    steps: int = 60
    lr: float = 1e-2
    rho_lr: float = 3e-2
    batch_size: int = 2
    temper: float = 1.0
    pause_s: float = 1.0
    limit_s: float = 7200.0
    plan_sites: list[int] = field(default_factory=lambda: [10, 100, 1000])
    link_mbit_s: float = 100.0
    seed: int = 0

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises
        ------
        InputError
            Naming the setting, its value and the remedy.
        """
        from dwc.data.grid import SIDE
        from dwc.data.labels import LabelMap  # here, so that help is quick

        for name in ("sites", "rounds", "n_train", "n_test", "steps", "temper", "limit_s", "link_mbit_s"):
            if not getattr(self, name) > 0:
                raise InputError(f"--{name} {getattr(self, name)}: give a positive number")
        if self.grid_size % SIDE or self.grid_size < SIDE:
            raise InputError(f"--grid_size {self.grid_size}: give a multiple of {SIDE} voxels")
        if self.plan_sites and min(self.plan_sites) < 1:
            raise InputError(f"--plan_sites {self.plan_sites}: give positive numbers")
        if self.out.exists() and any(self.out.iterdir()):
            raise InputError(f"{self.out}: is not empty; give another --out")
        LabelMap.load(self.label_map)

    def training(self) -> dict:
        """What all trainings share."""
        return {
            "lr": self.lr, "rho_lr": self.rho_lr, "batch_size": self.batch_size, "epochs": 1,
            "steps_per_epoch": self.steps, "seed": self.seed,
        }  # fmt: skip
