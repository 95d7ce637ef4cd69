"""Folders of made-up studies, with plausible numbers and no networks."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from dwc.data.labels import LabelMap
from dwc.metrics.calibration import CalibrationCounts
from dwc.study.statistics import dice_table, differences_by_seed, paired_tests

SITES = {"H": 5, "N": 6, "B": 2, "W": 2, "A": 5}
GROUPS = (("H", "N", "B", "W"), ("A",))
ROWS = {  # name: kind, skill on the training sites and on the unseen one
    "H MAP": ("map", 0.70, 0.46), "N MAP": ("map", 0.66, 0.52), "B MAP": ("map", 0.60, 0.44),
    "W MAP": ("map", 0.62, 0.48), "H (variational)": ("vi", 0.69, 0.48), "H->N": ("vcl", 0.72, 0.55),
    "H->B": ("vcl", 0.66, 0.47), "H->W": ("vcl", 0.70, 0.51), "H->N->B->W": ("chain", 0.71, 0.52),
    "H->W->B->N": ("chain", 0.77, 0.60), "H->N+B+W (plain average)": ("average", 0.72, 0.54),
    "H->N+B+W (DWC w/o FT)": ("consolidated", 0.73, 0.55), "Ensemble": ("ensemble", 0.72, 0.53),
    "H->N+B+W->H (DWC)": ("dwc", 0.75, 0.565), "HNBW MAP": ("pooled", 0.79, 0.62),
}  # fmt: skip
DWC, ENSEMBLE, CHAINS = "H->N+B+W->H (DWC)", "Ensemble", ("H->N->B->W", "H->W->B->N")


def write_study(out: Path, *, skill: dict[str, tuple[float, float]] | None = None, seed: int = 0) -> Path:
    """Write the tables of a study whose rows have the skill of `ROWS`, unless `skill` overrides it."""
    out.mkdir(parents=True, exist_ok=True)
    tables = _tables(skill or {}, seed)
    _write(out, tables)
    for name, (kind, *_) in ROWS.items():
        if kind in ("map", "vcl"):
            _write_log(out / "networks" / name.replace("->", "_"), 400 if kind == "map" else 150, seed)
    (out / "config.yaml").write_text(
        yaml.safe_dump({"seed": seed, "grid_size": 64, "label_map": "coarse", "width": 16})
    )
    return out


def write_pooled(out: Path, *, seeds: int = 3, skill: dict[str, tuple[float, float]] | None = None) -> Path:
    """Write the tables of several seeds as one study."""
    out.mkdir(parents=True, exist_ok=True)
    parts = [_tables(skill or {}, seed) for seed in range(seeds)]
    pooled = {
        name: pd.concat([part[name].assign(seed=seed) for seed, part in enumerate(parts)])
        for name in ("volumes", "classes", "calibration", "speed")
    }
    by_seed = pd.concat([part["table"] for part in parts]).groupby(level=0, sort=False)
    pooled |= {"rows": parts[0]["rows"], "table": by_seed.mean(), "table_sd": by_seed.std()}
    pooled["tests"] = paired_tests(pooled["volumes"], _pairs(), GROUPS)
    pooled["by_seed"] = differences_by_seed(pooled["volumes"], _pairs(), GROUPS)
    _write(out, pooled)
    return out


def _pairs() -> list[tuple[str, str]]:
    return [(DWC, ENSEMBLE), (DWC, CHAINS[0]), (DWC, CHAINS[1]), (CHAINS[1], CHAINS[0])]


def _tables(skill: dict[str, tuple[float, float]], seed: int) -> dict[str, pd.DataFrame]:
    rng, names = np.random.default_rng(seed), LabelMap.load("coarse").names
    ease = {(site, v): rng.normal(0, 0.025) for site, n in SITES.items() for v in range(n)}
    bonus = dict(zip(names, (0.24, 0.14, 0.05, 0.1, 0, 0.04, -0.02, 0.08, -0.16), strict=True))
    volumes, classes, calibration = [], [], []
    for row, (kind, seen, unseen) in ROWS.items():
        seen, unseen = skill.get(row, (seen, unseen))
        for (site, v), shift in ease.items():
            level = (unseen if site == "A" else seen) + shift + (0.06 if site in row.split()[0] else 0)
            who = {"row": row, "site": site, "subject": f"{site}-{v}", "image": f"{site}-{v}_T1w.nii.gz"}
            dice = {name: float(np.clip(level + bonus[name] + rng.normal(0, 0.015), 0, 1)) for name in names}
            mm3 = {name: float(rng.integers(1e4, 4e5)) for name in names}
            classes += [
                {**who, "class": k, "name": name, "dice": dice[name], "truth_mm3": mm3[name],
                 "predicted_mm3": mm3[name] * rng.normal(1, 0.1)} for k, name in enumerate(names)
            ]  # fmt: skip
            mean = np.mean([dice[name] for name in names[1:]])
            everything = np.mean(list(dice.values()))
            volumes.append({**who, "n_classes": 8, "dice": mean, "dice_with_background": everything})
        if kind in ("ensemble", "dwc", "pooled"):
            for site in SITES:
                calibration.append(_counts(kind, rng).assign(row=row, site=site))
    volumes = pd.DataFrame(volumes)
    rows = [
        {"row": row, "kind": kind, "networks": f"networks/{row.replace('->', '_')}/posterior.safetensors",
         "steps": 400 if kind in ("map", "pooled") else 150, "total_steps": 550, "plateau_step": None, "seconds": 60.0}
        for row, (kind, *_) in ROWS.items()
    ]  # fmt: skip
    speed = [
        {"site": site, "steps": 150, "map_dice": 0.45, "vcl_dice": ours, "vcl_start_dice": 0.4, "map_steps": 400,
         "map_last_dice": 0.63, "target_dice": 0.6, "map_target_step": 200, "vcl_target_step": 50,
         "map_plateau_step": None, "vcl_plateau_step": None} for site, ours in (("N", 0.6), ("B", 0.55), ("W", 0.5))
    ]  # fmt: skip
    return {
        "rows": pd.DataFrame(rows), "volumes": volumes, "classes": pd.DataFrame(classes),
        "calibration": pd.concat(calibration), "table": dice_table(volumes, GROUPS),
        "tests": paired_tests(volumes, _pairs(), GROUPS), "speed": pd.DataFrame(speed),
    }  # fmt: skip


def _counts(kind: str, rng: np.random.Generator) -> pd.DataFrame:
    counts, n = CalibrationCounts(9), 20_000
    confidence = np.where(rng.random(n) < 0.7, 1 - 0.01 * rng.random(n), rng.uniform(0.2, 1, n))
    entropy = 2 * (1 - confidence) * rng.uniform(0.8, 1.1, n)
    too_sure = {"ensemble": -0.1, "dwc": 0.02, "pooled": 0.15}[kind]
    counts.add(confidence, entropy, rng.random(n) < confidence - too_sure * (1 - confidence) * 2 * confidence)
    return counts.frame()


def _write_log(folder: Path, steps: int, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng, start = np.random.default_rng(seed), 1.2 if steps > 200 else 0.5
    lines = [
        {"epoch": k + 1, "step": steps * (k + 1) // 20, "nll": 0.25 + start * np.exp(-k / 4) + rng.normal(0, 0.005),
         "dice": 0.7 - 0.6 * np.exp(-k / 3)} for k in range(20)
    ]  # fmt: skip
    (folder / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def _write(out: Path, tables: dict[str, pd.DataFrame]) -> None:
    for name, table in tables.items():
        table.to_csv(out / f"{name}.csv", index=name.startswith("table"), float_format="%.6g")
