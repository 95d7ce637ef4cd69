"""Segment many scans into one folder: a bad scan is reported and the others go on, and what is done can be kept.

The sidecar of a scan is written last. It says what the results were made from, holds their digests, and the scan's row
of the table, so that the table is the same however often a run was stopped.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dwc import __version__, quality
from dwc.base import ranks
from dwc.base.errors import InputError, PartlyFailed, printable
from dwc.base.files import open_folder, write_whole
from dwc.base.signals import deferred_signals
from dwc.colours import viewer_tables
from dwc.data.checks import axes_of, examine
from dwc.data.comparison import compare
from dwc.data.findings import CheckedScan, tell
from dwc.data.paths import unreadable
from dwc.data.reading import open_scan
from dwc.data.scan import Scan
from dwc.data.streams import enough_memory
from dwc.derivatives import Derivatives, is_foreign, name_derivatives
from dwc.inputs import GivenScan, stem_of
from dwc.prediction import Ensemble
from dwc.prediction_settings import OutputSettings, PredictionSettings
from dwc.scan_table import FAILURES, TABLE, Row, failures_table, scan_table, structures
from dwc.segmentation import Segmentation, segment

__all__ = ["Batch"]

_DESCRIPTION = "dataset_description.json"
_SIDES = "A name without a side stands for the left and the right structure, which are one class."


@dataclass(frozen=True)
class _Job:
    scan: GivenScan
    files: Derivatives


class Batch:
    """Segments scans with an ensemble into a folder; ranks share the scans.

    `run` takes scans that `given_scans` found. Results that are there are an error, unless they are to be kept
    (`skip_existing`) or replaced (`overwrite`). `wording` turns a reason of a failure into what the user reads.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        out: Path,
        settings: PredictionSettings,
        outputs: OutputSettings,
        *,
        wording: Callable[[str], str] = str,
    ) -> None:
        self.ensemble, self.out, self.settings, self.outputs = ensemble, out, settings, outputs
        self.wording = wording
        self.made_with: dict[str, Any] = {
            "Networks": [posterior.sha256 for posterior in ensemble.posteriors],
            "LabelMap": {"Name": ensemble.label_map.name, "SHA256": ensemble.label_map.sha256},
            "Samples": settings.n_samples,
            "Seed": settings.seed,
            "Precision": settings.precision,
            "Version": __version__,
            "Conformed": outputs.conformed,
            "LargestComponent": outputs.largest_component,
        }
        self.failures: list[Row] = []
        # matplotlib is an extra, and whether it is there shows before any work
        self._overlay = import_module("dwc.report.figures").overlay if outputs.picture else None

    def run(self, scans: Sequence[GivenScan], *, skip_existing: bool = False, overwrite: bool = False) -> None:
        """Segment scans one at a time; raises PartlyFailed at the end if one could not be segmented."""
        usable = [scan for scan in scans if not scan.fault]
        names = name_derivatives(
            [scan.image for scan in usable], self.out, folders=[scan.folder for scan in usable],
            overwrite=overwrite or skip_existing,
        )  # fmt: skip
        jobs = [_Job(scan, files) for scan, files in zip(usable, names, strict=True)]
        ranks.barrier()  # before any rank writes to the folder that others are checking
        open_folder(self.out)
        if ranks.is_main():
            _tell_of_mirrored(usable)
            for scan in (scan for scan in scans if scan.fault):
                self._fail(self.out / scan.folder / stem_of(scan.image), scan.fault)
        for job in ranks.share(jobs):
            if skip_existing and self._is_done(job):
                print(f"{printable(str(job.files.labels))}  (done before)", flush=True)
            elif skip_existing and (foreign := [path for path in job.files.images(self.outputs) if is_foreign(path)]):
                reason = "was not written by dwc and is kept; give another `out`, or `overwrite` to replace it"
                self._fail(job.files.stem, f"{foreign[0]}: {reason}")
            else:
                self._segment(job)
            if ranks.is_main():
                with deferred_signals():
                    self._write_tables()
                    self._write_failures()
        self._end(len(scans))

    def summarize(self) -> None:
        """Write the tables of the scans in the folder that were segmented with these networks and settings."""
        n_scans = sum(1 for _ in self._rows())
        if not n_scans:
            raise InputError(f"{self.out}: holds no results of these networks and settings; segment scans first")
        self._write_tables()
        print(f"{printable(str(self.out / TABLE))}  ({n_scans} scans)")

    def _segment(self, job: _Job) -> None:
        try:
            with _fits(job.scan.image):
                image, checked = examine(job.scan.image, self.ensemble.grid)
                digest = _digest(job.scan.image)
                tell([checked])
                result = segment(self.ensemble, job.scan.image, image, self.settings, progress=ranks.is_main())
                if self.outputs.largest_component:
                    result = result.without_islands()
        except InputError as error:
            self._fail(job.files.stem, str(error))
            return
        except OSError as error:  # the file went away
            self._fail(job.files.stem, str(unreadable(job.scan.image, error)))
            return
        with deferred_signals():
            self._write(job, result, checked, digest)

    def _write(self, job: _Job, result: Segmentation, checked: CheckedScan, digest: str) -> None:
        open_folder(job.files.stem.parent)
        job.files.sidecar.unlink(missing_ok=True)
        mm3 = result.write(job.files, self.outputs)
        if self._overlay:
            self._overlay(
                result.image, None, {"predicted": result.prediction.labels}, job.files.picture,
                names=self.ensemble.label_map.titles, title=job.scan.image.name,
            )  # fmt: skip
        measures = quality.measure(result.image, result.prediction, self.ensemble.label_map, self.ensemble.grid)
        odd = [finding.message.removeprefix(f"{job.scan.image}: ") for finding in checked.findings]
        reasons = [*odd, *quality.reasons(measures)]
        found = {"Flag": "check" if reasons else "pass", "Reasons": reasons, "Measures": measures}
        self._write_sidecar(job, result, mm3, found, {"Source": digest, "Image": checked.content})
        remark = f"; look at it: {'; '.join(reasons)}" if reasons else ""
        print(
            f"{printable(str(job.files.labels))}  ({mm3[1:].sum() / 1000:.1f} ml in {int((mm3[1:] > 0).sum())} classes"
            f"{printable(remark)})",
            flush=True,
        )

    def _write_sidecar(
        self, job: _Job, result: Segmentation, mm3: np.ndarray, found: dict[str, Any], digests: dict[str, str | None]
    ) -> None:
        files, grid, label_map = job.files, self.ensemble.grid, self.ensemble.label_map
        content = {
            "Description": f"Segmentation of a T1 scan into {label_map.n_classes} classes. {_SIDES}",
            "GeneratedBy": [{"Name": "dwc", "Version": __version__}],
            "Sources": [os.path.relpath(job.scan.image, files.stem.parent)],
            **self.made_with,
            "Resolution": str(grid) if self.outputs.conformed else "the scan's own voxels",
            "Maps": list(self.outputs.maps),
            "SHA256": {**digests, **{path.name: _digest(path) for path in files.files(self.outputs)}},
            "Quality": found,
            "Structures": structures(result.prediction, mm3, label_map, grid),
        }
        write_whole(files.sidecar, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())

    def _is_done(self, job: _Job) -> bool:
        """Whether all files that are asked for are whole, and made from this scan with these settings."""
        sidecar = self._read(job.files.sidecar)
        if sidecar is None:
            return False
        recorded = sidecar["SHA256"]
        try:
            return recorded.get("Source") == _digest(job.scan.image) and all(
                recorded.get(path.name) == _digest(path) for path in job.files.files(self.outputs)
            )
        except OSError:
            return False

    def _read(self, path: Path) -> dict[str, Any] | None:
        """A sidecar that was written with these settings, or None."""
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        kinds = {"SHA256": dict, "Quality": dict, "Structures": list}
        is_ours = isinstance(content, dict) and all(isinstance(content.get(key), kind) for key, kind in kinds.items())
        if not is_ours or any(content.get(key) != value for key, value in self.made_with.items()):
            return None
        return content

    def _fail(self, stem: Path, reason: str) -> None:
        reason = self.wording(reason)
        self.failures.append(Row(self._name(stem), "failed", (reason,), []))
        print(f"dwc: {printable(reason)}", file=sys.stderr, flush=True)

    def _name(self, stem: Path) -> str:
        return stem.relative_to(self.out).as_posix()

    def _write_tables(self) -> None:
        """Write the table of all scans in the folder, and the tables of labels."""
        label_map = self.ensemble.label_map
        rows = {row.name: row for row in self._rows()} | {row.name: row for row in self.failures}
        contents = {TABLE: scan_table(list(rows.values()), label_map), **viewer_tables(label_map)}
        if not (self.out / _DESCRIPTION).exists():
            about = {
                "Name": "Segmentations of T1 scans",
                "BIDSVersion": "1.9.0",
                "DatasetType": "derivative",
                "GeneratedBy": [{"Name": "dwc", "Version": __version__}],
            }
            contents[_DESCRIPTION] = (json.dumps(about, indent=2) + "\n").encode()
        for name, content in contents.items():
            path = self.out / name
            if not path.is_file() or path.read_bytes() != content:
                write_whole(path, content)

    def _write_failures(self) -> None:
        if self.failures:
            write_whole(self.out / FAILURES, failures_table(self.failures))
        else:
            (self.out / FAILURES).unlink(missing_ok=True)

    def _rows(self) -> Iterator[Row]:
        """The scans in the folder that were segmented with these settings, in whichever run."""
        for path in sorted(self.out.rglob("*_dseg.json")):
            if sidecar := self._read(path):
                found = sidecar["Quality"]
                name = self._name(path.with_name(path.name.removesuffix("_dseg.json")))
                yield Row(
                    name, found["Flag"], tuple(found["Reasons"]), sidecar["Structures"], sidecar["SHA256"].get("Image")
                )

    def _end(self, n_scans: int) -> None:
        parts = ranks.gather([[row.name, list(row.reasons)] for row in self.failures])
        self.failures = [Row(name, "failed", tuple(reasons), []) for part in parts for name, reasons in part]
        if ranks.is_main():
            self._write_tables()
            self._write_failures()
        ranks.barrier()  # torchrun ends all ranks when the first one fails
        if self.failures:
            raise PartlyFailed(
                f"{len(self.failures)} of {n_scans} scans could not be segmented; {self.out / FAILURES} says why"
            )


def _tell_of_mirrored(scans: Sequence[GivenScan]) -> None:
    """Print which scans have axes of another handedness than most."""
    checked = []
    for scan in scans:
        try:
            facts = axes_of(open_scan(scan.image))
        except InputError:
            continue  # reported when its turn comes
        checked.append(CheckedScan(Scan(scan.image, None, "", "", "test"), facts=facts))
    tell(compare(checked))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def _fits(path: Path) -> Iterator[None]:
    """Name the scan whose prediction takes more memory than there is."""
    try:
        with enough_memory(path):
            yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise InputError(f"{path}: does not fit into memory; lower `memory_limit`") from error
