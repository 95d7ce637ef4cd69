"""`dwc data check`: what is wrong or odd about the scans of a manifest or a folder, before anything runs on them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from dwc.base.errors import InputError, printable
from dwc.base.settings import Settings
from dwc.commands.arguments import add_settings, new_parser, parse
from dwc.data.constants import SIDE

if TYPE_CHECKING:
    from dwc.data.findings import CheckedScan
    from dwc.data.labels import LabelMap

__all__ = ["main"]


@dataclass(frozen=True, kw_only=True)
class CheckSettings(Settings):
    """What scans are checked against.

    Parameters
    ----------
    label_map
        fifty, coarse, or a TSV of FreeSurfer ids and classes.
    grid_size
        Voxels along each edge of the conformed volume.
    voxel_size
        Millimetres.
    split_seed
        Seed of the split, where the manifest has no split column.
    test_fraction
        Share of the subjects held out then.
    threads
        By default one per core, up to 8.
    """

    label_map: str = "fifty"
    grid_size: int = 256
    voxel_size: float = 1.0
    split_seed: int = 0
    test_fraction: float = 0.1
    threads: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("grid_size", "voxel_size", "threads")
        self._require("grid_size", self.grid_size % SIDE == 0, f"give a multiple of {SIDE}, the edge of a sub-volume")
        self._require("split_seed", self.split_seed >= 0, "give a number >= 0")
        self._require("test_fraction", 0 <= self.test_fraction < 1, "give a share in [0, 1)")


def main(arguments: Sequence[str]) -> None:
    """Run one of the steps; there is one."""
    parser = new_parser("data", "Look at data before anything runs on them.")
    steps = parser.add_subcommands(dest="step")
    check = new_parser("data check", "Check scans and labels: a row for each, what is wrong or odd, class frequencies.")
    _add_arguments(check)
    steps.add_subcommand("check", check, help=check.description)
    _check(parse(parser, arguments).check)


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("data", type=Path, help="manifest CSV, BIDS data set or folder of volumes")
    add_settings(parser, CheckSettings)
    parser.add_argument("--json", type=bool, default=False, help="print JSON instead of a table")


def _check(values: Namespace) -> None:
    from dwc.data.checks import check_scans  # after the arguments, so that help is quick
    from dwc.data.grid import Grid
    from dwc.data.labels import LabelMap
    from dwc.data.manifest import read_manifest

    settings = CheckSettings(**{name: values[name] for name in CheckSettings.__dataclass_fields__})
    grid, label_map = Grid(settings.grid_size, settings.voxel_size), LabelMap.load(settings.label_map)
    scans = read_manifest(values.data, seed=settings.split_seed, test_fraction=settings.test_fraction, lenient=True)
    checked = check_scans(scans, grid, label_map, workers=settings.threads)
    n_refused = sum(one.is_refused for one in checked)
    n_odd = sum(bool(one.findings) and not one.is_refused for one in checked)
    n_labelled = sum(one.scan.label is not None for one in checked)
    summary = f"{len(checked)} scans, {n_labelled} with labels: {n_refused} refused, {n_odd} odd"
    if values.json:
        print(json.dumps(_as_json(checked, label_map, summary), indent=1))
    else:
        print("\n".join(map(printable, [*_rows(checked), *_frequencies(checked, label_map), summary])))
    if n_refused:
        raise InputError(f"{values.data}: {summary}")


def _rows(checked: Sequence["CheckedScan"]) -> list[str]:
    """A row per scan, with its findings below."""
    table = [("", "image", "subject", "site", "split", "voxels", "mm", "axes", "levels", "unlisted", "on signal")]
    for one in checked:
        facts = one.facts
        verdict = "odd" if one.findings else "ok"
        if one.is_refused:
            verdict = "refused"
        table.append(
            (
                verdict, one.scan.image.name, one.scan.subject, one.scan.site, one.scan.split,
                "x".join(map(str, facts.get("shape", ()))), "x".join(f"{mm:g}" for mm in facts.get("voxel_mm", ())),
                facts.get("axes", ""), str(facts.get("grey_levels", "")), _share(facts.get("unlisted_ids")),
                _share(facts.get("labels_on_signal")),
            )
        )  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    rows = [lines[0]]
    for line, one in zip(lines[1:], checked, strict=True):
        rows += [line, *(f"    {finding.severity}: {finding.message}" for finding in one.findings)]
    return rows


def _frequencies(checked: Sequence["CheckedScan"], label_map: "LabelMap") -> list[str]:
    rows = _classes(checked, label_map)
    if not rows:
        return []
    width = max(len(row["name"]) for row in rows)
    return [
        f"{'class':<{width + 5}}{'of labelled':>12}{'scans':>7}",
        *(f"{row['class']:>3}  {row['name']:<{width}}{row['share']:>12.3%}{row['scans']:>7}" for row in rows),
    ]


def _classes(checked: Sequence["CheckedScan"], label_map: "LabelMap") -> list[dict[str, Any]]:
    """Each class but the background: its share of the labelled voxels, and how many scans have it."""
    import numpy as np

    counts = [one.voxels_of_class[1:] for one in checked if one.voxels_of_class is not None]
    if not counts:
        return []
    voxels, scans = np.sum(counts, axis=0), np.count_nonzero(counts, axis=0)
    return [
        {"class": k, "name": name, "share": float(voxels[k - 1] / max(voxels.sum(), 1)), "scans": int(scans[k - 1])}
        for k, name in enumerate(label_map.names[1:], 1)
    ]


def _as_json(checked: Sequence["CheckedScan"], label_map: "LabelMap", summary: str) -> dict[str, Any]:
    scans = []
    for one in checked:
        findings = [vars(finding) for finding in one.findings]
        label = None if one.scan.label is None else str(one.scan.label)
        who = {"image": str(one.scan.image), "label": label, "subject": one.scan.subject, "site": one.scan.site}
        scans.append({**who, "split": one.scan.split, "refused": one.is_refused, **one.facts, "findings": findings})
    return {"summary": summary, "scans": scans, "classes": _classes(checked, label_map)}


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
