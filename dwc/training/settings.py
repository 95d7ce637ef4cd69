"""The settings of a training run, in groups that the study and the simulated federation share.

`specification` resolves what they mean together with the files they name.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from dwc.base.settings import Settings
from dwc.data.augmentation_settings import Augmentation
from dwc.data.constants import SHIPPED, SIDE

__all__ = [
    "ComputeSettings", "CubeSettings", "NetworkSettings", "OptimizerSettings", "TrainSettings", "without_later",
]  # fmt: skip

_LATER = {
    "activation": "relu",
    "intensity": "z_score",
    "stream": 0,
    "brain_share": 0.0,
}  # settings added later, with what was done before


def without_later(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings less those that dwc did not have at first, where they are what it did then: runs keep their identity."""
    return {name: value for name, value in values.items() if name not in _LATER or value not in (None, _LATER[name])}


@dataclass(frozen=True, kw_only=True)
class NetworkSettings(Settings):
    """The network, its classes and the grid of its volumes.

    Parameters
    ----------
    label_map
        fifty, coarse, or a TSV of FreeSurfer ids and classes. Default: as the prior or initial network, else fifty.
    grid_size
        Voxels along each edge of the conformed volume. Default: as the prior or initial network, else 256.
    voxel_size
        In millimetres. Default: as the prior or initial network, else 1.
    width
        Filters per layer. Default: as the prior or initial network, else 96.
    dilations
        One per 3x3x3 layer, such as [1,1,2]. Default: as the prior or initial network, else [1,1,1,2,4,8,1].
    activation
        relu or elu, after each 3x3x3 layer. Default: as the prior or initial network, else relu.
    intensity
        How a conformed volume is scaled: z_score, min_max (0..1), or quantile (clipped to its quantiles 0.05 and 0.95,
        the upper one kept near white matter, 0..1). Default: as the prior or initial network, else z_score.
    """

    label_map: str | None = None
    grid_size: int | None = None
    voxel_size: float | None = None
    width: int | None = None
    dilations: tuple[int, ...] | None = None
    activation: Literal["relu", "elu"] | None = None
    intensity: Literal["z_score", "min_max", "quantile"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("grid_size", "voxel_size", "width")
        whole = self.grid_size is None or self.grid_size % SIDE == 0
        self._require("grid_size", whole, f"give a multiple of {SIDE}, the edge of a sub-volume")
        if self.dilations is not None:
            valid = len(self.dilations) > 0 and min(self.dilations) > 0
            self._require("dilations", valid, "give positive numbers, such as [1,1,1,2,4,8,1]")
        if self.label_map not in (None, *SHIPPED):  # a file, which a resumed run must find from another folder
            object.__setattr__(self, "label_map", os.path.abspath(os.path.expanduser(self.label_map)))


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Settings):
    """The optimizer, its schedule and when to stop.

    Parameters
    ----------
    lr
        Adam's learning rate; the peak rate under one_cycle.
    rho_lr
        Learning rate of rho, where sigma = softplus(rho); lr by default. Adam changes log sigma by about this much per
        step: in a short run at a low rate sigma stays at its prior's value, and consolidation sums the sites' shifts.
    schedule
        constant, or one_cycle: cosine increase over the first 30 % of the steps, then cosine decrease to zero.
    stop_at_plateau
        Stop at the end of the first epoch after the training loss has levelled off (constant schedule only).
    plateau_window
        Number of steps over which the plateau is judged, a multiple of 20.
    """

    lr: float = 1e-3
    rho_lr: float | None = None
    schedule: Literal["constant", "one_cycle"] = "constant"
    stop_at_plateau: bool = False
    plateau_window: int = 400

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("lr", "rho_lr")
        whole = self.plateau_window >= 20 and self.plateau_window % 20 == 0
        self._require("plateau_window", whole, "give a positive multiple of 20 steps")
        fits = not (self.stop_at_plateau and self.schedule == "one_cycle")
        self._require("stop_at_plateau", fits, "one_cycle ends by itself; leave it out")


