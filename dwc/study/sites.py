"""A study's scans: manifests that are given, or sites simulated once, and all training sites pooled into one.

Every scan is read and conformed here, before the first network trains. The room trains and scores nothing.
"""

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from dwc.base.errors import InputError
from dwc.base.files import open_folder, write_whole
from dwc.base.locks import held
from dwc.data.cache import is_prepared, prepare
from dwc.data.dataset import SubVolumes
from dwc.data.grid import Grid
from dwc.data.labels import LabelMap
from dwc.data.manifest import Scan, read_manifest
from dwc.simulation.scans import write_site
from dwc.study.settings import ALL_SITES, TRAINING_SITES, UNSEEN, StudySettings

__all__ = [
    "POOLED",
    "check_manifests",
    "held_out_if_prepared",
    "held_out_scans",
    "held_out_volumes",
    "known_manifests",
    "make_manifests",
    "prepare_all",
    "scans_held",
    "scans_of",
]

POOLED = "".join(TRAINING_SITES)  # the name of all training sites together


def known_manifests(settings: StudySettings) -> dict[str, Path]:
    """The manifests of the study's five sites: the given ones, or where the simulated ones are or will be."""
    if settings.manifests is not None:
        return dict(settings.manifests)
    return {site: settings.out / "sites" / site / "manifest.csv" for site in ALL_SITES}


def make_manifests(settings: StudySettings) -> dict[str, Path]:
    """The manifests of all sites, and of the training sites pooled (`POOLED`); simulates what is not there yet.

    Raises
    ------
    InputError
        If a manifest or a scan is bad, anatomies are too few, or the folder cannot be written.
    """
    manifests = known_manifests(settings)
    grid = Grid(settings.grid_size, settings.voxel_size)
    with scans_held(settings):
        for site, manifest in manifests.items():
            if settings.manifests is None and not manifest.exists():
                print(f"simulating site {site}", flush=True)
                write_site(
                    manifest.parent, site, settings.n_train.get(site, 0), settings.n_test[site], grid=grid,
                    seed=settings.seed, anatomies=settings.anatomies,
                )  # fmt: skip
        manifests[POOLED] = _pool(settings, manifests)
    return manifests


def scans_held(settings: StudySettings) -> AbstractContextManager:
    """Hold the study's scans, which one process makes and others wait for.

    Raises
    ------
    InputError
        If the folder cannot be written.
    """
    open_folder(settings.locks)
    return held(settings.locks / "scans", patience_s=math.inf)


def scans_of(settings: StudySettings, manifest: Path) -> list[Scan]:
    """A manifest's scans, split as the networks' training splits them.

    Raises
    ------
    InputError
        If the manifest is bad or a scan has no label.
    """
    scans = read_manifest(manifest, seed=settings.seed, test_fraction=settings.test_fraction)
    for scan in scans:
        if scan.label is None:
            raise InputError(f"{manifest}: {scan.image} has no label; a study needs one for each scan")
    return scans


def held_out_scans(settings: StudySettings, site: str, manifest: Path) -> list[Scan]:
    """The scans of a site that no network trains on: its test part, or all of the unseen site.

    Raises
    ------
    InputError
        As `scans_of`, and if there are none.
    """
    scans = [scan for scan in scans_of(settings, manifest) if site == UNSEEN or scan.split == "test"]
    if not scans:
        raise InputError(f"{manifest}: has no scan to test on; set split to test for some")
    return scans


def held_out_volumes(settings: StudySettings, site: str, manifest: Path) -> SubVolumes:
    """The prepared volumes of `held_out_scans`, each under the study's name of the site."""
    return _prepare(settings, [replace(scan, site=site) for scan in held_out_scans(settings, site, manifest)])


def held_out_if_prepared(settings: StudySettings, manifests: Mapping[str, Path]) -> dict[str, SubVolumes]:
    """`held_out_volumes` of those sites whose scans are there and prepared; writes nothing."""
    label_map, grid = LabelMap.load(settings.label_map), Grid(settings.grid_size, settings.voxel_size)
    return {
        site: held_out_volumes(settings, site, manifests[site])
        for site in ALL_SITES
        if manifests[site].exists()
        and is_prepared(held_out_scans(settings, site, manifests[site]), label_map, grid, settings.cache_dir)
    }


def check_manifests(settings: StudySettings) -> None:
    """Check the manifests that are given, before anything is written.

    Each is readable, with labels and scans in each part, and no image stands in two of them, under whatever name of a
    folder: a scan that one site trains on might be another's to test on. Copies of a file are not found.

    Raises
    ------
    InputError
        Naming the manifest.
    """
    site_of: dict[Path, str] = {}
    for site, manifest in (settings.manifests or {}).items():
        for scan in scans_of(settings, manifest):
            if (other := site_of.setdefault(scan.image.resolve(), site)) != site:
                raise InputError(f"{manifest}: {scan.image} is in the manifest of {other} too; give it to one site")
        if site != UNSEEN and not any(scan.split == "train" for scan in scans_of(settings, manifest)):
            raise InputError(f"{manifest}: has no scan to train on; set split to train for some")
        held_out_scans(settings, site, manifest)


def prepare_all(settings: StudySettings, manifests: dict[str, Path]) -> None:
    """Conform every scan of the study, so that a bad one is found before the first network trains.

    Raises
    ------
    InputError
        If a scan is bad or the cache cannot be written.
    """
    with scans_held(settings):
        for manifest in manifests.values():
            _prepare(settings, scans_of(settings, manifest), progress=True)


def _prepare(settings: StudySettings, scans: Sequence[Scan], *, progress: bool = False) -> SubVolumes:
    grid = Grid(settings.grid_size, settings.voxel_size)
    return prepare(scans, LabelMap.load(settings.label_map), grid, settings.cache_dir, progress=progress)


def _pool(settings: StudySettings, manifests: dict[str, Path]) -> Path:
    """The manifest of all training sites' scans, each in its site's part of the split.

    A subject is named by its site too: the same name at two sites of a study means two people.
    """
    folder = settings.out / "sites" / POOLED
    open_folder(folder)
    rows = [("image", "label", "subject", "site", "split")]
    for site in TRAINING_SITES:
        for scan in scans_of(settings, manifests[site]):
            files = (os.path.relpath(file, folder) for file in (scan.image, scan.label))
            rows.append((*files, f"{site}-{scan.subject}", site, scan.split))
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(rows)
    content = table.getvalue().encode()
    path = folder / "manifest.csv"
    if not path.exists() or path.read_bytes() != content:
        write_whole(path, content)
    return path
