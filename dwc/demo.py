"""The whole distributed weight consolidation cycle on simulated sites, at a size that two CPU cores manage.

`run` simulates five sites with the procedural head, trains the networks of the paper's cycle (MAP networks, the
variational one of H, the sites' from it, the fine-tuned one), consolidates, and scores every network on every site.
Each step calls the workflow that a command calls; nothing here trains, consolidates or scores by itself.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
import yaml

from dwc.consolidation import Consolidation
from dwc.data.conform import Grid
from dwc.data.labels import LabelMap
from dwc.data.manifest import read_manifest
from dwc.data.simulation import write_site
from dwc.data.subvolumes import SIDE, SubVolumes, prepare
from dwc.errors import InputError
from dwc.evaluation import score_volumes, summary
from dwc.files import write_whole
from dwc.meshnet import MeshNet
from dwc.posterior import Posterior
from dwc.prediction import predict_volume
from dwc.report.figures import overlay
from dwc.settings import TrainSettings
from dwc.training import train

__all__ = ["DemoSettings", "Stage", "run"]

ORIGIN, SITES, UNSEEN = "H", ("N", "B", "W"), "A"
_PICTURE, _WEIGHTS = "segmentation.png", "consolidation.csv"


@dataclass(frozen=True)
class Stage:
    """How one kind of network is trained.

    Parameters
    ----------
    steps
        Optimizer steps.
    lr
        Highest learning rate of the means.
    rho_lr
        Highest learning rate of rho; by default lr. It is what lets sigma leave its prior's value within few steps.
    schedule
        constant or one_cycle.
    """

    steps: int = 500
    lr: float = 1e-2
    rho_lr: float | None = None
    schedule: Literal["constant", "one_cycle"] = "one_cycle"


@dataclass(frozen=True)
class DemoSettings:
    """Settings of the demo; the run's folder keeps them as config.yaml.

    Parameters
    ----------
    out
        Folder for data, networks, table and picture. Called again, the demo goes on where it stopped.
    grid_size
        Voxels along each edge of the simulated scans.
    voxel_size
        Millimetres.
    label_map
        coarse: eight tissues, which minutes on a CPU can teach; fifty classes they cannot.
    width
        Filters of each layer of MeshNet.
    dilations
        One per 3x3x3 layer.
    batch_size
        Sub-volumes per step.
    n_train
        Training scans per site, in about the paper's proportions.
    n_test
        Held-out scans per site, and of the unseen site A.
    map
        How the MAP networks are trained.
    vi
        How the variational network of H is trained.
    vcl
        How the sites' networks are trained, from that of H.
    finetune
        How the consolidated network is trained on H.
    n_samples
        Monte Carlo samples per prediction.
    seed
        Of anatomy, scans, networks and noise.
    """

    out: Path = Path("demo")
    grid_size: int = 64
    voxel_size: float = 3.0
    label_map: str = "coarse"
    width: int = 12
    dilations: tuple[int, ...] = (1, 2, 4, 8)
    batch_size: int = 2
    n_train: dict[str, int] = field(default_factory=lambda: {"H": 16, "N": 19, "B": 6, "W": 5})
    n_test: int = 3
    map: Stage = Stage(steps=500, lr=1e-2)
    vi: Stage = Stage(steps=150, lr=3e-3, rho_lr=3e-2)
    vcl: Stage = Stage(steps=150, lr=3e-3, rho_lr=3e-2)
    finetune: Stage = Stage(steps=60, lr=1e-3, rho_lr=1e-2)
    n_samples: int = 3
    seed: int = 0

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises
        ------
        InputError
            Naming the setting, its value and the remedy.
        """
        if self.n_train.keys() != {ORIGIN, *SITES}:
            raise InputError(f"--n_train {self.n_train}: give a number of scans for each of H, N, B and W")
        for name, value in (*self.n_train.items(), ("n_test", self.n_test), ("n_samples", self.n_samples)):
            if value < 1:
                raise InputError(f"{name} {value}: give a positive number")
        if self.grid_size % SIDE or self.grid_size < SIDE:
            raise InputError(f"--grid_size {self.grid_size}: give a multiple of {SIDE} voxels")
        LabelMap.load(self.label_map)
        for mode in ("map", "vi", "vcl", "finetune"):
            if (steps := getattr(self, mode).steps) < 1:
                raise InputError(f"--{mode}.steps {steps}: give a positive number")
            self.training(mode, data=self.out, out=self.out, prior=self.out).check()

    def training(self, mode: str, *, prior: Path | None = None, **paths: Path) -> TrainSettings:
        """The trainer's settings of a mode, as one epoch: a demo's network is validated once, at its end."""
        stage: Stage = getattr(self, mode)
        return TrainSettings(
            mode=mode, **paths, prior=prior if mode in ("vcl", "finetune") else None,
            lr=stage.lr, rho_lr=stage.rho_lr, schedule=stage.schedule, epochs=1, steps_per_epoch=stage.steps,
            label_map=self.label_map, grid_size=self.grid_size, voxel_size=self.voxel_size,
            width=self.width, dilations=self.dilations, batch_size=self.batch_size,
            seed=self.seed, cache_dir=self.out / "cache",
        )  # fmt: skip


