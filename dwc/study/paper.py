"""The paper's study (McClure et al. 2018, sections 3.1 and 3.2): the rows of its Table 2, two more, what is compared.

The plain average has no standard deviations and predicts at its means; variational networks average samples.

`run` makes the sites, trains the networks, scores the rows and leaves tables and report in the study's folder. Each
step is another room's; here it is decided which networks and comparisons there are.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import yaml

from dwc.base.errors import InputError
from dwc.base.files import open_folder, write_whole
from dwc.base.tables import read_settings, write_table
from dwc.report.figures import site_slices
from dwc.report.html import write_report
from dwc.study.cost import estimate, what_is_left
from dwc.study.networks import Network, Networks, average, consolidated, finetuned, map_network, variational, vcl
from dwc.study.scoring import Kind, Row, Scores
from dwc.study.settings import ALL_SITES, ORIGIN, SITES, TRAINING_SITES, UNSEEN, StudySettings
from dwc.study.sites import POOLED, check_manifests, held_out_volumes, known_manifests, make_manifests, prepare_all
from dwc.study.speed import controls, speed_table
from dwc.study.statistics import dice_table, paired_tests

__all__ = ["COMPARISONS", "ROWS", "choose_rows", "keep_config", "run", "tests_as_text"]

_SCANS = ("seed", "grid_size", "voxel_size", "n_train", "n_test", "anatomies", "manifests")  # what scans follow from


def _rows() -> tuple[Row, ...]:
    """The rows in the paper's order; the variational network of H and the plain average are not in the paper."""
    maps = [map_network(site) for site in TRAINING_SITES]
    origin = variational(ORIGIN)
    sites = [vcl(origin, site) for site in SITES]
    chains = [vcl(vcl(vcl(origin, a), b), c) for a, b, c in (SITES, SITES[::-1])]
    joint = consolidated(origin, sites)
    dwc = finetuned(joint, ORIGIN)

    def row(network: Network, kind: Kind, name: str | None = None) -> Row:
        return Row(name or network.name, kind, (network,))

    return (
        *(row(network, "map") for network in maps),
        row(origin, "vi", f"{origin.name} (variational)"),
        *(row(network, "vcl") for network in sites),
        *(row(network, "chain") for network in chains),
        row(average(origin, sites), "average", f"{joint.name} (plain average)"),
        row(joint, "consolidated", f"{joint.name} (DWC w/o FT)"),
        Row("Ensemble", "ensemble", tuple(maps)),
        row(dwc, "dwc", f"{dwc.name} (DWC)"),
        row(map_network(POOLED, "pooled"), "pooled"),
    )


ROWS = _rows()
_DWC, _POOLED, _JOINT, _AVERAGE = (
    next(row for row in ROWS if row.kind == kind) for kind in ("dwc", "pooled", "consolidated", "average")
)
_CHAINS = tuple(row.name for row in ROWS if row.kind == "chain")
COMPARISONS = (
    *((_DWC.name, row.name) for row in ROWS if row.kind in ("ensemble", "chain")),
    _CHAINS[::-1],  # whether their order matters
    (_JOINT.name, _AVERAGE.name),  # samples of the consolidated network against the average at its means
)
CALIBRATED = ("pooled", "ensemble", "dwc")  # kinds


def choose_rows(names: Sequence[str]) -> tuple[Row, ...]:
    """The rows of these names, all without any; a name is a row's, or what of it comes before the brackets.

    Raises
    ------
    InputError
        If no row has such a name, or several have.
    """
    chosen = []
    for name in names:
        exact = [row for row in ROWS if row.name.lower() == name.lower()]
        found = exact or [row for row in ROWS if row.name.split(" (")[0].lower() == name.lower()]
        if len(found) != 1:
            what = "several rows" if found else "no row"
            raise InputError(f"--only {name}: names {what}; choose from: {'; '.join(r.name for r in found or ROWS)}")
        chosen += found
    return tuple(row for row in ROWS if row in chosen) or ROWS


def run(settings: StudySettings, *, only: Sequence[str] = (), dry_run: bool = False) -> None:
    """Run the study, or what of it is not done yet, and print its table.

    Processes that are given the same study at the same time share its networks and rows, and all print the table.

    Parameters
    ----------
    settings : StudySettings
        What to run and where to.
    only : sequence of str
        Rows to train and score; all without any. The tables hold every row that has been scored so far.
    dry_run : bool
        Say what would be trained and scored and how long it might take, and write nothing.

    Raises
    ------
    InputError
        If a setting or a file is wrong, before work starts; later if a loss diverges or the disk is full.
    Interrupted
        After a signal; called again, the study goes on.
    """
    settings.check()
    rows = choose_rows(only)
    _check_folder(settings)
    check_manifests(settings)
    if dry_run:
        manifests = {**known_manifests(settings), POOLED: settings.out / "sites" / POOLED / "manifest.csv"}
    else:
        keep_config(settings)
        manifests = make_manifests(settings)
        prepare_all(settings, manifests)
    networks = Networks(settings, manifests)
    needed = networks.needed(network for row in rows for network in row.networks)
    needed = networks.needed([*needed, *controls(settings, needed)])
    left = what_is_left(networks, needed, rows)
    print(left.lines(each=dry_run), flush=True)
    print(estimate(settings, left), flush=True)
    if dry_run:
        return
    networks.make(needed)
    scores = Scores(networks, {site: held_out_volumes(settings, site, manifests[site]) for site in ALL_SITES})
    scores.score(rows)
    _report(settings, networks, scores)


