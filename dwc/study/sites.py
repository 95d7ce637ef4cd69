"""A study's scans: check given manifests, simulate the other sites, pool sites, conform all scans."""

import csv
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from dwc.base.errors import InputError
from dwc.base.files import open_folder, write_whole
from dwc.simulation.scans import Site, load_sites, mixed_site, write_site
from dwc.study.context import Study

__all__ = ["begin", "check_manifests", "make_manifests", "pool", "simulate"]


def begin(study: Study, *, conform: bool = True) -> None:
    """Check manifests, write config.yaml and missing manifests, and conform all scans, which finds bad ones early."""
    check_manifests(study)
    study.keep_config()
    make_manifests(study)
    if conform:
        with study.scans_held():
            for site in study.settings.all_sites:
                study.prepare(study.scans(site), progress=True)


def check_manifests(study: Study) -> None:
    """Check the given manifests before anything is written; no image (by resolved path) may be in two of them."""
    site_of: dict[Path, str] = {}
    for site, manifest in (study.settings.manifests or {}).items():
        scans = study.scans(site)
        for scan in scans:
            if (other := site_of.setdefault(scan.image.resolve(), site)) != site:
                raise InputError(f"{manifest}: {scan.image} is in the manifest of {other} too; give it to one site")
        if site not in study.settings.unseen and not any(scan.split == "train" for scan in scans):
            raise InputError(f"{manifest}: has no scan to train on; set split to train for some")
        study.held_out_scans(site)


def make_manifests(study: Study) -> None:
    """Simulate sites that have no manifest yet, and pool the training sites."""
    settings = study.settings
    with study.scans_held():
        for site in settings.all_sites if settings.manifests is None else ():
            simulate(study, _scanner(site, settings.seed), study.manifests[site], *settings.n_scans(site))
        pool(study, settings.pooled_name, settings.training_sites)


def simulate(
    study: Study, site: Site, manifest: Path, n_train: int, n_test: int, unlabelled: Sequence[int] = ()
) -> None:
    """Write a site's scans unless its manifest exists; the caller must hold the study's scans."""
    if not manifest.exists():
        print(f"simulating site {site.name}", flush=True)
        settings = study.settings
        write_site(
            manifest.parent, site, n_train, n_test, grid=study.grid, seed=settings.seed, anatomies=settings.anatomies,
            shared_by=settings.all_sites, unlabelled=unlabelled,
        )  # fmt: skip


def _scanner(name: str, seed: int) -> Site:
    known = load_sites()
    return known[name] if name in known else mixed_site(name, np.random.default_rng([seed, *name.encode()]))


def pool(study: Study, name: str, sites: Iterable[str]) -> None:
    """Write the manifest `name` of all these sites' scans, with subjects prefixed: one name at two is two people."""
    manifest = study.manifests[name] = study.site_folder(name) / "manifest.csv"
    open_folder(manifest.parent)
    rows = [("image", "label", "subject", "site", "split")]
    for site in sites:
        for scan in study.scans(site):
            image, label = (os.path.relpath(str(file), manifest.parent) for file in (scan.image, scan.label))
            rows.append((image, label, f"{site}-{scan.subject}", site, scan.split))
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(rows)
    content = table.getvalue().encode()
    if not manifest.exists() or manifest.read_bytes() != content:
        write_whole(manifest, content)
