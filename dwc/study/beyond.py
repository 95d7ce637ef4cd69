"""Studies of consolidation beyond the paper; each writes a table, raw scores and a picture."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dwc.base.errors import InputError
from dwc.base.files import open_folder
from dwc.base.tables import write_table
from dwc.consolidation import Consolidation
from dwc.data.dataset import SubVolumes
from dwc.evaluation import per_volume, score_volumes
from dwc.meshnet import MeshNet
from dwc.metrics.significance import paired_test
from dwc.posterior import Posterior
from dwc.report import studies as pictures
from dwc.report.results import AVERAGE
from dwc.simulation.scans import mixed_site
from dwc.study.context import Study
from dwc.study.graph import consolidated, cycle, finetuned, variational, vcl
from dwc.study.networks import Networks
from dwc.study.settings import ManySites, StudySettings
from dwc.study.sites import begin, simulate
from dwc.study.statistics import dice_table
from dwc.tempering import TemperScore, choose_temper

__all__ = ["leave_one_out", "many_sites", "rounds", "run", "tempering"]

_Result = tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]  # table, volumes, tests


def run(name: str, settings: StudySettings) -> pd.DataFrame:
    """Run or continue a study, print its table and return it; raises Interrupted after a signal.

    OUT/<name>/ gets ``table.csv`` (mean Dice, 0..1), ``volumes.csv`` (one line per row and held-out volume),
    ``tests.csv`` (paired t-tests across volumes) and a picture. Networks are shared with the paper's study in the same
    folder.
    """
    if name not in _STUDIES:
        raise InputError(f"`study` {name}: no such study; choose one of {', '.join(_STUDIES)}")
    study, origin = Study(settings), settings.origin
    if name in ("many-sites", "tempering") and settings.manifests is None and settings.n_scans(origin)[1] < 2:
        raise InputError(f"`n_test.{origin}` 1: every second held-out scan chooses lambda; give 2 or more")
    if name == "leave-one-out" and len(settings.sites) < 2:
        raise InputError(f"`sites` {', '.join(settings.sites)}: one leaves none to consolidate without it; name two")
    if name == "many-sites":
        if given := settings.manifests or settings.anatomies:
            raise InputError(f"`study` {name}: simulates its own sites from the procedural head; leave {given} out")
        if taken := set(_mixed_names(settings)) & set(settings.all_sites):
            raise InputError(f"`study` {name}: names its own sites {min(taken)} and so on; rename that site")
    begin(study, conform=False)
    folder = study.out / name
    open_folder(folder)
    table, volumes, tests = _STUDIES[name](study, folder)
    write_table(folder / "volumes.csv", volumes)
    write_table(folder / "tests.csv", tests)
    write_table(folder / "table.csv", table)
    print(_for_people(table, settings))
    print(f"\n{folder}: table.csv, tests.csv, volumes.csv and a picture")
    return table


def rounds(study: Study, folder: Path) -> _Result:
    """Repeat the cycle over the same sites; score each round's consolidated network, also after fine-tuning.

    Columns: round, network, Dice, and medians over sites and tensors of weight and of sigma_ratio (sigma_s / sigma_0).
    """
    networks, held_out = Networks(study), _held_out(study)
    origin = study.settings.origin
    prior = variational(origin)
    volumes = [_score(study, networks.get(prior), held_out, "0")]
    rows: list[dict[str, Any]] = [{"row": "0", "round": 0, "network": f"{origin}, before any round"}]
    for number in range(1, study.settings.rounds + 1):
        joint = consolidated(prior, [vcl(prior, site) for site in study.settings.sites])
        for row, network in ((f"{number}", joint), (f"{number} FT", finetuned(joint, origin))):
            volumes.append(_score(study, networks.get(network), held_out, row))
        weights = pd.read_csv(networks.folder(joint) / "weights.csv")[["weight", "sigma_ratio"]].median()
        rows.append({"row": f"{number}", "round": number, "network": "consolidated", **weights})
        rows.append({"row": f"{number} FT", "round": number, "network": f"fine-tuned on {origin}"})
        prior = joint
    table, joined = _joined(study, rows, volumes)
    pictures.rounds(table, origin, folder / "rounds.png")
    return table, joined, _tests(study, joined, [(row["row"], "0") for row in rows[1:]])


def leave_one_out(study: Study, folder: Path) -> _Result:
    """Remove each site in turn from the consolidated posterior; the loss is what it contributed.

    Columns: network, Dice, CPU seconds of the removal (of the training, in the row of all sites).
    """
    networks, held_out, origin = Networks(study), _held_out(study), study.settings.origin
    site_of = {str(networks.file(network)): network for network in cycle(origin, study.settings.sites).sites}
    consolidation = _consolidation(study, networks)
    everything, nothing = f"all of {', '.join(study.settings.sites)}", f"none ({origin})"
    volumes = [
        _score(study, consolidation.prior, held_out, nothing),
        _score(study, consolidation.posterior(), held_out, everything),
    ]
    trained = sum(map(networks.seconds, site_of.values()))
    rows: list[dict[str, Any]] = [{"row": nothing}, {"row": everything, "seconds": trained}]
    began = time.process_time()
    for site, rest in consolidation.leave_one_out(map(Posterior.load, site_of)):
        seconds = time.process_time() - began
        row = f"without {site_of[site.name].site}"
        volumes.append(_score(study, rest, held_out, row))
        rows.append({"row": row, "seconds": seconds})
        began = time.process_time()
    table, joined = _joined(study, rows, volumes)
    tests = _tests(study, joined, [(everything, row["row"]) for row in rows if row["row"] != everything])
    pictures.leave_one_out(tests, table.columns.drop(["row", "seconds"]), folder / "leave-one-out.png")
    return table, joined, tests


def tempering(study: Study, folder: Path) -> _Result:
    """Score every lambda of the grid; half of the origin's held-out scans choose it, the other half is scored.

    Columns: lambda (0: the prior), log_likelihood (nats per voxel) and validation_dice on scans that choose, chosen,
    Dice.
    """
    settings = study.settings
    held_out = _held_out(study)
    validation, held_out[settings.origin] = _halves(study)
    consolidation = _consolidation(study, Networks(study))
    chosen, scores = _choose(study, consolidation, validation)
    rows, volumes = [], []
    for score in scores:
        network = consolidation.tempered(score.temper).posterior() if score.temper else consolidation.prior
        row = f"lambda {score.temper:.4g}"
        volumes.append(_score(study, network, held_out, row))
        rows.append(
            {"row": row, "lambda": score.temper, "log_likelihood": score.log_likelihood,
             "validation_dice": score.dice, "chosen": score.temper == chosen}
        )  # fmt: skip
    table, joined = _joined(study, rows, volumes)
    pictures.tempering(table, settings.origin, len(settings.sites), folder / "tempering.png")
    best = f"lambda {chosen:.4g}"
    return table, joined, _tests(study, joined, [(best, "lambda 0"), (best, "lambda 1"), ("lambda 1", "lambda 0")])


def many_sites(study: Study, folder: Path) -> _Result:
    """Consolidate growing numbers of simulated sites, each a mixture of scanners.

    Columns: S (sites), rule (lambda is 1, 1/S or chosen on the origin), lambda, Dice (``sites`` is one held-out scan of
    each of the first sites), CPU seconds to read and consolidate S files, and untempered medians of weight and
    sigma_ratio.
    """
    settings = study.settings
    origin, many = variational(settings.origin), settings.many_sites or ManySites()
    names = _mixed_names(settings)
    _simulate_mixed(study, names, many.n_train)
    networks = Networks(study)
    validation, others = _halves(study)
    of_sites = [scan for name in names[: many.n_scored] for scan in study.held_out_scans(name)]
    held_out = {settings.origin: others, "sites": study.prepare(of_sites)}
    held_out |= {site: study.held_out(site) for site in settings.unseen}
    volumes = [_score(study, networks.get(origin), held_out, "0")]
    rows: list[dict[str, Any]] = [{"row": "0", "S": 0}]
    networks.make(vcl(origin, name) for name in names)
    files = [networks.file(vcl(origin, name)) for name in names]
    for n_sites in many.counts:
        began = time.process_time()
        consolidation = Consolidation(networks.get(origin))
        for file in files[:n_sites]:
            consolidation.add(Posterior.load(file))
        consolidation.posterior()
        seconds = time.process_time() - began
        report = pd.DataFrame(consolidation.report())
        rules = {"1": 1.0, "1/S": 1 / n_sites, "chosen": _choose(study, consolidation, validation)[0]}
        scored: dict[float, pd.DataFrame] = {}
        for rule, temper in rules.items():
            row = f"{n_sites}, {rule}"
            if temper not in scored:
                scored[temper] = _score(study, consolidation.tempered(temper).posterior(), held_out, row)
            volumes.append(scored[temper].assign(row=row))
            rows.append({"row": row, "S": n_sites, "rule": rule, "lambda": temper, "seconds": seconds,
                         **report[["weight", "sigma_ratio"]].median()})  # fmt: skip
    joined = pd.concat(volumes, ignore_index=True)
    dice = joined.pivot_table(index="row", columns="column", values="dice")[list(held_out)]
    table = pd.DataFrame(rows).join(dice, on="row").drop(columns="row")
    pictures.many_sites(table, settings.origin, settings.unseen, folder / "many-sites.png")
    return table, joined, _tests(study, joined, [(row["row"], "0") for row in rows[1:]])


_STUDIES: dict[str, Callable[[Study, Path], _Result]] = {
    "many-sites": many_sites,
    "rounds": rounds,
    "leave-one-out": leave_one_out,
    "tempering": tempering,
}


def _held_out(study: Study) -> dict[str, SubVolumes]:
    return {site: study.held_out(site) for site in study.settings.all_sites}


def _consolidation(study: Study, networks: Networks) -> Consolidation:
    """The consolidation of the sites' networks, which are trained first if necessary."""
    _, prior, sites, *_ = cycle(study.settings.origin, study.settings.sites)
    networks.make(sites)
    consolidation = Consolidation(networks.get(prior))
    for network in sites:
        consolidation.add(networks.get(network))
    return consolidation