def keep_config(settings: StudySettings) -> None:
    """Write config.yaml; refuse to mix scans of other settings into the folder.

    Raises
    ------
    InputError
        If the folder cannot be written, or holds a study of other scans.
    """
    _check_folder(settings)
    open_folder(settings.out)
    write_whole(settings.out / "config.yaml", yaml.safe_dump(settings.to_json(), sort_keys=False).encode())


def _check_folder(settings: StudySettings) -> None:
    path, values = settings.out / "config.yaml", settings.to_json()
    simulated = settings.out / "sites" / ORIGIN
    before = read_settings(path) if path.exists() and simulated.exists() else values
    for name in _SCANS:
        if before.get(name) != values[name]:
            raise InputError(
                f"{path}: {name} is {before.get(name)} there and {values[name]} now, which are other scans; give "
                "another --out or remove the folder"
            )


def _report(settings: StudySettings, networks: Networks, scores: Scores) -> None:
    """Write and print the tables of all rows that are scored, and the report."""
    out, rows = settings.out, [row for row in ROWS if not scores.missing(row)]
    volumes = scores.table("volumes", rows)
    write_table(out / "rows.csv", _effort(networks, rows))
    write_table(out / "volumes.csv", volumes)
    write_table(out / "classes.csv", scores.table("classes", rows))
    write_table(out / "table.csv", table := dice_table(volumes), index=True)
    write_table(out / "tests.csv", tests := paired_tests(volumes, COMPARISONS))
    calibrated = [row for row in rows if row.kind in CALIBRATED]
    _keep(out / "calibration.csv", scores.table("calibration", calibrated) if calibrated else pd.DataFrame())
    _keep(out / "speed.csv", speed := speed_table(networks))
    text = _as_text(table, tests, speed, volumes)
    write_whole(out / "table.txt", f"{text}\n".encode())
    if _DWC in rows and _POOLED in rows:
        _pictures(settings, scores, volumes)
    report = write_report(out)
    print(f"\n{text}\n\n{report}")


def _keep(path: Path, table: pd.DataFrame) -> None:
    """Write a table; none, and not that of other settings either, where there is nothing to say yet."""
    if len(table):
        write_table(path, table)
    else:
        path.unlink(missing_ok=True)


def _effort(networks: Networks, rows: Sequence[Row]) -> pd.DataFrame:
    """What is behind each row: files, steps, the step of its plateau, seconds."""
    lines = []
    for row in rows:
        files = ";".join(str(networks.file(network).relative_to(networks.settings.out)) for network in row.networks)
        plateaus = [log[-1]["plateau_step"] for network in row.networks if (log := networks.log(network))]
        lines.append(
            {
                "row": row.name,
                "kind": row.kind,
                "networks": files,
                "steps": sum(map(networks.steps, row.networks)),
                "total_steps": networks.total_steps(row.networks),
                "plateau_step": plateaus[0] if len(plateaus) == 1 else None,
                "seconds": sum(map(networks.seconds, row.networks)),
            }
        )
    return pd.DataFrame(lines).astype({"plateau_step": "Int64"})


def _as_text(table: pd.DataFrame, tests: pd.DataFrame, speed: pd.DataFrame, volumes: pd.DataFrame) -> str:
    """The tables for people."""
    counts = volumes.groupby(["row", "site"], sort=False).size().groupby("site", sort=False).first()
    numbers = ", ".join(f"{site} {n}" for site, n in counts.items())
    parts = [
        f"Dice in %, mean over classes without background, over held-out volumes ({numbers});",
        f"Avg.: each volume of {', '.join(TRAINING_SITES)} counts the same; {UNSEEN} took no part in training",
        (100 * table).to_string(float_format="%.2f", na_rep="-"),
        "",
        tests_as_text(tests),
    ]
    if len(speed):
        shown = speed.dropna(axis="columns", how="all").to_string(index=False, float_format="%.4f", na_rep="-")
        parts += ["", "MAP from scratch and VCL from H's network: Dice at equal steps, and steps to a Dice", shown]
    return "\n".join(parts)


def tests_as_text(tests: pd.DataFrame) -> str:
    """The paired tests for people, in points of Dice in %."""
    points = {name: 100 * tests[name] for name in ("mean_difference", "ci_low", "ci_high")}
    table = tests.assign(**points).to_string(index=False, float_format="%.3g", na_rep="-")
    return (
        f"{len(tests)} paired two-tailed t-tests across volumes and across subjects (each with the mean over its "
        f"volumes),\nnot corrected for their number: differences in points, 95 % interval, effect size d_z\n{table}"
    )


def _pictures(settings: StudySettings, scores: Scores, volumes: pd.DataFrame) -> None:
    """Figures 1 to 4: of each site the volume whose Dice under DWC is nearest the site's mean."""
    pictures = {}
    dwc = volumes[volumes["row"] == _DWC.name]
    for site, data in scores.held_out.items():
        dice = dwc.loc[dwc["site"] == site, "dice"].reset_index(drop=True)
        v = int((dice - dice.mean()).abs().idxmin())
        image, truth = data.volume(v)
        predicted = {"DWC": scores.predict(_DWC, image), "MAP pooled": scores.predict(_POOLED, image)}
        pictures[site] = (image, truth, predicted, f"{site}: {data.scans[v].subject}")
    folder = settings.out / "figures"
    open_folder(folder)
    site_slices(pictures, folder / "sites.png", names=data.label_map.names)
