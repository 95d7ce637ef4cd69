"""The whole distributed weight consolidation cycle on simulated sites, at a size that two CPU cores manage.

A small study on the machinery of `dwc.study`: rows of its own, no chains, tests or report, one picture.
Nothing here trains, consolidates or scores by itself.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import pandas as pd
import yaml

from dwc.base.errors import InputError
from dwc.base.files import open_folder, write_whole
from dwc.base.tables import read_settings
from dwc.data.labels import LabelMap
from dwc.report.figures import overlay
from dwc.study.networks import Network, Networks, consolidated, finetuned, map_network, untrained, variational, vcl
from dwc.study.scoring import Row, Scores
from dwc.study.settings import ALL_SITES, ORIGIN, SITES, TRAINING_SITES, UNSEEN, Stage, StudySettings
from dwc.study.sites import held_out_volumes, make_manifests
from dwc.study.statistics import dice_table

__all__ = ["DemoSettings", "run"]

_PICTURE, _WEIGHTS = "segmentation.png", "consolidation.csv"
_MAP = Stage(steps=500, lr=3e-2)
_VARIATIONAL = Stage(steps=150, lr=3e-3, rho_lr=3e-2)
_FINETUNE = Stage(steps=60, lr=1e-3, rho_lr=1e-2)


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
    map: Stage = _MAP
    vi: Stage = _VARIATIONAL
    vcl: Stage = _VARIATIONAL
    finetune: Stage = _FINETUNE
    n_samples: int = 3
    seed: int = 0

    def study(self) -> StudySettings:
        """The study that the demo is."""
        values = {name: value for name, value in vars(self).items() if name != "n_test"}
        n_test = dict.fromkeys(ALL_SITES, self.n_test)
        return StudySettings(**values, n_test=n_test, validation_sub_volumes=512)


def run(settings: DemoSettings) -> None:
    """Run the cycle and print what it found.

    Raises
    ------
    InputError
        If a setting is wrong or the folder cannot be written or holds another demo.
    """
    study = settings.study()
    study.check()
    out = study.out
    _keep_config(settings, out)
    manifests = make_manifests(study)
    networks = Networks(study, manifests)
    rows, joint = _rows()
    for network in networks.needed(network for row in rows for network in row.networks):
        networks.get(network)
        if network == joint:
            _show_weights(networks.folder(joint) / "weights.csv", out / _WEIGHTS)
    scores = Scores(networks, {site: held_out_volumes(study, site, manifests[site]) for site in ALL_SITES})
    scores.score(rows)
    table = dice_table(scores.table("volumes", rows)).rename_axis("network")
    write_whole(out / "table.csv", table.to_csv(float_format="%.4f").encode())
    _draw(scores, {"DWC": rows[-1], f"MAP {ORIGIN}": rows[1]}, out / _PICTURE)
    print(_report(settings, table, out))


def _rows() -> tuple[list[Row], Network]:
    """The rows of the table, and the consolidated network."""
    maps = [map_network(site) for site in TRAINING_SITES]
    origin = variational(ORIGIN)
    sites = [vcl(origin, site) for site in SITES]
    joint = consolidated(origin, sites)
    dwc = finetuned(joint, ORIGIN)
    rows = [
        Row("untrained", "map", (untrained(maps[0]),)),
        *(Row(f"MAP {network.site}", "map", (network,)) for network in maps),
        Row("ensemble of MAP", "ensemble", tuple(maps)),
        Row(origin.name, "vi", (origin,)),
        *(Row(network.name, "vcl", (network,)) for network in sites),
        Row(f"{joint.name} (consolidated)", "consolidated", (joint,)),
        Row(f"{dwc.name} (DWC)", "dwc", (dwc,)),
    ]
    return rows, joint


def _show_weights(source: Path, path: Path) -> None:
    """Keep and print the weight of each site in the consolidation."""
    weights = pd.read_csv(source)
    weights["site"] = weights["site"].str.replace("->", "_")
    write_whole(path, weights.to_csv(index=False, float_format="%.4f").encode())
    medians = weights.groupby("site")["weight"].median()
    words = ", ".join(f"{site} {weight:.2f}" for site, weight in medians.items())
    print(f"weight of each site's means, median over layers: {words}")
    print("  (1/3 each would average the sites, 1 each adds their shifts up)", flush=True)


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
    if path.exists() and read_settings(path) != values:
        raise InputError(f"{path}: a demo with other settings lies here; give another --out or remove the folder")
    open_folder(out)
    write_whole(path, yaml.safe_dump(values, sort_keys=False).encode())


def _draw(scores: Scores, shown: dict[str, Row], path: Path) -> None:
    """The first held-out scan of the unseen site: truth, and what rows see in it, errors in red."""
    data = scores.held_out[UNSEEN]
    image, truth = data.volume(0)
    predictions = {title: scores.predict(row, image) for title, row in shown.items()}
    title = f"A scan of site {UNSEEN}, which took no part in training"
    overlay(image, truth, predictions, path, names=data.label_map.names, title=title)