def _mixed_names(settings: StudySettings) -> list[str]:
    many = settings.many_sites or ManySites()
    return [f"S{number:02d}" for number in range(1, max(many.counts) + 1)]


def _simulate_mixed(study: Study, names: list[str], n_train: int) -> None:
    """Simulate sites with randomly mixed scanners and people; add their manifests to the study."""
    for number, name in enumerate(names, 1):
        site = mixed_site(name, np.random.default_rng([study.settings.seed, number]))
        study.manifests[name] = study.site_folder(f"{name}-{n_train}") / "manifest.csv"
        with study.scans_held():
            simulate(study, site, study.manifests[name], n_train, 1)


def _halves(study: Study) -> tuple[SubVolumes, SubVolumes]:
    """The origin's held-out scans, split alternately: those that choose lambda, and those that are scored."""
    origin = study.settings.origin
    scans = study.held_out_scans(origin)
    if len(scans) < 2:
        raise InputError(f"{study.manifests[origin]}: has one scan to test on; name two, one of them chooses lambda")
    return study.prepare(scans[::2]), study.prepare(scans[1::2])


def _choose(study: Study, consolidation: Consolidation, validation: SubVolumes) -> tuple[float, list[TemperScore]]:
    """`choose_temper` with the study's samples, seed and device."""
    settings = study.settings
    return choose_temper(
        consolidation, validation, n_samples=settings.n_samples, at_most=len(validation), seed=settings.seed,
        device=study.device, progress=False,
    )  # fmt: skip


