"""Resolve settings and the files they name into one specification of a training run, before its first step.

Whether a run may resume is decided by its identity: everything that determines the bits of the result.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml

from dwc.base.devices import choose_device
from dwc.base.errors import InputError, difference
from dwc.base.files import PARTS, sweep, write_whole
from dwc.base.ranks import world_size
from dwc.data.constants import SHIPPED, SIDE
from dwc.data.dataset import SubVolumes
from dwc.data.grid import Grid
from dwc.data.intensity import IN_HEADERS, Scheme
from dwc.data.labels import LabelMap
from dwc.data.manifest import Scan, has_split_column, labelled, read_manifest
from dwc.meshnet import DILATIONS, WIDTH, checked_architecture, describe
from dwc.natural import check_alike
from dwc.posterior import Posterior
from dwc.training.settings import CubeSettings, TrainSettings, without_later
from dwc.training.state import Checkpoint, fingerprint_of, load_checkpoint

__all__ = ["LOCK", "RunSpecification", "labelled_scans", "resolve"]

GRID = Grid()  # FreeSurfer's, by default
LOCK = ".lock"  # in the run folder, held by the process that writes there
# May change when a run is resumed: paths, the machine's settings and the length of the run.
_FREE = {
    "data", "prior", "init", "out", "label_map", "cache_dir", "workers", "epochs", "stop_at_plateau",
    "activation_checkpointing",
}  # fmt: skip


@dataclass(frozen=True)
class RunSpecification:
    """A fully resolved run.

    `base` is the prior (vcl, finetune) or the initial network (map, vi), and `start` the network to start from. All
    scans have labels. `data` holds the SHA-256 of the training and test data once they are prepared.
    """

    settings: TrainSettings
    base: Posterior | None
    start: Posterior | None
    label_map: LabelMap
    grid: Grid
    train_scans: list[Scan]
    test_scans: list[Scan]
    device: torch.device
    data: Mapping[str, str] | None = None

    @property
    def cache_dir(self) -> Path:
        return self.settings.cache_dir or self.settings.out / "cache"

    @property
    def intensity(self) -> Scheme:
        return self.settings.intensity or "z_score"

    @cached_property
    def header(self) -> dict[str, Any]:
        """The part of the posterior's header that must equal the prior's."""
        settings = self.settings
        return {
            "architecture": describe(
                self.label_map.n_classes,
                settings.width or WIDTH,
                settings.dilations or DILATIONS,
                activation=settings.activation or "relu",
            ),
            "label_map": {"name": self.label_map.name, "sha256": self.label_map.sha256},
            "preprocessing": {
                "grid_size": self.grid.size,
                "voxel_size": self.grid.voxel_size,
                "sub_volume": SIDE,
                "intensity": IN_HEADERS[self.intensity],
            },
        }

    @cached_property
    def decisive_settings(self) -> dict[str, Any]:
        """The settings that determine the result, without paths; they go into the posterior's header."""
        values = {name: value for name, value in self.settings.to_json().items() if name not in _FREE}
        if self.settings.schedule != "constant":
            values["epochs"] = self.settings.epochs  # every step depends on the length of the cycle
        cubes = {field.name for field in fields(CubeSettings)}
        values = {name: value for name, value in values.items() if name not in cubes} | self.settings.decisive_cubes()
        return without_later(values)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that determines the bits of the result; a run and its resumption share it."""
        return {
            **self.decisive_settings,
            "label_map_sha256": self.label_map.sha256,
            "base_sha256": self.base.sha256 if self.base else None,
            **({"start_sha256": self.start.sha256} if self.start is not None and self.start is not self.base else {}),
            **({} if self.data is None else {"data": dict(self.data)}),
        }

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the identity, in hex."""
        return fingerprint_of(self.identity)

    def with_data(self, train: SubVolumes, test: SubVolumes) -> "RunSpecification":
        """The specification with the digests of its prepared data."""
        return replace(self, data={"train": train.digest, "test": test.digest})

    def check_resumes(self, checkpoint: Checkpoint | None) -> None:
        """Refuse the checkpoint of a different run, naming the differences; data are compared once prepared."""
        if checkpoint is None or checkpoint.fingerprint == self.fingerprint:
            return
        ours, theirs = dict(self.identity), dict(checkpoint.identity)
        our_data, their_data = ours.pop("data", None), theirs.pop("data", None) or {}
        differing = [
            f"{name} {theirs.get(name)!r}, now {ours.get(name)!r}"
            for name in {**ours, **theirs}
            if theirs.get(name) != ours.get(name)
        ]
        if differing:
            raise InputError(
                f"{self.settings.out}: the run was started with {'; '.join(differing)}; resume with the settings of "
                "its config.yaml"
            )
        other = [part for part, digest in (our_data or {}).items() if their_data.get(part) != digest]
        if other:
            raise InputError(
                f"`data` {self.settings.data}: its {' and '.join(other)} scans are not those of the run in "
                f"{self.settings.out}; give the same scans, or another `out` for a new run"
            )

    def check_config(self) -> None:
        """Without a checkpoint, refuse to restart in the folder of a run with a result or with other settings."""
        out = self.settings.out
        if (out / "posterior.safetensors").exists():
            raise InputError(f"{out}: has a posterior but no checkpoint to resume from; give another `out`")
        if not (out / "config.yaml").exists():
            return
        begun_with = _read_config(out / "config.yaml")
        ours = self.settings.to_json()
        differing = [
            f"{name} {begun_with[name]!r}, now {ours[name]!r}"
            for name in ours.keys() - _FREE
            if name in begun_with and begun_with[name] != ours[name]
        ]
        if differing:
            raise InputError(f"{out}: the run was started with {'; '.join(sorted(differing))}; give another `out`")

    def write_config(self) -> None:
        """Write config.yaml and remove temporary files left by a killed run."""
        text = yaml.safe_dump(self.settings.to_json(), sort_keys=False)
        write_whole(self.settings.out / "config.yaml", text.encode())
        sweep(self.settings.out)


