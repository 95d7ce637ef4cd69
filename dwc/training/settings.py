"""What a person can set about a training run, and the checks that need nothing but the settings themselves.

One frozen dataclass serves the command line, the config file, the run folder's config.yaml and Python callers.
What the settings mean together with the files they name is checked in `plan`, before any work.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dwc.base.errors import InputError

__all__ = ["TrainSettings"]

_PATHS = ("data", "prior", "init", "out", "cache_dir")
_POSITIVE = ("grid_size", "voxel_size", "width", "lr", "rho_lr", "batch_size", "epochs", "steps_per_epoch")
# May change between a run and its resumption: where things lie and run, and for how long.
_FREE = (
    "data", "prior", "init", "out", "label_map", "cache_dir", "workers", "epochs", "stop_at_plateau",
    "activation_checkpointing",
)  # fmt: skip


@dataclass(frozen=True)
class TrainSettings:
    """Settings of one training run.

    Parameters
    ----------
    mode
        map: plain network, N(0, 1) prior. vi: first Bayesian network, N(0, 1) prior, means from --init.
        vcl: a site's network, starting from --prior. finetune: as vcl, the likelihood weighing one example volume.
    data
        Manifest CSV (image,label[,subject,site,split]) or BIDS-derivatives folder.
    out
        Run folder; made if need be, empty unless resumed.
    prior
        Bayesian posterior to start from and to stay close to (vcl and finetune).
    init
        Network whose means to start from (map and vi); for vi the paper takes the MAP network.
    label_map
        fifty, coarse, or a TSV of FreeSurfer ids and classes. By default that of --prior or --init, else fifty.
    grid_size
        Voxels along each edge of the conformed volume. By default that of --prior or --init, else 256.
    voxel_size
        Millimetres. By default that of --prior or --init, else 1.
    width
        Filters of each layer. By default that of --prior or --init, else 96.
    dilations
        One per 3x3x3 layer, as [1,1,2]. By default those of --prior or --init, else [1,1,1,2,4,8,1].
    lr
        Adam's learning rate; its highest with one_cycle.
    rho_lr
        Learning rate of rho, where sigma = softplus(rho). By default lr, which moves log sigma by at most lr a step:
        in a short run sigma then stays at its prior's value, and consolidation adds the sites' shifts.
    schedule
        constant, or one_cycle: up over the first three tenths of the steps, then down to zero, by cosines.
    batch_size
        Sub-volumes of 32x32x32 voxels per step, over all processes.
    epochs
        Epochs at most; each ends with validation, a log line and a checkpoint.
    steps_per_epoch
        By default one pass over the training sub-volumes.
    stop_at_plateau
        End with the first epoch after the training loss began to oscillate around a stable value (constant schedule).
    plateau_window
        Steps over which the plateau is judged, a multiple of 20.
    validation_sub_volumes
        Held-out sub-volumes scored after each epoch, at most; drawn once by the seed.
    test_fraction
        Part of the subjects held out, where the manifest has no split column; as for --prior or --init then.
    seed
        Fixes the initial weights, the order of the data, the noise and, where the manifest has no split column, the
        split; it must be that of --prior or --init then.
    stream
        Which of many streams of noise the run draws from, under the same seed. Sites that train from one prior take
        different ones; `dwc federated` gives each its own.
    workers
        Processes that load data, for each that trains; the result does not depend on them.
    cache_dir
        Folder for the conformed sub-volumes; may be shared between runs. By default OUT/cache.
    device
        auto (a GPU where there is one), cpu or cuda.
    precision
        fp32, or bf16 for autocast.
    activation_checkpointing
        Compute the hidden layers a second time in the backward, with the same noise, instead of keeping all that it
        needs: 0.6 of a step's memory at its peak, one forward more, the same result.
    """

    mode: Literal["map", "vi", "vcl", "finetune"] = "map"
    data: Path | None = None
    out: Path | None = None
    prior: Path | None = None
    init: Path | None = None
    label_map: str | None = None
    grid_size: int | None = None
    voxel_size: float | None = None
    width: int | None = None
    dilations: tuple[int, ...] | None = None
    lr: float = 1e-3
    rho_lr: float | None = None
    schedule: Literal["constant", "one_cycle"] = "constant"
    batch_size: int = 10
    epochs: int = 50
    steps_per_epoch: int | None = None
    stop_at_plateau: bool = False
    plateau_window: int = 400
    validation_sub_volumes: int = 512
    test_fraction: float = 0.1
    seed: int = 0
    stream: int = 0
    workers: int = 0
    cache_dir: Path | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in _PATHS:
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, Path(path).expanduser().absolute())
        if self.dilations is not None:
            object.__setattr__(self, "dilations", tuple(self.dilations))
        if self.label_map is not None and Path(self.label_map).is_file():
            object.__setattr__(self, "label_map", str(Path(self.label_map).absolute()))

    @property
    def bayesian(self) -> bool:
        """Whether the mode trains a Bayesian network."""
        return self.mode != "map"

    @property
    def base(self) -> Path | None:
        """The network that training starts from: the prior, the initial network or none."""
        return self.prior if self.mode in ("vcl", "finetune") else self.init

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises
        ------
        InputError
            Naming the setting, its value and the remedy.
        """
        if self.data is None:
            raise InputError(
                "no data: give --data manifest.csv (columns image,label[,subject,site,split]) and --out DIR; "
                "to see the whole cycle on simulated sites run `make demo` or `dwc demo`"
            )
        if self.out is None:
            raise InputError("no run folder: give --out DIR, a new or empty folder")
        if self.mode in ("vcl", "finetune"):
            if self.prior is None:
                raise InputError(f"--mode {self.mode} needs a prior: give --prior posterior.safetensors")
            if self.init is not None:
                raise InputError(f"--init {self.init}: --mode {self.mode} starts from its prior; leave --init out")
        elif self.prior is not None:
            raise InputError(f"--prior {self.prior}: --mode {self.mode} has the prior N(0, 1); leave --prior out")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"--{name} {value}: give a positive number")
        if self.dilations is not None and (not self.dilations or min(self.dilations) < 1):
            raise InputError(f"--dilations {list(self.dilations)}: give positive numbers, such as [1,1,1,2,4,8,1]")
        if self.plateau_window < 20 or self.plateau_window % 20:
            raise InputError(f"--plateau_window {self.plateau_window}: give a positive multiple of 20 steps")
        if min(self.seed, self.stream, self.workers, self.validation_sub_volumes) < 0:
            raise InputError("--seed, --stream, --workers and --validation_sub_volumes: give numbers >= 0")
        if self.schedule == "one_cycle" and self.stop_at_plateau:
            raise InputError("--stop_at_plateau true: a one_cycle schedule ends by itself; leave one of the two out")

    def to_json(self) -> dict[str, Any]:
        """The settings as plain values: a config file that gives the same run."""
        values = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}
        values["dilations"] = None if self.dilations is None else list(self.dilations)
        return values

    def binding(self) -> dict[str, Any]:
        """Those that a resumed run must share with its start, and that the posterior's header tells: no paths."""
        values = {name: value for name, value in self.to_json().items() if name not in _FREE}
        if self.schedule != "constant":
            values["epochs"] = self.epochs  # a cycle's length decides every step of it
        if not self.stream:
            del values["stream"]  # only a run that has one tells of it
        return values