def _score(study: Study, posterior: Posterior, held_out: Mapping[str, SubVolumes], row: str) -> pd.DataFrame:
    """One line per held-out volume: row, column (of the table), site, subject, image and Dice."""
    print(f"scoring {row}", flush=True)
    networks = [MeshNet.from_posterior(posterior)]
    parts = []
    for column, data in held_out.items():
        part = per_volume(score_volumes(networks, data, progress=False, **study.prediction))
        part.insert(0, "row", row)
        part.insert(1, "column", column)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def _joined(study: Study, rows: list[dict[str, Any]], volumes: list[pd.DataFrame]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows with the mean Dice of each column, and all volumes."""
    joined = pd.concat(volumes, ignore_index=True)
    dice = dice_table(joined.assign(site=joined["column"]), study.settings.groups)
    return pd.DataFrame(rows).join(dice, on="row"), joined


def _tests(study: Study, volumes: pd.DataFrame, pairs: Iterable[tuple[str, str]]) -> pd.DataFrame:
    """Paired t-tests of row a against row b, for each column and for all training sites (Avg.)."""
    dice = volumes.pivot(index=["column", "site", "subject", "image"], columns="row", values="dice")
    of_column = dice.index.get_level_values("column")
    groups = {column: of_column == column for column in volumes["column"].unique()}
    if groups.keys() >= (training := set(study.settings.training_sites)):
        groups[AVERAGE] = of_column.isin(training)
    return pd.DataFrame(
        {"row": a, "against": b, "column": column, **asdict(paired_test(dice[a][group], dice[b][group]))}
        for a, b in pairs
        for column, group in groups.items()
    )


def _for_people(table: pd.DataFrame, settings: StudySettings) -> str:
    """The printed table, with Dice in per cent."""
    shown = table.copy()
    dice = [name for name in (*settings.all_sites, AVERAGE, "sites", "validation_dice") if name in shown]
    shown[dice] = (100 * shown[dice].astype(float)).round(1)
    return "\nDice in %, without background\n" + shown.to_string(index=False, float_format="%.4g", na_rep="-")
