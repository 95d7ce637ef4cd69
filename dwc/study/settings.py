"""What a person can set about a study: sites, networks' size, how each kind is trained; and the presets that ship.

The settings are plain values, written to the study's config.yaml. The room checks them and turns them into the
trainer's settings; which networks there are, and what is compared, is decided in `paper` and `studies`.
"""

from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from dwc.base.errors import InputError
from dwc.data.grid import SIDE
from dwc.data.labels import LabelMap
from dwc.training.settings import TrainSettings

__all__ = ["ORIGIN", "PRESETS", "SITES", "STUDIES", "UNSEEN", "ManySites", "Stage", "StudySettings", "preset_file"]

ORIGIN, SITES, UNSEEN = "H", ("N", "B", "W"), "A"
TRAINING_SITES = (ORIGIN, *SITES)
ALL_SITES = (*TRAINING_SITES, UNSEEN)
PRESETS = ("smoke", "small", "cpu", "paper")
STUDIES = ("paper", "many-sites", "rounds", "leave-one-out", "tempering")
_MODES = {"map": "map", "pooled": "map", "vi": "vi", "vcl": "vcl", "finetune": "finetune"}  # of each stage


@dataclass(frozen=True)
class Stage:
    """How one kind of network is trained.

    Parameters
    ----------
    steps
        Optimizer steps, at most.
    lr
        Highest learning rate of the means.
    rho_lr
        Highest learning rate of rho; by default lr. It is what lets sigma leave its prior's value within few steps.
    schedule
        constant or one_cycle.
    epochs
        Parts that the steps are divided into; each ends with validation, a log line and a checkpoint.
    stop_at_plateau
        End with the first epoch after the loss began to oscillate around a stable value (constant schedule).
    plateau_window
        Steps over which that is judged, a multiple of 20.
    """

    steps: int = 500
    lr: float = 1e-2
    rho_lr: float | None = None
    schedule: Literal["constant", "one_cycle"] = "one_cycle"
    epochs: int = 1
    stop_at_plateau: bool = False
    plateau_window: int = 400


