"""The demo: the whole cycle as a study with few rows and one picture, minutes on two CPU cores."""

import pandas as pd

from dwc.base.files import write_whole
from dwc.base.tables import as_csv, read_table
from dwc.report.figures import overlay
from dwc.study.context import Study
from dwc.study.graph import Network, cycle, untrained
from dwc.study.networks import Networks
from dwc.study.paper import unseen_clause
from dwc.study.scoring import Row, Scores
from dwc.study.settings import StudySettings
from dwc.study.sites import begin
from dwc.study.statistics import dice_table

__all__ = ["run"]

_PICTURE, _WEIGHTS = "segmentation.png", "consolidation.csv"


def run(settings: StudySettings) -> None:
    """Run or continue the cycle; write its table, weights and picture. Raises Interrupted after a signal."""
    study = Study(settings)
    begin(study)
    networks = Networks(study)
    rows, joint = _rows(settings)
    networks.make([joint])
    _show_weights(networks, joint)
    networks.make(network for row in rows for network in row.networks)
    scores = Scores(networks)
    scores.score(rows)
    volumes = scores.table("volumes", rows)
    table = dice_table(volumes, settings.groups).rename_axis("network")
    write_whole(study.out / "table.csv", as_csv(table, index=True, float_format="%.4f").encode())
    _draw(scores, {"DWC": rows[-1], f"MAP {settings.origin}": rows[1]})
    print(_report(study, table, volumes))


def _rows(settings: StudySettings) -> tuple[list[Row], Network]:
    """The rows of the table, and the consolidated network."""
    maps, origin, sites, joint, dwc = cycle(settings.origin, settings.sites)
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


def _show_weights(networks: Networks, joint: Network) -> None:
    """Save and print each site's weight in the consolidation."""
    weights = read_table(networks.folder(joint) / "weights.csv")
    weights["site"] = weights["site"].str.replace("->", "_")
    write_whole(networks.study.out / _WEIGHTS, as_csv(weights, float_format="%.4f").encode())
    medians = weights.groupby("site")["weight"].median()
    words = ", ".join(f"{site} {weight:.2f}" for site, weight in medians.items())
    print(f"weight of each site's means, median over layers: {words}")
    print(f"  (1/{len(medians)} each would average the sites, 1 each would add up their shifts)", flush=True)


def _report(study: Study, table: pd.DataFrame, volumes: pd.DataFrame) -> str:
    """The printed table, and where each file is."""
    files = {"settings": "config.yaml", "scans": "sites", "networks": "networks", "table": "table.csv"}
    files |= {"weights": _WEIGHTS, "picture": _PICTURE}
    counts = volumes.groupby(["row", "site"]).size()
    low, high = counts.min(), counts.max()
    n_scans = f"{low}" if low == high else f"{low} to {high}"
    trained = ", ".join(study.settings.training_sites)
    return "\n".join(
        (
            f"\nDice in %: mean over {study.label_map.n_classes - 1} tissues without background, over "
            f"{n_scans} held-out scans per",
            f"site; Avg. is over all of {trained}{unseen_clause(study.settings)}",
            (100 * table).to_string(float_format="%.1f", na_rep="-"),
            "",
            *(f"{name:<10}{study.out / file}" for name, file in files.items()),
        )
    )


def _draw(scores: Scores, shown: dict[str, Row]) -> None:
    """Draw the first held-out scan of the last site (unseen if there is one): truth, predictions, errors in red."""
    site = scores.sites[-1]
    data = scores.held_out[site]
    image, truth = data.volume(0)
    predictions = {title: scores.predict(row, image) for title, row in shown.items()}
    status = "unseen in training" if site in scores.study.settings.unseen else "held out from training"
    title = f"A scan of site {site}, {status}"
    overlay(image, truth, predictions, scores.study.out / _PICTURE, names=data.label_map.names, title=title)
