"""How well the quality flags of `dwc predict` find degraded scans, and how often they flag clean ones.

    python -m benchmarks.quality_flags --anatomies label_maps --real scan.nii.gz --out flags

Simulates scans of five sites from real anatomies (64^3 voxels of 3 mm), trains a small Bayesian network on some (or
takes `--network`), degrades the held-out ones and the real scan in eight ways at several strengths, and segments each.
Writes measures.csv (a row per scan), flags.csv (area under the ROC curve and counts per way), roc.csv and roc.png. A
second call continues where the first stopped.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import ndimage

from dwc import quality
from dwc.data.conform import conform_image
from dwc.data.grid import Grid
from dwc.data.intensity import to_uint8
from dwc.data.manifest import read_manifest
from dwc.prediction import Ensemble, load_networks
from dwc.prediction_settings import PredictionSettings
from dwc.segmentation import segment
from dwc.simulation.scans import load_sites, write_site
from dwc.training.loop import train_network
from dwc.training.settings import TrainSettings

__all__ = ["DEGRADATIONS", "area", "degraded", "main", "table_of"]

GRID = Grid(64, 3.0)
SAMPLES = 4
MAP_STEPS, VI_STEPS = 2000, 400
_TURN_DEGREES, _TURN_MM = 1.0, 1.0  # per unit of motion's strength

Degrade = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate, train, degrade, segment, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anatomies", type=Path, help="folder of label volumes; by default procedural heads")
    parser.add_argument("--real", type=Path, help="a real scan to degrade as well")
    parser.add_argument("--network", type=Path, help="a posterior; by default one is trained")
    parser.add_argument("--seed", type=int, default=0, help="of the simulated scans")
    parser.add_argument("--out", type=Path, required=True)
    values = parser.parse_args(arguments)
    torch.set_num_threads(1)
    manifest = _simulated(values)
    ensemble = load_networks(values.network or _trained(manifest, values.out))
    tested = [scan.image for scan in read_manifest(manifest) if scan.split == "test"]
    path = values.out / "measures.csv"
    rows = pd.read_csv(path).to_dict("records") if path.exists() else []
    done = {(row["scan"], row["kind"], row["strength"]) for row in rows}
    for image in [*tested, *([values.real] if values.real else [])]:
        for kind, strength, scan in degraded(conform_image(image, ensemble.grid), seed=len(image.name)):
            if (image.name, kind, strength) not in done:
                rows.append({"scan": image.name, "kind": kind, "strength": strength, **_measured(ensemble, scan)})
        pd.DataFrame(rows).to_csv(path, index=False, float_format="%.5g")
        print(image.name, flush=True)
    measured = pd.read_csv(path)
    measured["score"] = [quality.score(row) for row in measured.to_dict("records")]
    table = table_of(measured)
    table.to_csv(values.out / "flags.csv", index=False, float_format="%.3f")
    _draw(measured, values.out)
    print(table.to_string(index=False, float_format="%.3f"))


def degraded(image: np.ndarray, seed: int) -> Iterator[tuple[str, float, np.ndarray]]:
    """A conformed uint8 image as it is ("clean"), then degraded in each way at each strength; axes are LIA."""
    yield "clean", 0.0, image
    for kind, (degrade, strengths) in DEGRADATIONS.items():
        for strength in strengths:
            worse = degrade(image.astype(np.float32), strength, np.random.default_rng(seed))
            yield kind, strength, to_uint8(np.ascontiguousarray(worse, np.float32))


def _noise(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Rician noise of `strength` times the brightest tissue."""
    sd = strength * np.percentile(image, 99)
    real, imaginary = (rng.normal(0, sd, image.shape) for _ in range(2))
    return np.hypot(image + real, imaginary)


