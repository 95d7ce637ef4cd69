"""Everything a training run needs to know before its first step, checked: files, prior, label map, folder, device.

`plan_run` resolves what the settings leave to the prior and refuses what does not fit together, before any work; the
work is `training`'s.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from dwc.base.devices import choose_device
from dwc.base.errors import InputError
from dwc.base.files import PARTS, sweep, write_whole
from dwc.base.ranks import world_size
from dwc.data.dataset import SubVolumes
from dwc.data.grid import SIDE, Grid
from dwc.data.labels import SHIPPED, LabelMap
from dwc.data.manifest import Scan, has_split_column, read_manifest
from dwc.meshnet import DILATIONS, checked_architecture, describe
from dwc.posterior import Posterior
from dwc.training.settings import TrainSettings
from dwc.training.state import load_checkpoint

__all__ = ["LOCK", "Plan", "bind", "labelled_scans", "plan_run"]

LOCK = ".lock"  # in a run folder, held by the process that writes there


@dataclass(frozen=True)
class Plan:
    """A checked run.

    Attributes
    ----------
    settings : TrainSettings
        With nothing left to a prior.
    base : Posterior or None
        The prior (vcl, finetune) or the initial network (map, vi).
    label_map, grid
        Classes and grid of the data.
    train_scans, test_scans : list of Scan
        All with labels.
    device : torch.device
        Where it runs.
    checkpoint : (tensors, state) or None
        Where it goes on.
    """

    settings: TrainSettings
    base: Posterior | None
    label_map: LabelMap
    grid: Grid
    train_scans: list[Scan]
    test_scans: list[Scan]
    device: torch.device
    checkpoint: tuple[dict[str, torch.Tensor], dict[str, Any]] | None

    @property
    def has_learned_prior(self) -> bool:
        """Whether the base is the prior, rather than a place to start from."""
        return self.settings.mode in ("vcl", "finetune")

    @property
    def base_flag(self) -> str:
        """The flag that names the base."""
        return "--prior" if self.has_learned_prior else "--init"

    @property
    def cache_dir(self) -> Path:
        """Folder of the conformed sub-volumes."""
        return self.settings.cache_dir or self.settings.out / "cache"

    def header(self) -> dict[str, Any]:
        """What the trained posterior tells of its making, and a prior must share: all but what training adds."""
        settings = self.settings
        return {
            "architecture": describe(self.label_map.n_classes, settings.width, settings.dilations),
            "label_map": {"name": self.label_map.name, "sha256": self.label_map.sha256},
            "preprocessing": {
                "grid_size": self.grid.size,
                "voxel_size": self.grid.voxel_size,
                "sub_volume": SIDE,
                "intensity": "z-score per volume",
            },
        }

    def write_config(self) -> None:
        """Write the run folder's config.yaml and clear away what a kill has left.

        Raises
        ------
        InputError
            If it cannot be written.
        """
        text = yaml.safe_dump(self.settings.to_json(), sort_keys=False)
        write_whole(self.settings.out / "config.yaml", text.encode())
        sweep(self.settings.out)


def plan_run(settings: TrainSettings, *, resume: bool = False) -> Plan:
    """Check a run and resolve its settings; writes nothing.

    Raises
    ------
    InputError
        Naming the setting or file that is wrong, and the remedy.
    """
    settings.check()
    _check_folder(settings.out, resume=resume)
    device = choose_device(settings.device)
    base = None if settings.base is None else Posterior.load(settings.base)
    settings = replace(_inherit(settings, base), device=device.type)
    label_map = _label_map(settings.label_map, base)
    grid = Grid(settings.grid_size, settings.voxel_size)
    if grid.size % SIDE:
        raise InputError(f"--grid_size {grid.size}: give a multiple of {SIDE}, the edge of a sub-volume")
    if settings.batch_size < world_size():
        raise InputError(
            f"--batch_size {settings.batch_size}: is fewer than the {world_size()} processes; give each a sub-volume, "
            f"or start fewer"
        )
    train_scans, test_scans = labelled_scans(settings)
    path = settings.out / "checkpoint.safetensors"
    checkpoint = load_checkpoint(path) if resume and path.exists() else None
    plan = Plan(settings, base, label_map, grid, train_scans, test_scans, device, checkpoint)
    _check_base(plan)
    _check_split(plan)
    _check_checkpoint(plan, path)
    return plan


def labelled_scans(settings: TrainSettings) -> tuple[list[Scan], list[Scan]]:
    """The scans to train on and those held out.

    Raises
    ------
    InputError
        If the manifest is wrong, a scan has no label, or none is left to train on.
    """
    scans = read_manifest(settings.data, seed=settings.seed, test_fraction=settings.test_fraction)
    for scan in scans:
        if scan.label is None:
            raise InputError(f"{settings.data}: {scan.image} has no label; training needs one for each scan")
    train_scans, test_scans = ([scan for scan in scans if scan.split == part] for part in ("train", "test"))
    if not train_scans:
        raise InputError(f"{settings.data}: has no scan to train on; set split to train for some")
    return train_scans, test_scans


def _check_folder(out: Path, *, resume: bool) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; give a folder as --out")
    files = out.iterdir() if out.exists() else ()
    found = {path.name for path in files if not path.match(PARTS)} - {"cache", LOCK}
    if found and not resume:
        raise InputError(f"{out}: is not empty; give another --out, or add --resume to go on with the run in it")
    if resume and not out.exists():
        raise InputError(f"{out}: no such run to resume; leave --resume out to start it")
    if resume and found and "config.yaml" not in found:
        raise InputError(f"{out}: holds no run (no config.yaml); give the --out of the run to resume")
    existing = next(path for path in (out, *out.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{existing}: is not a writable folder; give another --out")


def _inherit(settings: TrainSettings, base: Posterior | None) -> TrainSettings:
    """Fill in what is left open: from the prior or the initial network, else the paper's."""
    metadata = base.metadata if base else {}
    architecture = checked_architecture(base) if base else {}
    preprocessing = metadata.get("preprocessing") or {}
    values = {
        "label_map": (metadata.get("label_map") or {}).get("name", "fifty"),
        "grid_size": preprocessing.get("grid_size", 256),
        "voxel_size": preprocessing.get("voxel_size", 1.0),
        "width": architecture.get("width", 96),
        "dilations": tuple(architecture.get("dilations", DILATIONS)),
    }
    if settings.label_map is None and values["label_map"] not in SHIPPED:
        raise InputError(
            f"{settings.base}: was trained on label map {values['label_map']!r}; give its TSV as --label_map"
        )
    return replace(settings, **{name: value for name, value in values.items() if getattr(settings, name) is None})


