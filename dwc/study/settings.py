"""Settings of a study (its sites, how each kind of network is trained) and the presets that ship."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from dwc.base.errors import InputError
from dwc.base.settings import Settings
from dwc.training.settings import ComputeSettings, NetworkSettings, OptimizerSettings, TrainSettings

__all__ = ["PRESETS", "STUDIES", "ManySites", "Stage", "StudySettings", "preset_file", "shared"]

PRESETS = ("smoke", "small", "demo", "cpu", "paper")
STUDIES = ("paper", "demo", "many-sites", "rounds", "leave-one-out", "tempering")
# Site names are used in folder names and in network names such as H->N+B, and as columns next to these in tables.
_NAME = re.compile(r"[A-Za-z0-9][\w-]*", re.ASCII)
_RESERVED = (
    "untrained", "ensemble", "average", "row", "kind", "network", "round", "method", "sites", "s", "rule", "lambda",
    "seconds", "mb", "weight", "sigma_ratio", "log_likelihood", "validation_dice", "chosen",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Stage(OptimizerSettings):
    """How one kind of network is trained.

    Parameters
    ----------
    steps
        Maximum number of optimizer steps.
    epochs
        Equal parts of the steps; each ends with validation, a log line and a checkpoint.
    """

    steps: int = 500
    lr: float = 1e-2
    schedule: Literal["constant", "one_cycle"] = "one_cycle"
    epochs: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("steps", "epochs")
        self._require("epochs", self.steps % self.epochs == 0, f"does not divide the {self.steps} steps evenly")


@dataclass(frozen=True, kw_only=True)
class ManySites(Settings):
    """The simulated sites of the studies many-sites and rounds.

    Parameters
    ----------
    counts
        Numbers of sites to consolidate, ascending; larger numbers include the smaller ones' sites.
    n_train
        Training scans per site.
    n_scored
        Score one held-out scan of each of the first so many sites, consolidated or not.
    missing
        Class, by its name in the label map, that the first site does not label: background in its training scans.
    """

    counts: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    n_train: int = 2
    n_scored: int = 8
    missing: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        ascending = self.counts and list(self.counts) == sorted(set(self.counts)) and self.counts[0] > 0
        self._require("counts", bool(ascending), "give ascending positive numbers, such as [2,4,8]")
        self._require_positive("n_train")
        self._require(
            "n_scored", 1 <= self.n_scored <= max(self.counts), f"give 1 to {max(self.counts)}, the number of sites"
        )


@dataclass(frozen=True, kw_only=True)
class StudySettings(ComputeSettings, NetworkSettings):
    """Settings of a study, kept as config.yaml in its folder. Every preset sets those without a default here.

    Parameters
    ----------
    out
        Folder for scans, networks, scores, tables and report. A second run continues where the first stopped and
        retrains only what changed settings affect.
    origin
        Name of the site that trains the prior and fine-tunes the consolidated network.
    sites
        Names of the sites that train from the prior and are consolidated, at least one.
    unseen
        Names of sites that are only scored; may be empty.
    manifests
        Manifest CSV or BIDS-derivatives folder of each site, by name. By default sites are simulated: H, N, B, W and A
        stand for the paper's cohorts; any other name gets a scanner mixed at random from those of N, B and W.
    anatomies
        Folder of label volumes to simulate from. By default the procedural head.
    n_train
        Simulated training scans of the origin and each site: one number, or one per name.
    n_test
        Simulated held-out scans of each site, including unseen ones: one number, or one per name.
    map
        Training of the MAP networks.
    pooled
        Training of the MAP network on all sites' scans; by default as `map`.
    vi
        Training of the origin's variational network.
    vcl
        Training of the sites' networks from the prior (variational continual learning).
    finetune
        Training of the consolidated network on the origin.
    rounds
        Number of rounds in the study rounds.
    many_sites
        The simulated sites of the studies many-sites and rounds. By default 2 to 64 with two scans each; without any,
        rounds takes `sites`.
    n_samples
        Monte Carlo samples per prediction.
    """

    out: Path = Path("experiment")
    origin: str
    sites: tuple[str, ...]
    unseen: tuple[str, ...] = ()
    manifests: dict[str, Path] | None = None
    anatomies: Path | None = None
    n_train: int | dict[str, int]
    n_test: int | dict[str, int]
    label_map: str
    grid_size: int
    voxel_size: float
    width: int
    dilations: tuple[int, ...]
    map: Stage
    pooled: Stage | None = None
    vi: Stage
    vcl: Stage
    finetune: Stage
    rounds: int = 3
    many_sites: ManySites | None = None
    n_samples: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("sites", len(self.sites) > 0, "name one site or more")
        for name in self.all_sites:
            if not _NAME.fullmatch(name) or name.lower() in _RESERVED:
                raise InputError(f"`sites` {name!r}: give letters, digits, - and _, and no name that tables use")
        if len({*self.all_sites, self.pooled_name}) <= len(self.all_sites):
            raise InputError(f"`sites` {', '.join(self.all_sites)}: give each a name of its own")
        if self.manifests is None:
            self._check_by_site("n_train", self.training_sites)
            self._check_by_site("n_test", self.all_sites)
        else:
            self._check_by_site("manifests", self.all_sites)
            self._require("anatomies", self.anatomies is None, "`manifests` are given too; leave one of the two out")
        self._require_positive("n_samples", "rounds")

    def _check_by_site(self, name: str, sites: tuple[str, ...]) -> None:
        values = getattr(self, name)
        if isinstance(values, Mapping) and values.keys() != set(sites):
            *others, last = sites
            given = ", ".join(values)
            raise InputError(f"`{name}` {given}: give one for each of {', '.join(others)} and {last}, no other")
        numbers = {f"{name}.{site}": n for site, n in values.items()} if isinstance(values, Mapping) else {name: values}
        for each, n in numbers.items():
            if isinstance(n, int) and n < 1:
                raise InputError(f"`{each}` {n}: give a positive number")

    @property
    def training_sites(self) -> tuple[str, ...]:
        """The origin and the sites."""
        return (self.origin, *self.sites)

    @property
    def all_sites(self) -> tuple[str, ...]:
        """The training sites, then the unseen ones."""
        return (*self.training_sites, *self.unseen)

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Groups of sites to compare on: the training sites together, each unseen site alone."""
        return (self.training_sites, *((site,) for site in self.unseen))

    @property
    def pooled_name(self) -> str:
        """The name of all training sites together, such as HNBW or Oslo+Bergen."""
        return ("" if max(map(len, self.training_sites)) == 1 else "+").join(self.training_sites)

    def n_scans(self, site: str) -> tuple[int, int]:
        """Numbers of simulated training and held-out scans of a site."""
        n_train = 0 if site in self.unseen else _by_site(self.n_train, site)
        return n_train, _by_site(self.n_test, site)

    def stage(self, name: str) -> Stage:
        """Training of a kind of network: map, pooled, control, vi, vcl or finetune."""
        return getattr(self, name) or self.map  # pooled defaults to map

    @property
    def control(self) -> Stage:
        """Training of the MAP networks that VCL is compared with, with as many steps as VCL."""
        return replace(self.map, steps=self.vcl.steps, epochs=self.vcl.epochs, stop_at_plateau=False)

    def training(self, mode: str, stage: Stage, **paths: Path) -> TrainSettings:
        """The trainer's settings; `paths` are data, out, cache_dir, and prior or init."""
        values = shared(self, NetworkSettings, ComputeSettings) | shared(stage, OptimizerSettings)
        epochs = {"epochs": stage.epochs, "steps_per_epoch": stage.steps // stage.epochs}
        return TrainSettings(mode=mode, **values, **epochs, **paths)  # type: ignore[arg-type]

    def to_json(self) -> dict[str, Any]:
        """The settings as plain values without `out`, so that the config file works in any folder."""
        return {name: value for name, value in super().to_json().items() if name != "out"}


def shared(settings: Settings, *groups: type[Settings]) -> dict[str, Any]:
    """The settings of `groups`, by name."""
    names = [each.name for group in groups for each in fields(group)]
    return {name: getattr(settings, name) for name in names}


def preset_file(name: str) -> Path:
    """The YAML file of a preset that ships with dwc."""
    if name not in PRESETS:
        raise InputError(f"preset {name!r}: does not exist; choose one of {', '.join(PRESETS)}")
    return Path(str(files(__package__) / "presets" / f"{name}.yaml"))


def _by_site(values: int | dict[str, int], site: str) -> int:
    return values[site] if isinstance(values, Mapping) else values
