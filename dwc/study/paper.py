"""The paper's study (McClure et al. 2018, sections 3.1 and 3.2): Table 2 with two more rows, and its comparisons."""

from collections.abc import Iterable, Sequence
from functools import reduce
from pathlib import Path

import pandas as pd

from dwc.base.errors import InputError
from dwc.base.files import open_folder, write_whole
from dwc.base.tables import write_table
from dwc.report.figures import site_slices
from dwc.report.html import SITES_PICTURE, write_report
from dwc.report.results import INTEREST
from dwc.study.context import Study
from dwc.study.cost import estimate, what_is_left
from dwc.study.graph import Network, average, cycle, map_network, vcl, with_parents
from dwc.study.networks import Networks
from dwc.study.scoring import Kind, Row, Scores
from dwc.study.settings import StudySettings
from dwc.study.sites import begin, check_manifests
from dwc.study.speed import controls, speed_table
from dwc.study.statistics import dice_table, paired_tests

__all__ = ["choose_rows", "comparisons", "rows_of", "run", "tests_as_text", "unseen_clause"]


def rows_of(settings: StudySettings) -> tuple[Row, ...]:
    """The rows in the paper's order, plus the origin's variational network and the plain average.

    The chains train on one site after another, in the order of the settings and in reverse; with one site there are
    none.
    """
    maps, origin, sites, joint, dwc = cycle(settings.origin, settings.sites)
    orders = (settings.sites, settings.sites[::-1]) if len(sites) > 1 else ()

    def row(network: Network, kind: Kind, name: str | None = None) -> Row:
        return Row(name or network.name, kind, (network,))

    return (
        *(row(network, "map") for network in maps),
        row(origin, "vi", f"{origin.name} (variational)"),
        *(row(network, "vcl") for network in sites),
        *(row(reduce(vcl, order, origin), "chain") for order in orders),
        row(average(origin, sites), "average", f"{joint.name} (plain average)"),
        row(joint, "consolidated", f"{joint.name} (DWC w/o FT)"),
        Row("Ensemble", "ensemble", tuple(maps)),
        row(dwc, "dwc", f"{dwc.name} (DWC)"),
        row(map_network(settings.pooled_name, "pooled"), "pooled"),
    )


