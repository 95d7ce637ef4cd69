"""The report on a folder of segmentations: a page with all scans, and a page for each scan with a viewer."""

import re
from collections.abc import Mapping
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from dwc.base.errors import InputError, printable
from dwc.base.files import open_folder, write_whole
from dwc.data.reading import open_scan
from dwc.derivatives import Derivatives
from dwc.report.cohort import FEWEST_SCANS, FROM_MAD, Cohort, read_cohort, read_sidecar
from dwc.report.pages import is_ours, render
from dwc.report.scan_page import ScanPage, Shown, made_from, write_scan_page
from dwc.report.volumes import map_of
from dwc.report.words import DASH, millilitres, number

__all__ = ["NIIVUE", "write_predictions_report"]

NIIVUE = "niivue.umd.js"
_LICENCE = "niivue.LICENSE.txt"
_SCANS = "scans"
_WORST_FIRST = ("failed", "check", "pass")
_N_SHOWN = 4  # structures in the table before anyone chooses
_SATURATED = 0.6  # of the median of the scans' largest values: where the pictures of uncertainty are brightest
_WIDTH = 240  # of a strip of volumes, in its own units
_TITLES = {"entropy": "entropy (nats)", "mutual_information": "mutual information (nats)"}


def write_predictions_report(folder: Path, out: Path) -> Path:
    """Write the report on a folder that `dwc predict` wrote; returns the path of its first page.

    `out` gets index.html, which holds all that it shows; scans/, a page for each scan with its volumes; and NiiVue, if
    it was vendored, which these pages load. An earlier report is replaced.
    """
    cohort, index = read_cohort(folder), out / "index.html"
    if index.is_file() and not is_ours(index):
        raise InputError(f"{index}: was not written by dwc report; give another `out`")
    open_folder(out)
    open_folder(out / _SCANS)
    sidecars = {scan: _read_sidecar(cohort, scan) for scan in cohort.scans.index}
    shown = Shown(*_scale(cohort, sidecars), viewer=_copy_viewer(out))
    pages = {}
    for position, (scan, sidecar) in enumerate(tqdm(sidecars.items(), desc="report", unit="scan"), start=1):
        name = f"{position:04d}-{re.sub(r'[^A-Za-z0-9._-]+', '_', scan)[-80:]}.html"
        pages[scan] = write_scan_page(cohort, scan, sidecar, out / _SCANS / name, shown)
    written = {page.path.name for page in pages.values() if page.path}
    for old in (out / _SCANS).glob("[0-9][0-9][0-9][0-9]-*.html"):
        if old.name not in written:
            old.unlink()
    made = next((made_from(sidecar) for sidecar in sidecars.values() if isinstance(sidecar, dict)), {})
    write_whole(index, _index(cohort, pages, made, shown))
    return index


def _copy_viewer(out: Path) -> str | None:
    """Put NiiVue and its licence beside the report; returns its address for the pages of scans, None without it."""
    vendored = files("dwc.report") / "vendor"
    if not (vendored / NIIVUE).is_file():
        return None
    for name in (NIIVUE, _LICENCE):
        write_whole(out / name, (vendored / name).read_bytes())
    return f"../{NIIVUE}"


def _read_sidecar(cohort: Cohort, scan: str) -> dict[str, Any] | InputError | None:
    """A scan's sidecar, or what is wrong with it; None for a scan that failed."""
    if cohort.scans.loc[scan, "quality"] == "failed":
        return None
    try:
        return read_sidecar(cohort.folder, scan)
    except InputError as error:
        return error


def _scale(cohort: Cohort, sidecars: Mapping[str, Any]) -> tuple[str, float]:
    """The map of uncertainty in the pictures, and the value from which on it is brightest, for all scans alike."""
    shown = {scan: map_of(sidecar) for scan, sidecar in sidecars.items() if isinstance(sidecar, dict)}
    tops = []
    for path in (Derivatives(cohort.folder / scan).map(name) for scan, name in shown.items() if name):
        with suppress(InputError):  # reported when the scan's turn comes
            tops.append(255 * open_scan(path).scaling[0])
    return max(shown.values(), default=""), (_SATURATED * float(np.median(tops)) if tops else 1.0)


