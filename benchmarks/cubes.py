"""Fixed training cubes, as in the paper, against random ones with margins, at equal CPU time.

    python -m benchmarks.cubes --anatomies label_maps --out cubes

Trains one MAP network per kind of cube on simulated scans of real anatomies (64^3 at 3 mm, coarse classes, width 12,
dilations 1 2 4 8, one cycle; 600 steps of 2 paper cubes, or as many of the others as take the same CPU time). Scores it
on held-out scans: whole, cut into the paper's cubes, cut 16 voxels further, and with the head moved by 18 mm. Writes
cubes.csv and cubes.png; a second call continues where the first stopped.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from dwc.data.augmentation import Augmentation
from dwc.data.cache import prepare
from dwc.data.cubes import join_volume, split_volume
from dwc.data.dataset import SubVolumes
from dwc.data.grid import Grid
from dwc.data.intensity import scaling_of
from dwc.data.labels import LabelMap
from dwc.data.manifest import read_manifest
from dwc.meshnet import MeshNet
from dwc.metrics.confusion import confusion_matrix, mean_dice
from dwc.posterior import Posterior
from dwc.prediction import predict_volume
from dwc.simulation.scans import load_sites, write_site
from dwc.training.loop import train_network
from dwc.training.settings import TrainSettings

__all__ = ["draw", "main", "moved", "position_scores"]

GRID, SHIFT, MOVE = Grid(64, 3.0), 16, 6  # voxels
PAPER_STEPS = 600
AUGMENTATION = Augmentation(mirror=0.5, rotation=5, scale=0.05, elastic=1, bias=0.2, gamma=0.2, blur=0.5, noise=0.02)


@dataclass(frozen=True)
class Arm:
    """A kind of training cube."""

    name: str
    settings: dict[str, object]


ARMS = (
    Arm("paper", {"cubes": "paper"}),
    Arm("random, margin 0", {"margin": 0}),
    Arm("random, margin 4", {"margin": 4}),
    Arm("random, margin 8", {"margin": 8}),
    Arm("random, margin 16", {"margin": 16}),
    Arm("random, margin 0, augmented", {"margin": 0, "augmentation": AUGMENTATION}),
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anatomies", type=Path, help="folder of label volumes; by default procedural heads")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    values = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    for seed in values.seeds:
        base = _settings(values, seed)
        steps = _equal_steps(base, values.out / f"steps-{seed}.csv")
        for arm in ARMS:
            rows.append(
                {"training": arm.name, "seed": seed, "steps": steps[arm.name], **_run(arm, base, steps[arm.name])}
            )
            table = pd.DataFrame(rows)
            table.to_csv(values.out / "cubes.csv", index=False, float_format="%.4f")
            print(table.tail(1).to_string(index=False, header=len(rows) == 1, float_format="%.3f"), flush=True)
    draw(table, values.out / "cubes.png")


def _settings(values: argparse.Namespace, seed: int) -> TrainSettings:
    """The common settings, and a manifest of all anatomies scanned at site H."""
    manifest = values.out / f"scans-{seed}" / "manifest.csv"
    if not manifest.exists():
        lines = ["image,label,subject,site,split"]
        for name in load_sites():  # site H's scanner for every site's anatomies
            folder, site = manifest.parent / name, replace(load_sites()["H"], name=name)
            write_site(folder, site, n_train=8, n_test=3, grid=GRID, seed=seed, anatomies=values.anatomies)
            for line in (folder / "manifest.csv").read_text().splitlines()[1:]:
                image, label, rest = line.split(",", 2)
                lines.append(f"{name}/{image},{name}/{label},{rest}")
        manifest.write_text("\n".join(lines) + "\n")
    return TrainSettings(
        mode="map", data=manifest, out=values.out / f"runs-{seed}", cache_dir=values.out / "cache", label_map="coarse",
        grid_size=GRID.size, voxel_size=GRID.voxel_size, width=12, dilations=(1, 2, 4, 8), lr=3e-2,
        schedule="one_cycle", batch_size=2, epochs=1, validation_sub_volumes=2, seed=seed, device="cpu",
    )  # fmt: skip


def _equal_steps(base: TrainSettings, path: Path) -> dict[str, int]:
    """Steps of each arm that take the paper's CPU time, from 20 timed steps after 20 for warm-up."""
    if not path.exists():
        seconds: dict[str, list[float]] = {arm.name: [] for arm in ARMS}
        for turn in range(2):
            for number, arm in enumerate(ARMS):
                settings = replace(base, **arm.settings, steps_per_epoch=20, out=base.out / f"timing-{turn}-{number}")
                began = time.process_time()
                train_network(settings)
                seconds[arm.name].append((time.process_time() - began) / 20)
        cost = {name: times[1] for name, times in seconds.items()}
        table = pd.DataFrame({"ms_per_step": cost}).mul(1000).rename_axis("cubes")
        table["steps"] = (PAPER_STEPS * cost[ARMS[0].name] * 1000 / table["ms_per_step"]).round().astype(int)
        table.to_csv(path, float_format="%.2f")
    return pd.read_csv(path, index_col="cubes")["steps"].to_dict()