def run(settings: DemoSettings) -> None:
    """Run the cycle and print what it found.

    Raises
    ------
    InputError
        If a setting is wrong or the folder cannot be written or holds another demo.
    """
    settings = replace(settings, out=settings.out.absolute())
    settings.check()
    out = settings.out
    _keep_config(settings, out)
    manifests = {site: _site(settings, out, site) for site in (ORIGIN, *SITES, UNSEEN)}
    networks = dict(_train_all(settings, out, manifests))
    held_out = {site: _held_out(settings, out, manifest) for site, manifest in manifests.items()}
    table = _score(settings, networks, held_out)
    write_whole(out / "table.csv", table.to_csv(float_format="%.4f").encode())
    _draw(settings, networks, held_out[UNSEEN], out / _PICTURE)
    print(_report(settings, table, out))


def _report(settings: DemoSettings, table: pd.DataFrame, out: Path) -> str:
    """The table for people, and where every file lies."""
    files = {"settings": "config.yaml", "scans": "sites", "networks": "networks", "table": "table.csv"}
    files |= {"weights": _WEIGHTS, "picture": _PICTURE}
    tissues = LabelMap.load(settings.label_map).n_classes - 1
    return "\n".join(
        (
            f"\nDice in %: mean over {tissues} tissues without background, over {settings.n_test} held-out scans a",
            f"site; Avg. is over all of {', '.join((ORIGIN, *SITES))}; {UNSEEN} took no part in training",
            (100 * table).to_string(float_format="%.1f", na_rep="-"),
            "",
            *(f"{name:<10}{out / file}" for name, file in files.items()),
        )
    )


def _keep_config(settings: DemoSettings, out: Path) -> None:
    """Write config.yaml, or refuse to mix two demos in one folder."""
    values = {name: value for name, value in asdict(settings).items() if name != "out"}
    values["dilations"] = list(settings.dilations)
    path = out / "config.yaml"
    if path.exists() and yaml.safe_load(path.read_text(encoding="utf-8")) != values:
        raise InputError(f"{path}: a demo with other settings lies here; give another --out or remove the folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be made ({error.strerror}); give another --out") from error
    write_whole(path, yaml.safe_dump(values, sort_keys=False).encode())


def _site(settings: DemoSettings, out: Path, site: str) -> Path:
    """The site's manifest; its scans are simulated if they are not there yet."""
    manifest = out / "sites" / site / "manifest.csv"
    if not manifest.exists():
        print(f"simulating site {site}", flush=True)
        grid = Grid(settings.grid_size, settings.voxel_size)
        write_site(manifest.parent, site, settings.n_train.get(site, 0), settings.n_test, grid=grid, seed=settings.seed)
    return manifest