def comparisons(rows: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pairs of row names to test, from (name, kind) of the rows."""
    names: dict[str, list[str]] = {}
    for name, kind in rows:
        names.setdefault(kind, []).append(name)
    chains = names.get("chain", [])
    others = [*chains, *names.get("ensemble", [])]
    pairs = [(dwc, other) for dwc in names.get("dwc", []) for other in others]
    if len(chains) == 2:  # does their order matter?
        pairs.append((chains[1], chains[0]))
    # The consolidated network averages samples, the plain average predicts at its means.
    return pairs + list(zip(names.get("consolidated", []), names.get("average", []), strict=False))


def choose_rows(rows: Sequence[Row], names: Sequence[str]) -> tuple[Row, ...]:
    """The rows with these names (all if none is given); names may omit the part in brackets."""
    chosen = []
    for name in names:
        exact = [row for row in rows if row.name.lower() == name.lower()]
        found = exact or [row for row in rows if row.name.split(" (")[0].lower() == name.lower()]
        if len(found) != 1:
            what = "several rows" if found else "no row"
            raise InputError(f"`only` {name}: matches {what}; choose from: {'; '.join(r.name for r in found or rows)}")
        chosen += found
    return tuple(row for row in rows if row in chosen or not chosen)


def run(settings: StudySettings, *, only: Sequence[str] = (), dry_run: bool = False) -> None:
    """Run or continue the study and print its table of all rows scored so far; raises Interrupted after a signal.

    `only` names the rows to train and score. `dry_run` prints what is left to do and the estimated time, and writes
    nothing. Several processes may run the same study and share its work; each prints the table.
    """
    study = Study(settings)
    rows = choose_rows(rows_of(settings), only)
    if dry_run:
        check_manifests(study)
    else:
        begin(study)
    networks = Networks(study)
    needed = with_parents(network for row in rows for network in row.networks)
    needed = with_parents([*needed, *controls(settings, needed)])
    left = what_is_left(networks, needed, rows)
    print(left.lines(each=dry_run), flush=True)
    print(estimate(study, left), flush=True)
    if dry_run:
        return
    networks.make(needed)
    scores = Scores(networks)
    scores.score(rows)
    _report(scores)


def _report(scores: Scores) -> None:
    """Write and print the tables of all scored rows, and the report."""
    networks, settings, out = scores.networks, scores.study.settings, scores.study.out
    rows = [row for row in rows_of(settings) if not scores.missing(row)]
    volumes = scores.table("volumes", rows)
    table = dice_table(volumes, settings.groups)
    tests = paired_tests(volumes, comparisons((row.name, row.kind) for row in rows), settings.groups)
    speed = speed_table(networks)
    calibrated = [row for row in rows if row.kind in INTEREST]
    write_table(out / "rows.csv", _effort(networks, rows))
    write_table(out / "volumes.csv", volumes)
    write_table(out / "classes.csv", scores.table("classes", rows))
    write_table(out / "table.csv", table, index=True)
    write_table(out / "tests.csv", tests)
    _keep(out / "calibration.csv", scores.table("calibration", calibrated) if calibrated else pd.DataFrame())
    _keep(out / "speed.csv", speed)
    text = _as_text(settings, table, tests, speed, volumes)
    write_whole(out / "table.txt", f"{text}\n".encode())
    _pictures(scores, {row.kind: row for row in rows}, volumes)
    report = write_report(out)
    print(f"\n{text}\n\n{report}")


def _keep(path: Path, table: pd.DataFrame) -> None:
    """Write a table; if it is empty, delete the file, which may be left from other settings."""
    if len(table):
        write_table(path, table)
    else:
        path.unlink(missing_ok=True)


def _effort(networks: Networks, rows: Sequence[Row]) -> pd.DataFrame:
    """The cost of each row: files, steps, first step of its plateau, seconds."""
    lines = []
    for row in rows:
        files = ";".join(str(networks.file(network).relative_to(networks.study.out)) for network in row.networks)
        plateaus = [log[-1]["plateau_step"] for network in row.networks if (log := networks.log(network))]
        lines.append({
            "row": row.name, "kind": row.kind, "networks": files, "steps": sum(map(networks.steps, row.networks)),
            "total_steps": networks.total_steps(row.networks),
            "plateau_step": plateaus[0] if len(plateaus) == 1 else None,
            "seconds": sum(map(networks.seconds, row.networks)),
        })  # fmt: skip
    return pd.DataFrame(lines).astype({"plateau_step": "Int64"})


def _as_text(
    settings: StudySettings, table: pd.DataFrame, tests: pd.DataFrame, speed: pd.DataFrame, volumes: pd.DataFrame
) -> str:
    counts = volumes.groupby(["row", "site"], sort=False).size().groupby("site", sort=False).first()
    numbers = ", ".join(f"{site} {n}" for site, n in counts.items())
    parts = [
        f"Dice in %, mean over classes without background, over held-out volumes ({numbers});",
        f"Avg.: each volume of {', '.join(settings.training_sites)} counts the same{unseen_clause(settings)}",
        (100 * table).to_string(float_format="%.2f", na_rep="-"),
        "",
        tests_as_text(tests),
    ]
    if len(speed):
        shown = speed.dropna(axis="columns", how="all").to_string(index=False, float_format="%.4f", na_rep="-")
        about = f"MAP from scratch and VCL from {settings.origin}'s network: Dice at equal steps, and steps to a Dice"
        parts += ["", about, shown]
    return "\n".join(parts)


def unseen_clause(settings: StudySettings) -> str:
    """A clause that names the unseen sites, empty if there are none."""
    return f"; {', '.join(settings.unseen)} took no part in training" if settings.unseen else ""


def tests_as_text(tests: pd.DataFrame) -> str:
    """The paired tests for printing, in points of Dice in %."""
    points = {name: 100 * tests[name] for name in ("mean_difference", "ci_low", "ci_high")}
    table = tests.assign(**points).to_string(index=False, float_format="%.3g", na_rep="-")
    return (
        f"{len(tests)} paired two-tailed t-tests across volumes and across subjects (each with the mean over its "
        f"volumes),\nnot corrected for their number: differences in points, 95 % interval, effect size d_z\n{table}"
    )


def _pictures(scores: Scores, rows: dict[Kind, Row], volumes: pd.DataFrame) -> None:
    """Figures 1 to 4, if DWC and the pooled network are scored: each site's volume nearest its mean Dice."""
    if not {"dwc", "pooled"} <= rows.keys():
        return
    pictures = {}
    dwc = volumes[volumes["row"] == rows["dwc"].name]
    for site in scores.sites:
        data, dice = scores.held_out[site], dwc.loc[dwc["site"] == site, "dice"].reset_index(drop=True)
        v = int((dice - dice.mean()).abs().idxmin())
        image, truth = data.volume(v)
        predicted = {"DWC": scores.predict(rows["dwc"], image), "MAP pooled": scores.predict(rows["pooled"], image)}
        pictures[site] = (image, truth, predicted, f"{site}: {data.scans[v].subject}")
    folder = scores.study.out / "figures"
    open_folder(folder)
    site_slices(pictures, folder / SITES_PICTURE, names=scores.study.label_map.names)