def _motion(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """A quarter of the phase-encoding lines from a nodding head, turned and moved by `strength` degrees and voxels."""
    turned = ndimage.rotate(image, strength * _TURN_DEGREES, axes=(1, 2), reshape=False, order=1)
    moved = ndimage.shift(turned, (0, *[strength * _TURN_MM / 2] * 2), order=1)
    lines = np.fft.fft(image, axis=2)
    late = rng.permutation(image.shape[2])[: image.shape[2] // 4]
    lines[:, :, late] = np.fft.fft(moved, axis=2)[:, :, late]
    return np.abs(np.fft.ifft(lines, axis=2))


def _cut(from_below: bool) -> Degrade:
    def cut(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
        """The field of view ends `strength` of the head's height below its top, or above its bottom."""
        planes = np.flatnonzero((image > 0.2 * image.max()).mean(axis=(0, 2)) > 0.01)
        height = int(strength * (planes[-1] - planes[0]))
        result = image.copy()
        if from_below:
            result[:, planes[-1] - height :] = 0
        else:
            result[:, : planes[0] + height] = 0
        return result

    return cut


def _contrast(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Tissue mixed with its negative, as in T2-weighted scans; at strength 0.5 nothing is left of the contrast."""
    top = np.percentile(image, 99.5)
    negative = np.where(image > 0.12 * top, 1.15 * top - np.minimum(image, top), image)
    return (1 - strength) * image + strength * negative


def _flip(axis: int) -> Degrade:
    return lambda image, strength, rng: np.flip(image, axis)


DEGRADATIONS: dict[str, tuple[Degrade, tuple[float, ...]]] = {
    "noise": (_noise, (0.05, 0.1, 0.2)),
    "motion": (_motion, (2, 4, 8)),
    "cut at the top": (_cut(from_below=False), (0.1, 0.2, 0.4)),
    "cut at the bottom": (_cut(from_below=True), (0.2, 0.4, 0.6)),
    "contrast": (_contrast, (0.4, 0.6, 1.0)),
    "upside down": (_flip(1), (1.0,)),
    "front to back": (_flip(2), (1.0,)),
    "left to right": (_flip(0), (1.0,)),
}


def area(clean: np.ndarray, degraded: np.ndarray) -> float:
    """Area under the ROC curve: how often a degraded scan scores higher than a clean one; ties count half."""
    above = degraded[:, None] - clean
    return float((above > 0).mean() + (above == 0).mean() / 2)


def table_of(measured: pd.DataFrame) -> pd.DataFrame:
    """A row per kind and strength: AUC against the clean scans, scans, those flagged, and what flagged most of them."""
    clean = measured.loc[measured["kind"] == "clean", "score"].to_numpy()
    rows = []
    for (kind, strength), group in measured.groupby(["kind", "strength"], sort=False):
        flags = [quality.flagged(row) for row in group.to_dict("records")]
        names = pd.Series([name for names in flags for name in names], dtype=object).value_counts()
        rows.append(
            {
                "degradation": kind, "strength": strength, "auc": area(clean, group["score"].to_numpy()),
                "scans": len(group), "flagged": sum(map(bool, flags)),
                "by": ", ".join(f"{name} {count}" for name, count in names.head(3).items()),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def _simulated(values: argparse.Namespace) -> Path:
    """The manifest of all sites' scans; those to train on only if a network is to be trained."""
    out, n_train = values.out / "scans", 0 if values.network else 8
    path = out / "manifest.csv"
    if not path.exists():
        lines = ["image,label,subject,site,split"]
        for name in load_sites():
            write_site(out / name, name, n_train, 3, grid=GRID, seed=values.seed, anatomies=values.anatomies)
            for line in (out / name / "manifest.csv").read_text().splitlines()[1:]:
                image, label, rest = line.split(",", 2)
                lines.append(f"{name}/{image},{name}/{label},{rest}")
        path.write_text("\n".join(lines) + "\n")
    return path


def _trained(manifest: Path, out: Path) -> Path:
    """A Bayesian network of width 12, from a MAP network."""
    common = {
        "data": manifest, "cache_dir": out / "cache", "schedule": "one_cycle", "batch_size": 2, "epochs": 1,
        "validation_sub_volumes": 2, "seed": 0, "device": "cpu",
    }  # fmt: skip
    first = {
        "label_map": "coarse", "grid_size": GRID.size, "voxel_size": GRID.voxel_size, "width": 12,
        "dilations": (1, 2, 4, 8),
    }  # fmt: skip
    runs: list[tuple[str, dict[str, object]]] = [
        ("map", {**first, "lr": 3e-2, "steps_per_epoch": MAP_STEPS}),
        ("vi", {"init": out / "map" / "posterior.safetensors", "lr": 3e-3, "steps_per_epoch": VI_STEPS}),
    ]
    for mode, settings in runs:
        run = out / mode
        if not (run / "posterior.safetensors").exists():
            train_network(TrainSettings(mode=mode, out=run, **common, **settings), resume=run.exists())  # type: ignore[arg-type]
    return out / "vi"


def _measured(ensemble: Ensemble, image: np.ndarray) -> dict[str, float]:
    result = segment(ensemble, Path("scan"), image, PredictionSettings(n_samples=SAMPLES))
    return quality.measure(image, result.prediction, ensemble.label_map, ensemble.grid)


def _draw(measured: pd.DataFrame, out: Path) -> None:
    """The ROC curve of each kind, with the shipped threshold marked; counts in roc.csv."""
    clean = measured.loc[measured["kind"] == "clean", "score"].to_numpy()
    figure = Figure(figsize=(5.5, 5))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    rows = []
    for kind, group in measured[measured["kind"] != "clean"].groupby("kind", sort=False):
        scores = group["score"].to_numpy()
        thresholds = np.unique([*clean, *scores, 1.0])[::-1]
        false, true = ([int((values > t).sum()) for t in thresholds] for values in (clean, scores))
        rows += [
            {"degradation": kind, "threshold": t, "flagged": n, "of": len(scores), "false": f, "clean": len(clean)}
            for t, n, f in zip(thresholds, true, false, strict=True)
        ]
        (line,) = axes.plot(
            np.array(false) / len(clean), np.array(true) / len(scores), label=kind, drawstyle="steps-post"
        )
        axes.plot((clean > 1).mean(), (scores > 1).mean(), "o", color=line.get_color())
    pd.DataFrame(rows).to_csv(out / "roc.csv", index=False, float_format="%.4g")
    axes.set_xlabel(f"clean scans flagged, of {len(clean)}")
    axes.set_ylabel("degraded scans flagged (dots: the shipped threshold)")
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out / "roc.png", dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