def resolve(settings: TrainSettings, *, resume: bool = False) -> tuple[RunSpecification, Checkpoint | None]:
    """Resolve settings and the files they name, and load the checkpoint to resume from; writes nothing."""
    _check_folder(settings.out, resume=resume)
    device = choose_device(settings.device)
    base = None if settings.base is None else Posterior.load(settings.base)
    both = settings.prior is not None and settings.init is not None
    start = Posterior.load(settings.init) if settings.init is not None and both else base
    settings = replace(_inherit(settings, base), device="cuda" if device.type == "cuda" else "cpu")
    label_map = _label_map(settings.label_map or SHIPPED[0], base)
    grid = Grid(settings.grid_size or GRID.size, settings.voxel_size or GRID.voxel_size)
    if settings.batch_size < world_size():
        raise InputError(
            f"`batch_size` {settings.batch_size}: less than one sub-volume for each of the {world_size()} processes; "
            "give more, or start fewer processes"
        )
    train_scans, test_scans = labelled_scans(settings)
    path = settings.out / "checkpoint.safetensors"
    checkpoint = load_checkpoint(path) if resume and path.exists() else None
    specification = RunSpecification(settings, base, start, label_map, grid, train_scans, test_scans, device)
    _check_base(specification)
    _check_start(specification)
    _check_split(specification)
    specification.check_resumes(checkpoint)
    if resume and checkpoint is None:
        specification.check_config()
    return specification, checkpoint


def labelled_scans(settings: TrainSettings) -> tuple[list[Scan], list[Scan]]:
    """The training scans and the held-out scans; all must have labels."""
    scans = read_manifest(settings.data, seed=settings.seed, test_fraction=settings.test_fraction)
    scans = labelled(scans, settings.data, "training needs one for each scan")
    train_scans, test_scans = ([scan for scan in scans if scan.split == part] for part in ("train", "test"))
    if not train_scans:
        raise InputError(f"{settings.data}: has no scan to train on; set split to train for some")
    return train_scans, test_scans


def _read_config(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read; give another `out`") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds no settings; give another `out`")
    return values