def _label_map(name_or_path: str, base: Posterior | None) -> LabelMap:
    """The label map; by the base's name for it where it is the same table, whatever its file is called here."""
    label_map = LabelMap.load(name_or_path)
    theirs = (base.metadata.get("label_map") or {}) if base else {}
    return replace(label_map, name=theirs["name"]) if theirs.get("sha256") == label_map.sha256 else label_map


def _check_base(plan: Plan) -> None:
    """The network that training starts from must have this run's architecture, classes and grid."""
    if plan.base is None:
        return
    flag = plan.base_flag
    if plan.has_learned_prior and not plan.base.is_bayesian:
        raise InputError(f"--prior {plan.base.name}: is a MAP network; train one with --mode vi from it first")
    for key, ours in plan.header().items():
        theirs = plan.base.metadata.get(key)
        if theirs != ours:
            differing = [name for name in ours if not isinstance(theirs, dict) or theirs.get(name) != ours[name]]
            raise InputError(
                f"{flag} {plan.base.name}: its {key.replace('_', ' ')} differs from this run's in "
                f"{', '.join(differing) or 'its entries'}; leave --width, --dilations, --label_map, --grid_size and "
                f"--voxel_size out to take the file's"
            )


def _check_split(plan: Plan) -> None:
    """Where seed and fraction split the data, they must be the base's: what it trained on is not held out later."""
    training = (plan.base.metadata.get("training") or {}) if plan.base else {}
    if not training or has_split_column(plan.settings.data):
        return
    names = ("seed", "test_fraction")
    theirs, ours = ({name: values.get(name) for name in names} for values in (training, plan.settings.binding()))
    if theirs != ours:
        raise InputError(
            f"{plan.base_flag} {plan.base.name}: was trained on the split of --seed {theirs['seed']} --test_fraction "
            f"{theirs['test_fraction']}; give the same, or a split column in {plan.settings.data}"
        )


def _check_checkpoint(plan: Plan, path: Path) -> None:
    """A resumed run must be the one that wrote the checkpoint."""
    if plan.checkpoint is None:
        return
    ours, theirs = binding(plan), plan.checkpoint[1]["binding"]
    names = [name for name in {**ours, **theirs} if name != "data"]  # of which `bind` knows more
    differing = [
        f"{name} {theirs.get(name)!r}, now {ours.get(name)!r}" for name in names if theirs.get(name) != ours.get(name)
    ]
    if differing:
        raise InputError(
            f"{path}: was written with {'; '.join(differing)}; resume with the settings of its config.yaml"
        )


def binding(plan: Plan) -> dict[str, Any]:
    """What a run and its resumption must share for the same bits, apart from the data."""
    return {
        **plan.settings.binding(),
        "label_map_sha256": plan.label_map.sha256,
        "base_sha256": plan.base.sha256 if plan.base else None,
    }


def bind(plan: Plan, data: SubVolumes, held_out: SubVolumes) -> dict[str, Any]:
    """What a run and its resumption must share for the same bits, with the content of the prepared data.

    Raises
    ------
    InputError
        If the run goes on with other data than it began with.
    """
    digests = {"train": data.digest, "test": held_out.digest}
    if plan.checkpoint is not None:
        theirs = plan.checkpoint[1]["binding"].get("data") or {}
        differing = [part for part, digest in digests.items() if theirs.get(part) != digest]
        if differing:
            raise InputError(
                f"--data {plan.settings.data}: its {' and '.join(differing)} scans are not those that the run in "
                f"{plan.settings.out} began with; give the same scans, or another --out to start anew"
            )
    return {**binding(plan), "data": digests}