@dataclass(frozen=True, kw_only=True)
class CubeSettings(Settings):
    """The training cubes of 32x32x32 voxels.

    Parameters
    ----------
    cubes
        random: anywhere, with a margin of real neighbours. paper: the fixed, zero-padded sub-volumes that tile each
        volume; the settings below do not apply.
    margin
        Voxels of neighbours on each side, which the loss ignores.
    air_share
        Share of the cubes centred anywhere in the volume; the others are centred in the head's bounding box.
    brain_share
        Share of those others that are centred in the bounding box of the labelled tissue instead.
    augmentation
        Strength of the augmentation.
    """

    cubes: Literal["random", "paper"] = "random"
    margin: int = 0
    air_share: float = 0.05
    brain_share: float = 0.0
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("margin", self.margin >= 0, "give a number of voxels >= 0")
        for name in ("air_share", "brain_share"):
            self._require(name, 0 <= getattr(self, name) <= 1, "give a share, 0 to 1")

    def decisive_cubes(self) -> dict[str, Any]:
        """These settings as plain values; none for the paper's cubes, whose runs keep their header and fingerprint."""
        if self.cubes == "paper":
            return {}
        return {field.name: self.to_json()[field.name] for field in fields(CubeSettings)}


@dataclass(frozen=True, kw_only=True)
class ComputeSettings(CubeSettings):
    """Batches, the split, validation, and the machine.

    Parameters
    ----------
    batch_size
        Sub-volumes of 32x32x32 voxels per step, over all processes.
    validation_sub_volumes
        Maximum number of held-out sub-volumes scored after each epoch; drawn once from the seed.
    test_fraction
        Share of the subjects held out if the manifest has no split column.
    seed
        Determines the initial weights, the order of the data, the noise and the split.
    workers
        Data-loading processes per training process; they do not affect the result.
    device
        auto (a GPU if there is one), cpu or cuda.
    precision
        fp32, or bf16 for autocast.
    """

    batch_size: int = 10
    validation_sub_volumes: int = 512
    test_fraction: float = 0.1
    seed: int = 0
    workers: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("batch_size")
        self._require("test_fraction", 0 <= self.test_fraction < 1, "give a share in [0, 1)")
        for name in ("seed", "workers", "validation_sub_volumes"):
            self._require(name, getattr(self, name) >= 0, "give a number >= 0")


@dataclass(frozen=True, kw_only=True)
class TrainSettings(ComputeSettings, OptimizerSettings, NetworkSettings):
    """One training run: what to train, on which data, and the output folder.

    It also has the fields of `NetworkSettings`, `OptimizerSettings`, `ComputeSettings` and `CubeSettings`.

    Parameters
    ----------
    mode
        map: plain network, N(0, 1) prior. vi: first Bayesian network, N(0, 1) prior, means from the initial network.
        vcl (variational continual learning): a site's network, starting from its prior. finetune: as vcl, with the
        likelihood weighted as one volume.
    data
        Manifest CSV (image,label[,subject,site,split]) or BIDS-derivatives folder.
    out
        Run folder; created if needed, must be empty unless resuming.
    prior
        Bayesian posterior to use as prior and, without an initial network, as starting point (vcl and finetune).
    init
        Network whose means to start from (map and vi); for vi, the paper uses the MAP network. For vcl in rounds on the
        same scans: the current network, where the prior is the site's cavity.
    epochs
        Maximum number of epochs; each ends with validation, a log line and a checkpoint.
    steps_per_epoch
        Default: one pass over the training sub-volumes.
    stream
        Noise stream for this seed, so that sites that start from the same prior draw different noise.
    cache_dir
        Folder for conformed volumes; runs may share it. Default: OUT/cache.
    activation_checkpointing
        Recompute hidden layers in the backward pass, with the same result: less memory, one extra forward pass.
    """

    mode: Literal["map", "vi", "vcl", "finetune"] = "map"
    data: Path
    out: Path
    prior: Path | None = None
    init: Path | None = None
    epochs: int = 50
    steps_per_epoch: int | None = None
    stream: int = 0
    cache_dir: Path | None = None
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("epochs", "steps_per_epoch")
        self._require("stream", self.stream >= 0, "give a number >= 0")
        if self.has_learned_prior:
            self._require("mode", self.prior is not None, "needs a posterior to start from; give `prior`")
            own = self.mode == "vcl" or self.init is None
            self._require("init", own, f"`mode` {self.mode} starts from its prior; leave `init` out")
        else:
            self._require("prior", self.prior is None, f"`mode` {self.mode} has the prior N(0, 1); leave `prior` out")

    @property
    def bayesian(self) -> bool:
        """Whether the network has standard deviations."""
        return self.mode != "map"

    @property
    def has_learned_prior(self) -> bool:
        """Whether the prior is a posterior file rather than N(0, 1)."""
        return self.mode in ("vcl", "finetune")

    @property
    def base(self) -> Path | None:
        """The network to start from, if any: the prior or the initial network."""
        return self.prior if self.has_learned_prior else self.init