def _index(cohort: Cohort, pages: dict[str, ScanPage], made: Mapping[str, str], shown: Shown) -> bytes:
    judged = cohort.n_measured >= FEWEST_SCANS
    rows = [_row(cohort, scan, page) for scan, page in pages.items()]
    quality = cohort.scans["quality"]
    tiles: list[tuple[int | str, str]] = [
        (len(rows), "scans"),
        *((int((quality == flag).sum()), flag) for flag in reversed(_WORST_FIRST)),
    ]
    tiles.append((sum(bool(row["outliers"]) for row in rows) if judged else DASH, "with outlying volumes"))
    largest = set(cohort.mm3.median().iloc[1:].nlargest(_N_SHOWN).index) | {cohort.mm3.columns[0]}
    return render(
        "predictions.html",
        scripts=["table.js"],
        name=printable(cohort.folder.resolve().name),
        about="; ".join(f"{name} {made[name]}" for name in ("label map", "networks", "version") if name in made),
        tiles=tiles,
        structures=[{"name": name, "shown": name in largest} for name in cohort.mm3],
        rows=rows,
        strips=[_strip(cohort, name, pages) for name in cohort.mm3 if cohort.mm3[name].notna().any()],
        map_name=_TITLES.get(shown.map_name, shown.map_name.replace("_", " ")),
        most_uncertain=number(shown.most_uncertain),
        has_viewer=shown.viewer is not None,
        judged=judged,
        n_measured=cohort.n_measured,
        fewest=FEWEST_SCANS,
        limit=cohort.limit,
        from_mad=FROM_MAD,
        dash=DASH,
    )


def _row(cohort: Cohort, scan: str, page: ScanPage) -> dict[str, Any]:
    quality, reason = cohort.scans.loc[scan, ["quality", "reason"]]
    outliers = cohort.outliers(scan)
    total = cohort.entropy.loc[scan].iloc[0]
    return {
        "name": scan,
        "page": f"{_SCANS}/{page.path.name}" if page.path else "",
        "picture": page.picture,
        "height": page.height,
        "trouble": page.trouble,
        "quality": quality,
        "rank": _WORST_FIRST.index(quality) if quality in _WORST_FIRST else len(_WORST_FIRST),
        "reason": reason,
        "outliers": [{"name": name, "z": number(z)} for name, z in outliers.items()],
        "cells": [
            {"value": "" if pd.isna(mm3) else mm3, "text": millilitres(mm3), "outlying": name in outliers,
             "sd": "" if pd.isna(sd) else millilitres(sd)}
            for name, mm3, sd in zip(cohort.mm3, cohort.mm3.loc[scan], cohort.sd_mm3.loc[scan], strict=True)
        ],
        "entropy": {"value": "" if pd.isna(total) else total, "text": number(total)},
    }  # fmt: skip


def _strip(cohort: Cohort, name: str, pages: dict[str, ScanPage]) -> dict[str, Any]:
    """The dots of a structure's volumes on an axis from the smallest to the largest."""
    mm3 = cohort.mm3[name].dropna()
    low, high, middle = mm3.min(), mm3.max(), mm3.median()
    robust_sd = FROM_MAD * (mm3 - middle).abs().median()

    def place(volume: float) -> float:
        share = (volume - low) / (high - low) if high > low else 0.5
        return round(_WIDTH * min(max(share, 0.0), 1.0), 1)

    band = None
    if cohort.z[name].notna().any():
        left = place(middle - cohort.limit * robust_sd)
        band = left, round(place(middle + cohort.limit * robust_sd) - left, 1)
    dots = []
    for scan, volume in mm3.items():
        z, page = cohort.z.loc[scan, name], pages[str(scan)]
        judged = "" if pd.isna(z) else f", z {number(z)}"
        dots.append({
            "x": place(volume), "title": f"{scan}: {millilitres(volume)} ml{judged}", "outlying": abs(z) > cohort.limit,
            "page": f"{_SCANS}/{page.path.name}" if page.path else "",
        })  # fmt: skip
    return {
        "name": name, "low": millilitres(low), "high": millilitres(high), "middle": millilitres(middle),
        "median": place(middle), "is_apart": 0.25 < place(middle) / _WIDTH < 0.75, "band": band, "dots": dots,
    }  # fmt: skip