def _check_folder(out: Path, *, resume: bool) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"`out` {out}: is a file; give a folder")
    files = out.iterdir() if out.exists() else ()
    found = {path.name for path in files if not path.match(PARTS)} - {"cache", LOCK}
    if found and not resume:
        raise InputError(f"{out}: is not empty; give another `out`, or `resume` to continue the run in it")
    if resume and not out.exists():
        raise InputError(f"{out}: no such run to resume; leave `resume` out to start it")
    if resume and found and "config.yaml" not in found:
        raise InputError(f"{out}: holds no run (no config.yaml); give the `out` of the run to resume")
    existing = next(path for path in (out, *out.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{existing}: is not a writable folder; give another `out`")


def _inherit(settings: TrainSettings, base: Posterior | None) -> TrainSettings:
    """Fill in open settings from the prior or the initial network, else with the paper's."""
    metadata = base.metadata if base else {}
    architecture = checked_architecture(base) if base else {}
    preprocessing = (base.entry("preprocessing") if base else None) or {}
    values = {
        "label_map": (metadata.get("label_map") or {}).get("name", SHIPPED[0]),
        "grid_size": preprocessing.get("grid_size", GRID.size),
        "voxel_size": preprocessing.get("voxel_size", GRID.voxel_size),
        "width": architecture.get("width", WIDTH),
        "dilations": tuple(architecture.get("dilations", DILATIONS)),
        "activation": architecture.get("activation", "relu"),
        "intensity": next(
            (scheme for scheme, text in IN_HEADERS.items() if text == preprocessing.get("intensity")), None
        ),
    }
    if settings.label_map is None and values["label_map"] not in SHIPPED:
        raise InputError(
            f"{settings.base}: was trained on label map {values['label_map']!r}; give its TSV as `label_map`"
        )
    return replace(settings, **{name: value for name, value in values.items() if getattr(settings, name) is None})


def _label_map(name_or_path: str, base: Posterior | None) -> LabelMap:
    """The label map, named as in the base if both are the same table."""
    label_map = LabelMap.load(name_or_path)
    theirs = (base.metadata.get("label_map") or {}) if base else {}
    return replace(label_map, name=theirs["name"]) if theirs.get("sha256") == label_map.sha256 else label_map


def _base_parameter(settings: TrainSettings) -> str:
    return "prior" if settings.has_learned_prior else "init"


def _check_base(specification: RunSpecification) -> None:
    """The base must have this run's architecture, classes and grid."""
    base, settings = specification.base, specification.settings
    if base is None:
        return
    if settings.has_learned_prior and not base.is_bayesian:
        raise InputError(f"`prior` {base.name}: is a MAP network; train one with `mode` vi from it first")
    for key, ours in specification.header.items():
        theirs = base.entry(key)
        if theirs != ours:
            their_values, our_values = difference(theirs, ours)
            raise InputError(
                f"`{_base_parameter(settings)}` {base.name}: its {key.replace('_', ' ')} differs from this run's in "
                f"{their_values}, here {our_values}; leave `width`, `dilations`, `activation`, `label_map`, "
                "`grid_size`, `voxel_size` and `intensity` out to take the file's"
            )


def _check_start(specification: RunSpecification) -> None:
    """A start beside the prior must be a network like it that Eq. 17's condition, sigma <= the prior's, allows."""
    prior, start = specification.base, specification.start
    if prior is None or start is None or start is prior:
        return
    if not start.is_bayesian:
        raise InputError(f"`init` {start.name}: is a MAP network; give the current network of the rounds")
    check_alike(start, prior)
    for name, sigma in start.sigma.items():
        if above := int((sigma > prior.sigma[name]).sum()):
            raise InputError(
                f"`init` {start.name}: {name}.sigma exceeds the prior's in {above} of {sigma.numel()} weights; give "
                "the current network and the cavity that was made from it"
            )


def _check_split(specification: RunSpecification) -> None:
    """Seed and fraction of the split must be the base's, so that scans it was trained on are not held out here."""
    base, settings = specification.base, specification.settings
    training = (base.metadata.get("training") or {}) if base else {}
    if base is None or not training or has_split_column(settings.data):
        return
    names = ("seed", "test_fraction")
    theirs, ours = ({name: values.get(name) for name in names} for values in (training, vars(settings)))
    if theirs != ours:
        raise InputError(
            f"`{_base_parameter(settings)}` {base.name}: was trained on the split of `seed` {theirs['seed']} and "
            f"`test_fraction` {theirs['test_fraction']}; give the same, or a split column in {settings.data}"
        )
