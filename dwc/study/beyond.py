"""Studies of consolidation beyond the paper; each writes a table, raw scores and a picture."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from dwc.base.errors import InputError
from dwc.base.files import open_folder
from dwc.consolidation import Consolidation
from dwc.data.dataset import SubVolumes
from dwc.posterior import Posterior
from dwc.report import studies as pictures
from dwc.report.results import AVERAGE
from dwc.study.context import Study
from dwc.study.graph import cycle, variational, vcl
from dwc.study.networks import Networks
from dwc.study.rounds import rounds
from dwc.study.rows import (
    Result,
    compare_rows,
    held_out_of,
    in_words,
    join_rows,
    mixed_names,
    score_row,
    simulate_mixed,
    write_study,
)
from dwc.study.settings import ManySites, StudySettings
from dwc.study.sites import begin
from dwc.tempering import TemperScore, choose_temper

__all__ = ["leave_one_out", "many_sites", "run", "tempering"]


def run(name: str, settings: StudySettings) -> pd.DataFrame:
    """Run or continue a study, print its table and return it; raises Interrupted after a signal.

    OUT/<name>/ gets ``config.yaml``, ``table.csv`` (mean Dice, 0..1), ``volumes.csv`` (one line per row and held-out
    volume), ``tests.csv`` and ``tests.txt`` (paired t-tests across volumes) and a picture. Networks are shared with the
    other studies in OUT.
    """
    if name not in _STUDIES:
        raise InputError(f"`study` {name}: no such study; choose one of {', '.join(_STUDIES)}")
    study, origin = Study(settings), settings.origin
    if name in ("many-sites", "tempering") and settings.manifests is None and settings.n_scans(origin)[1] < 2:
        raise InputError(f"`n_test.{origin}` 1: every second held-out scan chooses lambda; give 2 or more")
    if name == "leave-one-out" and len(settings.sites) < 2:
        raise InputError(f"`sites` {', '.join(settings.sites)}: one leaves none to consolidate without it; name two")
    if name == "many-sites" or (name == "rounds" and settings.many_sites is not None):
        if given := settings.manifests or settings.anatomies:
            raise InputError(f"`study` {name}: simulates its own sites from the procedural head; leave {given} out")
        if taken := set(mixed_names(settings)) & set(settings.all_sites):
            raise InputError(f"`study` {name}: names its own sites {min(taken)} and so on; rename that site")
        missing = (settings.many_sites or ManySites()).missing
        if missing is not None and missing not in (classes := study.label_map.names[1:]):
            raise InputError(
                f"`many_sites.missing` {missing}: no class of the label map {study.label_map.name}; choose one of "
                f"{', '.join(classes)}"
            )
    begin(study, conform=False)
    folder = study.out / name
    open_folder(folder)
    table, volumes, tests = _STUDIES[name](study, folder)
    write_study(folder, study.settings.to_json(), {"volumes": volumes, "tests": tests, "table": table})
    print(_for_people(table, settings))
    print(f"\n{in_words(tests)}\n\n{folder}: table.csv, tests.csv, volumes.csv and a picture")
    return table


def leave_one_out(study: Study, folder: Path) -> Result:
    """Remove each site in turn from the consolidated posterior; the loss is what it contributed.

    Columns: network, Dice, CPU seconds of the removal (of the training, in the row of all sites).
    """
    networks, held_out, origin = Networks(study), held_out_of(study), study.settings.origin
    site_of = {str(networks.file(network)): network for network in cycle(origin, study.settings.sites).sites}
    consolidation = _consolidation(study, networks)
    everything, nothing = f"all of {', '.join(study.settings.sites)}", f"none ({origin})"
    volumes = [
        score_row(study, consolidation.prior, held_out, nothing),
        score_row(study, consolidation.posterior(), held_out, everything),
    ]
    trained = sum(map(networks.seconds, site_of.values()))
    rows: list[dict[str, Any]] = [{"row": nothing}, {"row": everything, "seconds": trained}]
    began = time.process_time()
    for site, rest in consolidation.leave_one_out(map(Posterior.load, site_of)):
        seconds = time.process_time() - began
        row = f"without {site_of[site.name].site}"
        volumes.append(score_row(study, rest, held_out, row))
        rows.append({"row": row, "seconds": seconds})
        began = time.process_time()
    table, joined = join_rows(study, rows, volumes)
    pairs = [(everything, row["row"]) for row in rows if row["row"] != everything]
    tests = compare_rows(study.settings.training_sites, joined, pairs)
    pictures.leave_one_out(tests, table.columns.drop(["row", "seconds"]), folder / "leave-one-out.png")
    return table, joined, tests


def tempering(study: Study, folder: Path) -> Result:
    """Score every lambda of the grid; half of the origin's held-out scans choose it, the other half is scored.

    Columns: lambda (0: the prior), log_likelihood (nats per voxel) and validation_dice on scans that choose, chosen,
    Dice.
    """
    settings = study.settings
    held_out = held_out_of(study)
    validation, held_out[settings.origin] = _halves(study)
    consolidation = _consolidation(study, Networks(study))
    chosen, scores = _choose(study, consolidation, validation)
    rows, volumes = [], []
    for score in scores:
        network = consolidation.tempered(score.temper).posterior() if score.temper else consolidation.prior
        row = f"lambda {score.temper:.4g}"
        volumes.append(score_row(study, network, held_out, row))
        if score.temper == chosen:
            volumes.append(volumes[-1].assign(row="chosen"))
        rows.append(
            {"row": row, "lambda": score.temper, "log_likelihood": score.log_likelihood,
             "validation_dice": score.dice, "chosen": score.temper == chosen}
        )  # fmt: skip
    table, joined = join_rows(study, rows, volumes)
    pictures.tempering(table, settings.origin, len(settings.sites), folder / "tempering.png")
    pairs = [("chosen", "lambda 0"), ("chosen", "lambda 1"), ("lambda 1", "lambda 0")]
    return table, joined, compare_rows(study.settings.training_sites, joined, pairs)


def many_sites(study: Study, folder: Path) -> Result:
    """Consolidate growing numbers of simulated sites, each a mixture of scanners.

    Columns: S (sites), rule (lambda is 1, 1/S or chosen on the origin), lambda, Dice (``sites`` is one held-out scan of
    each of the first sites), CPU seconds to read and consolidate S files, and untempered medians of weight and
    sigma_ratio.
    """
    settings = study.settings
    origin, many = variational(settings.origin), settings.many_sites or ManySites()
    names = mixed_names(settings)
    simulate_mixed(study, names)
    networks = Networks(study)
    validation, others = _halves(study)
    of_sites = [scan for name in names[: many.n_scored] for scan in study.held_out_scans(name)]
    held_out = {settings.origin: others, "sites": study.prepare(of_sites)}
    held_out |= {site: study.held_out(site) for site in settings.unseen}
    volumes = [score_row(study, networks.get(origin), held_out, "0")]
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
                scored[temper] = score_row(study, consolidation.tempered(temper).posterior(), held_out, row)
            volumes.append(scored[temper].assign(row=row))
            rows.append({"row": row, "S": n_sites, "rule": rule, "lambda": temper, "seconds": seconds,
                         **report[["weight", "sigma_ratio"]].median()})  # fmt: skip
    joined = pd.concat(volumes, ignore_index=True)
    dice = joined.pivot_table(index="row", columns="column", values="dice")[list(held_out)]
    table = pd.DataFrame(rows).join(dice, on="row").drop(columns="row")
    pictures.many_sites(table, settings.origin, settings.unseen, folder / "many-sites.png")
    return table, joined, compare_rows(study.settings.training_sites, joined, [(row["row"], "0") for row in rows[1:]])


_STUDIES: dict[str, Callable[[Study, Path], Result]] = {
    "many-sites": many_sites,
    "rounds": rounds,
    "leave-one-out": leave_one_out,
    "tempering": tempering,
}


def _consolidation(study: Study, networks: Networks) -> Consolidation:
    """The consolidation of the sites' networks, which are trained first if necessary."""
    _, prior, sites, *_ = cycle(study.settings.origin, study.settings.sites)
    networks.make(sites)
    consolidation = Consolidation(networks.get(prior))
    for network in sites:
        consolidation.add(networks.get(network))
    return consolidation


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


def _for_people(table: pd.DataFrame, settings: StudySettings) -> str:
    """The printed table, with Dice in per cent."""
    shown = table.copy()
    means = (*settings.all_sites, AVERAGE, "sites", "validation_dice")
    dice = [name for name in shown if name in means or name.startswith("dice of ")]
    shown[dice] = (100 * shown[dice].astype(float)).round(1)
    return "\nDice in %, without background\n" + shown.to_string(index=False, float_format="%.4g", na_rep="-")