@dataclass(frozen=True)
class ManySites:
    """The simulated sites of the study many-sites.

    Parameters
    ----------
    counts
        Numbers of sites to consolidate, ascending; the first ones of the same sites each time.
    n_train
        Training scans of each site.
    n_scored
        Sites that a held-out scan is scored of, the first ones, whether they are consolidated or not.
    """

    counts: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    n_train: int = 2
    n_scored: int = 8


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """Settings of a study; its folder keeps them as config.yaml. What a study is made of has its values in the presets.

    Parameters
    ----------
    out
        Folder for scans, networks, scores, tables and report. Called again, the study goes on where it stopped, and
        trains anew only what other settings change.
    manifests
        Manifest CSV or BIDS-derivatives folder of each of H, N, B, W and A. By default the sites are simulated.
    anatomies
        Folder of label volumes to simulate from. By default the procedural head.
    n_train
        Simulated training scans of each of H, N, B and W.
    n_test
        Simulated held-out scans of each of H, N, B, W and the unseen A.
    test_fraction
        Part of the subjects held out, where a manifest has no split column. All of A is held out.
    label_map
        fifty, coarse, or a TSV of FreeSurfer ids and classes.
    grid_size
        Voxels along each edge of the volumes.
    voxel_size
        Millimetres.
    width
        Filters of each layer of MeshNet.
    dilations
        One per 3x3x3 layer.
    batch_size
        Sub-volumes per step.
    map
        How the MAP networks are trained.
    pooled
        How the MAP network of all sites' scans is trained; by default as the others.
    vi
        How the variational network of H is trained.
    vcl
        How the sites' networks are trained, each from its prior.
    finetune
        How the consolidated network is trained on H.
    rounds
        Of the cycle, in the study rounds.
    many_sites
        The sites of the study many-sites.
    validation_sub_volumes
        Held-out sub-volumes scored after each epoch, at most.
    n_samples
        Monte Carlo samples per prediction.
    seed
        Of anatomy, scans, split, networks and noise.
    workers
        Processes that load data.
    device
        auto (a GPU where there is one), cpu or cuda.
    precision
        fp32, or bf16 for autocast.
    """

    out: Path = Path("experiment")
    manifests: dict[str, Path] | None = None
    anatomies: Path | None = None
    n_train: dict[str, int]
    n_test: dict[str, int]
    test_fraction: float = 0.1
    label_map: str
    grid_size: int
    voxel_size: float
    width: int
    dilations: tuple[int, ...]
    batch_size: int
    map: Stage
    pooled: Stage | None = None
    vi: Stage
    vcl: Stage
    finetune: Stage
    rounds: int = 3
    many_sites: ManySites = ManySites()
    validation_sub_volumes: int
    n_samples: int
    seed: int = 0
    workers: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(self.out).expanduser().absolute())
        object.__setattr__(self, "dilations", tuple(self.dilations))
        if self.anatomies is not None:
            object.__setattr__(self, "anatomies", Path(self.anatomies).expanduser().absolute())
        if self.manifests is not None:
            paths = {site: Path(path).expanduser().absolute() for site, path in self.manifests.items()}
            object.__setattr__(self, "manifests", paths)

    @property
    def cache_dir(self) -> Path:
        """Folder of the conformed sub-volumes, shared by all networks."""
        return self.out / "cache"

    @property
    def locks(self) -> Path:
        """Folder of the locks by which processes share the study."""
        return self.out / ".locks"

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises
        ------
        InputError
            Naming the setting, its value and the remedy.
        """
        if self.out.exists() and not self.out.is_dir():
            raise InputError(f"--out {self.out}: is a file; give a folder")
        _check_sites("n_train", self.n_train, TRAINING_SITES)
        _check_sites("n_test", self.n_test, ALL_SITES)
        if self.manifests is not None:
            _check_sites("manifests", self.manifests, ALL_SITES)
            if self.anatomies is not None:
                raise InputError(f"--anatomies {self.anatomies}: manifests are given too; leave one of the two out")
        counts = {f"n_{part}.{site}": n for part in ("train", "test") for site, n in getattr(self, f"n_{part}").items()}
        several = {"n_samples": self.n_samples, "rounds": self.rounds, "many_sites.n_train": self.many_sites.n_train}
        for name, value in (counts | several).items():
            if value < 1:
                raise InputError(f"--{name} {value}: give a positive number")
        n_sites, n_scored = self.many_sites.counts, self.many_sites.n_scored
        if not n_sites or list(n_sites) != sorted(set(n_sites)) or min(n_sites) < 1:
            raise InputError(f"--many_sites.counts {list(n_sites)}: give ascending positive numbers, such as [2,4,8]")
        if not 1 <= n_scored <= max(n_sites):
            raise InputError(f"--many_sites.n_scored {n_scored}: give 1 to {max(n_sites)}, the sites there are")
        if self.anatomies is not None and not self.anatomies.is_dir():
            raise InputError(f"--anatomies {self.anatomies}: no such folder; give one of label volumes (*.nii.gz)")
        if self.grid_size % SIDE or self.grid_size < SIDE:
            raise InputError(f"--grid_size {self.grid_size}: give a multiple of {SIDE} voxels")
        LabelMap.load(self.label_map)
        for name, mode in _MODES.items():
            stage = self.stage(name)
            if min(stage.steps, stage.epochs) < 1:
                raise InputError(f"--{name}.steps {stage.steps}, epochs {stage.epochs}: give positive numbers")
            if stage.steps % stage.epochs:
                raise InputError(f"--{name}.epochs {stage.epochs}: does not divide its {stage.steps} steps evenly")
            start = {"prior": self.out} if mode in ("vcl", "finetune") else {}
            self.training(mode, stage, data=self.out, out=self.out, **start)

    def stage(self, name: str) -> Stage:
        """How networks of a kind are trained: map, pooled, control, vi, vcl or finetune."""
        return getattr(self, name) or self.map  # pooled may be left to map

    @property
    def control(self) -> Stage:
        """How the MAP networks are trained that VCL's are set against: with VCL's number of steps."""
        return replace(self.map, steps=self.vcl.steps, epochs=self.vcl.epochs, stop_at_plateau=False)

    def training(self, mode: str, stage: Stage, **paths: Path) -> TrainSettings:
        """The trainer's settings of a mode; `paths` are data, out, and prior or init."""
        return TrainSettings(
            mode=mode, **paths, cache_dir=self.cache_dir, lr=stage.lr, rho_lr=stage.rho_lr, schedule=stage.schedule,
            epochs=stage.epochs, steps_per_epoch=stage.steps // stage.epochs, stop_at_plateau=stage.stop_at_plateau,
            plateau_window=stage.plateau_window,
            label_map=self.label_map, grid_size=self.grid_size, voxel_size=self.voxel_size, width=self.width,
            dilations=self.dilations, batch_size=self.batch_size, test_fraction=self.test_fraction,
            validation_sub_volumes=self.validation_sub_volumes, seed=self.seed, workers=self.workers,
            device=self.device, precision=self.precision,
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """The settings as plain values, without the folder: a config file that gives the same study elsewhere."""
        values = {name: value for name, value in asdict(self).items() if name != "out"}
        values["dilations"] = list(self.dilations)
        values["many_sites"]["counts"] = list(self.many_sites.counts)
        values["anatomies"] = None if self.anatomies is None else str(self.anatomies)
        if self.manifests is not None:
            values["manifests"] = {site: str(path) for site, path in self.manifests.items()}
        return values


def preset_file(name: str) -> Path:
    """The YAML file of a preset that ships with dwc.

    Raises
    ------
    InputError
        If there is none of this name.
    """
    if name not in PRESETS:
        raise InputError(f"--preset {name}: no such preset; choose one of {', '.join(PRESETS)}")
    return Path(str(files(__package__) / "presets" / f"{name}.yaml"))


def _check_sites(name: str, values: dict[str, Any], sites: tuple[str, ...]) -> None:
    if values.keys() != set(sites):
        *others, last = sites
        raise InputError(f"--{name} {', '.join(values)}: give one for each of {', '.join(others)} and {last}, no other")