def _run(arm: Arm, base: TrainSettings, steps: int) -> dict[str, float]:
    out = base.out / arm.name.replace(", ", "-").replace(" ", "-")
    if not (out / "posterior.safetensors").exists():
        settings = replace(base, **arm.settings, steps_per_epoch=steps, out=out)
        train_network(settings, resume=out.exists())
    network = MeshNet.from_posterior(Posterior.load(out / "posterior.safetensors"))
    scans = [scan for scan in read_manifest(base.data) if scan.split == "test"]
    return position_scores(network, prepare(scans, LabelMap.load("coarse"), GRID, base.cache_dir, progress=False))


def position_scores(network: MeshNet, held_out: SubVolumes) -> dict[str, float]:
    """Mean Dice over volumes, without background, for each way to predict."""
    scores: dict[str, list[float | None]] = {name: [] for name in ("cubes", "cubes shifted", "whole", "head moved")}
    for v in range(held_out.n_volumes):
        image, truth = held_out.volume(v)
        assert truth is not None
        shifted, moved_truth = moved(image, SHIFT), moved(truth, MOVE)
        predictions = {
            "cubes": (_cube_by_cube(network, image), truth),
            "cubes shifted": (moved(_cube_by_cube(network, shifted), -SHIFT), truth),
            "whole": (predict_volume([network], image).labels, truth),
            "head moved": (predict_volume([network], moved(image, MOVE)).labels, moved_truth),
        }
        for name, (labels, against) in predictions.items():
            confusion = confusion_matrix(against, labels, held_out.label_map.n_classes)
            scores[name].append(mean_dice(confusion, with_background=False))
    return {name: statistics.mean(values) for name, values in scores.items()}


def moved(volume: np.ndarray, voxels: int) -> np.ndarray:
    """A volume moved along its second axis (head to feet), wrapping around."""
    return np.roll(volume, voxels, axis=1)


def draw(table: pd.DataFrame, path: Path) -> None:
    """A group of bars per kind of training cube, one bar per way to predict; means over seeds."""
    means = table.drop(columns=["seed", "steps"]).groupby("training", sort=False).mean()
    axes = means.plot.bar(figsize=(9, 4), rot=15, width=0.8, xlabel="")
    axes.set_ylabel("Dice of held-out scans")
    axes.legend(title="predicted", ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.figure.savefig(path, dpi=120, bbox_inches="tight")


@torch.inference_mode()
def _cube_by_cube(network: MeshNet, image: np.ndarray) -> np.ndarray:
    """The paper's prediction: each sub-volume alone, padded with zeros."""
    cubes = torch.from_numpy(scaling_of(image, "z_score")(split_volume(image)))[:, None]
    labels = torch.cat([network(part, sample=False).argmax(dim=1) for part in cubes.split(4)])
    return join_volume(labels.to(torch.uint8).numpy(), image.shape)


if __name__ == "__main__":
    main()
