"""Score networks on labelled scans: predict whole volumes and average over scans and sites.

Volumes are scored on the networks' conformed grid, against labels conformed the same way.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from dwc.base.devices import choose_device
from dwc.base.errors import InputError, printable
from dwc.base.files import open_folder, write_whole
from dwc.base.tables import as_csv
from dwc.data.admission import admit
from dwc.data.cache import prepare
from dwc.data.dataset import SubVolumes
from dwc.data.grid import Grid
from dwc.data.labels import LabelMap
from dwc.data.manifest import Scan, has_split_column, labelled, read_manifest
from dwc.meshnet import MeshNet
from dwc.metrics.calibration import CalibrationCounts
from dwc.metrics.confusion import confusion_matrix, dice, mean_dice
from dwc.posterior import Posterior
from dwc.prediction import Ensemble, load_networks, predict_volume
from dwc.prediction_settings import RESULTS, PredictionSettings

__all__ = [
    "Evaluation", "Score", "calibration", "evaluate", "per_class", "per_site", "per_volume",
    "scans_to_score", "score_volumes", "summary",
]  # fmt: skip

_MEANS = {"dice": False, "dice_with_background": True}


@dataclass(frozen=True)
class Score:
    """The scores of one predicted volume: `confusion_matrix`, `CalibrationCounts.frame`, and nll in nats per voxel."""

    scan: Scan
    confusion: Tensor
    calibration: pd.DataFrame
    nll: float


@dataclass(frozen=True)
class Evaluation:
    """Scores of networks on a manifest, as `evaluate` returns them.

    Attributes
    ----------
    per_class : DataFrame
        A row per volume and class: site, subject, image, class, name, dice (Eq. 18), truth_mm3, predicted_mm3.
    per_volume : DataFrame
        A row per volume: site, subject, image, n_classes, dice, dice_with_background (means over the classes present
        in the truth), nll (nats per voxel).
    per_site : DataFrame
        A row per site and class: site, class, name, n_volumes, dice, dice_sd.
    summary : dict
        JSON: the networks, the data and the means.
    """

    per_class: pd.DataFrame
    per_volume: pd.DataFrame
    per_site: pd.DataFrame
    summary: dict[str, Any]

    def write(self, out: Path) -> None:
        """Write per_class.csv, per_volume.csv, per_site.csv and summary.json into the folder `out`."""
        open_folder(out)
        tables = (self.per_class, self.per_volume, self.per_site)
        contents = [as_csv(table) for table in tables]
        for name, content in zip(RESULTS, [*contents, json.dumps(self.summary, indent=2)], strict=True):
            write_whole(out / name, content.encode())


def evaluate(
    network: str | Path | Posterior | Ensemble | Sequence[str | Path | Posterior],
    data: str | Path,
    settings: PredictionSettings | None = None,
    *,
    split: str = "test",
    split_seed: int | None = None,
    test_fraction: float | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = False,
) -> Evaluation:
    """Score networks on the scans of a manifest that they were not trained on.

    Parameters
    ----------
    network
        A posterior or its file, several for an ensemble, or the result of `load_networks`.
    data : path
        Manifest or BIDS folder, with labels.
    settings
        Draws of the weights, their seed, device and precision.
    split : str
        test, train or all: which scans. Those of the manifest's split column, else the split by subject.
    split_seed : int, optional
        Of the split by subject; by default the networks' own.
    test_fraction : float, optional
        Of the split by subject; by default the networks' own.
    cache_dir : path, optional
        Folder for conformed scans; a temporary one by default.
    progress : bool
        Show a progress bar.
    """
    settings = PredictionSettings.check_type(settings or PredictionSettings(), "settings")
    device = choose_device(settings.device)
    ensemble = network if isinstance(network, Ensemble) else load_networks(network, settings.label_map)
    scans = scans_to_score(
        Path(data), ensemble.posteriors, split=split, split_seed=split_seed, test_fraction=test_fraction
    )
    with tempfile.TemporaryDirectory() as temporary:
        where = ensemble.label_map, ensemble.grid, cache_dir or temporary
        admit(scans, *where, progress=progress)
        volumes = prepare(scans, *where, intensity=ensemble.intensity, progress=progress)
        scores = score_volumes(
            ensemble.networks, volumes, n_samples=settings.n_samples, seed=settings.seed, device=device,
            precision=settings.precision, progress=progress, memory_limit=settings.memory_limit,
        )  # fmt: skip
    about = {
        "networks": [{"file": str(posterior.name), "sha256": posterior.sha256} for posterior in ensemble.posteriors],
        "data": str(data),
        "split": split,
        "n_samples": settings.n_samples,
        "seed": settings.seed,
    }
    return Evaluation(
        per_class(scores, ensemble.label_map, ensemble.grid),
        per_volume(scores),
        per_site(scores, ensemble.label_map, ensemble.grid),
        {**about, **summary(scores)},
    )


def scans_to_score(
    manifest: Path,
    posteriors: Sequence[Posterior],
    *,
    split: str = "test",
    split_seed: int | None = None,
    test_fraction: float | None = None,
) -> list[Scan]:
    """The labelled scans in a part of a manifest's split ("test", "train" or "all") as the networks were trained on it.

    A split column in the manifest decides. Without one, the split is made again from the seed and test fraction in the
    networks' headers, on which they must agree, or from `split_seed` and `test_fraction`. A consolidated network's
    header has neither, so that the seed must be given; the fraction is then 0.1 by default.
    """
    split_is_open = split != "all" and split_seed is None and not has_split_column(manifest)
    splits: list[tuple[str, list[Scan]]] = []
    for posterior in posteriors:
        training = posterior.metadata.get("training") or {}
        if split_is_open and not training:
            raise InputError(
                f"{posterior.name}: does not say which split it was trained on, as consolidated networks never do; "
                f"add a split column to {manifest}, or give the `split_seed` and `test_fraction` of its sites"
            )
        seed = training.get("seed", 0) if split_seed is None else split_seed
        fraction = training.get("test_fraction", 0.1) if test_fraction is None else test_fraction
        scans = read_manifest(manifest, seed=seed, test_fraction=fraction)
        splits.append((posterior.name, [scan for scan in scans if split in ("all", scan.split)]))
    first, scans = splits[0]
    for name, others in splits[1:]:
        if {scan.image for scan in others} != {scan.image for scan in scans}:
            raise InputError(
                f"{manifest}: {name} was trained on another split of it than {first}; add a split column to it"
            )
    if not scans:
        raise InputError(f"{manifest}: has no scan to {split} on; set split to {split} for some, or give `split` all")
    return labelled(scans, manifest, "scores need one, name it or leave the scan out")


def score_volumes(
    networks: Sequence[MeshNet],
    data: SubVolumes,
    *,
    n_samples: int = 10,
    seed: int = 0,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    memory_limit: float | None = None,
    progress: bool = True,
) -> list[Score]:
    """Predict each volume of prepared scans and compare it with its labels; arguments as in `predict_volume`."""
    scores = []
    for v, scan in enumerate(data.scans):
        image, truth = data.volume(v)
        prediction = predict_volume(
            networks, image, intensity=data.intensity, n_samples=n_samples, seed=seed, device=device,
            precision=precision, memory_limit=memory_limit, truth=truth,
            progress=f"{printable(scan.subject)} ({v + 1} of {data.n_volumes})" if progress else None,
        )  # fmt: skip
        counts = CalibrationCounts(data.label_map.n_classes)
        counts.add(prediction.confidence, prediction.entropy, prediction.labels == truth)
        assert truth is not None  # `scans_to_score` refuses scans without labels
        confusion = confusion_matrix(truth, prediction.labels, data.label_map.n_classes)
        assert prediction.log_likelihood is not None
        scores.append(Score(scan, confusion, counts.frame(), -prediction.log_likelihood / truth.size))
    return scores


def per_class(scores: Sequence[Score], label_map: LabelMap, grid: Grid) -> pd.DataFrame:
    """A row per volume and class: site, subject, image, class, name, dice, truth_mm3, predicted_mm3.

    dice is empty if the truth has no voxel of the class; image is as in `per_volume`.
    """
    parts = []
    for score, who in zip(scores, _who(scores), strict=True):
        part = pd.DataFrame({"class": range(label_map.n_classes), "name": label_map.names})
        part["dice"] = dice(score.confusion).numpy()
        for column, axis in (("truth_mm3", 1), ("predicted_mm3", 0)):
            part[column] = score.confusion.sum(dim=axis).numpy() * grid.voxel_size**3
        for position, (column, value) in enumerate(who.items()):
            part.insert(position, column, value)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def per_volume(scores: Sequence[Score]) -> pd.DataFrame:
    """A row per volume: site, subject, image, n_classes, dice, dice_with_background, nll.

    n_classes are those in the truth, without background. Dice is their mean, without and with background. nll is the
    mean negative log-likelihood of the truth, nats per voxel. image is the file name or, if that is not unique for a
    subject, the path relative to the images' common folder.
    """
    rows = []
    for score, who in zip(scores, _who(scores), strict=True):
        present = (score.confusion.sum(dim=1) > 0)[1:]
        means = {name: mean_dice(score.confusion, with_background=flag) for name, flag in _MEANS.items()}
        rows.append({**who, "n_classes": int(present.sum()), **means, "nll": score.nll})
    return pd.DataFrame(rows)


def per_site(scores: Sequence[Score], label_map: LabelMap, grid: Grid) -> pd.DataFrame:
    """A row per site and class: site, class, name, n_volumes (with the class in the truth), dice, dice_sd."""
    groups = per_class(scores, label_map, grid).groupby(["site", "class", "name"], sort=True)["dice"]
    return groups.agg(n_volumes="count", dice="mean", dice_sd="std").reset_index()


def calibration(scores: Sequence[Score]) -> pd.DataFrame:
    """`CalibrationCounts.frame` summed over the volumes of each site, with a column site."""
    parts = pd.concat((score.calibration.assign(site=score.scan.site) for score in scores), ignore_index=True)
    bins = ["site", "kind", "bin", "low", "high"]
    return parts.groupby(bins, sort=True)[["n", "correct", "sum"]].sum().reset_index()


def summary(scores: Sequence[Score]) -> dict[str, Any]:
    """Means per site and over sites, as JSON.

    ``sites`` has each site's number of volumes and mean `per_volume` Dice. ``volume_weighted`` averages over volumes,
    ``site_mean`` over sites. null where no volume has a class to score.
    """
    table = per_volume(scores)
    names = list(_MEANS)
    by_site = table.groupby("site", sort=True)[names].mean()
    counts = table.groupby("site").size()
    return {
        "n_volumes": len(table),
        "sites": {site: {"n_volumes": int(counts[site]), **_json(row)} for site, row in by_site.iterrows()},
        "volume_weighted": _json(table[names].mean()),
        "site_mean": _json(by_site.mean()),
    }


def _who(scores: Sequence[Score]) -> list[dict[str, str]]:
    """Site, subject and a unique image name of each volume; a subject's sessions often share a file name."""
    scans = [score.scan for score in scores]
    names = [scan.image.name for scan in scans]
    if len({(scan.site, scan.subject, name) for scan, name in zip(scans, names, strict=True)}) < len(scans):
        paths = [os.path.abspath(scan.image) for scan in scans]
        folder = os.path.commonpath(paths)
        names = [os.path.relpath(path, folder) for path in paths]
    return [
        {"site": scan.site, "subject": scan.subject, "image": name} for scan, name in zip(scans, names, strict=True)
    ]


def _json(means: pd.Series) -> dict[str, float | None]:
    return {name: None if pd.isna(value) else float(value) for name, value in means.items()}