def _train_all(settings: DemoSettings, out: Path, manifests: dict[str, Path]) -> Iterator[tuple[str, list[Posterior]]]:
    """The rows of the table: each network by its name in the paper, an ensemble being several."""

    def trained(name: str, mode: str, site: str, **start: Path) -> Posterior:
        print(f"training {name}", flush=True)
        folder = _folder(out, name)
        run_settings = settings.training(mode, data=manifests[site], out=folder, **start)
        return train(run_settings, resume=folder.exists())

    maps = {site: trained(f"MAP {site}", "map", site) for site in (ORIGIN, *SITES)}
    yield "untrained", [_untrained(maps[ORIGIN], settings.seed)]
    for site, posterior in maps.items():
        yield f"MAP {site}", [posterior]
    yield "ensemble of MAP", list(maps.values())
    origin = trained(ORIGIN, "vi", ORIGIN, init=_file(out, f"MAP {ORIGIN}"))
    yield ORIGIN, [origin]
    consolidation = Consolidation(origin)
    for site in SITES:
        posterior = trained(f"{ORIGIN}->{site}", "vcl", site, prior=_file(out, ORIGIN))
        consolidation.add(posterior)
        yield f"{ORIGIN}->{site}", [posterior]
    name = f"{ORIGIN}->{'+'.join(SITES)}"
    consolidated = consolidation.posterior(name)
    _folder(out, name).mkdir(exist_ok=True)
    consolidated.save(_file(out, name))
    weights = pd.DataFrame(asdict(row) for row in consolidation.report())
    weights["site"] = [Path(site).parent.name for site in weights["site"]]
    write_whole(out / _WEIGHTS, weights.to_csv(index=False, float_format="%.4f").encode())
    print(f"weight of each site's means, median over layers: {_medians(weights)}")
    print("  (1/3 each would average the sites, 1 each adds their shifts up)", flush=True)
    yield f"{name} (consolidated)", [consolidated]
    yield f"{name}->{ORIGIN} (DWC)", [trained(f"{name}->{ORIGIN}", "finetune", ORIGIN, prior=_file(out, name))]


def _medians(weights: pd.DataFrame) -> str:
    """Site and weight, in words."""
    return ", ".join(f"{site} {weight:.2f}" for site, weight in weights.groupby("site")["weight"].median().items())


def _folder(out: Path, name: str) -> Path:
    """A network's run folder, its name without spaces, arrows and plus signs."""
    return out / "networks" / name.replace(" ", "-").replace("->", "_").replace("+", "")


def _file(out: Path, name: str) -> Path:
    return _folder(out, name) / "posterior.safetensors"


def _untrained(like: Posterior, seed: int) -> Posterior:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = MeshNet.from_architecture(like.metadata["architecture"], bayesian=False)
    return Posterior.from_model(network)


def _held_out(settings: DemoSettings, out: Path, manifest: Path) -> SubVolumes:
    scans = [scan for scan in read_manifest(manifest) if scan.split == "test"]
    grid = Grid(settings.grid_size, settings.voxel_size)
    return prepare(scans, LabelMap.load(settings.label_map), grid, out / "cache", progress=False)


def _networks(posteriors: Sequence[Posterior]) -> list[MeshNet]:
    return [MeshNet.from_posterior(posterior) for posterior in posteriors]


def _score(
    settings: DemoSettings, networks: dict[str, list[Posterior]], held_out: dict[str, SubVolumes]
) -> pd.DataFrame:
    """Dice of every network (row) at every site (column), and the mean over the sites that trained."""
    rows = {}
    for name, posteriors in networks.items():
        print(f"scoring {name}", flush=True)
        scores = {
            site: score_volumes(_networks(posteriors), data, n_samples=settings.n_samples, progress=False)
            for site, data in held_out.items()
        }
        took_part = [score for site in (ORIGIN, *SITES) for score in scores[site]]
        rows[name] = {site: summary(scores[site])["volume_weighted"]["dice"] for site in (ORIGIN, *SITES)}
        rows[name]["Avg."] = summary(took_part)["volume_weighted"]["dice"]
        rows[name][UNSEEN] = summary(scores[UNSEEN])["volume_weighted"]["dice"]
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("network")


def _draw(settings: DemoSettings, networks: dict[str, list[Posterior]], data: SubVolumes, path: Path) -> None:
    """The first held-out scan of the unseen site: truth, DWC and the MAP network of H, errors in red."""
    image, truth = data.volume(0)
    shown = {"DWC": list(networks)[-1], f"MAP {ORIGIN}": f"MAP {ORIGIN}"}
    predictions = {
        title: predict_volume(_networks(networks[name]), image, n_samples=settings.n_samples).labels
        for title, name in shown.items()
    }
    title = f"A scan of site {UNSEEN}, which took no part in training"
    overlay(image, truth, predictions, path, names=data.label_map.names, title=title)
