"""Studies beyond the paper's, each a question about consolidation, answered in a table, a picture and raw scores.

many-sites: what becomes of accuracy and time as sites grow in number. rounds: the cycle repeated, each consolidated
network the next prior. leave-one-out: what each site brings, by taking it out again. tempering: which power lambda is
best, and whether the origin can find it by itself. Each trains what it needs through `networks`, and scores through
`dwc.evaluation`; what is computed from files within seconds is not kept.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd

from dwc.base.devices import choose_device
from dwc.base.errors import InputError
from dwc.base.files import open_folder
from dwc.base.tables import write_table
from dwc.consolidation import Consolidation
from dwc.data.cache import prepare
from dwc.data.dataset import SubVolumes
from dwc.data.grid import Grid
from dwc.data.labels import LabelMap
from dwc.data.manifest import Scan
from dwc.evaluation import per_volume, score_volumes
from dwc.meshnet import MeshNet
from dwc.metrics.significance import paired_test
from dwc.posterior import Posterior
from dwc.report import studies as pictures
from dwc.simulation.scans import Site, load_sites, write_site
from dwc.study.networks import Network, Networks, consolidated, finetuned, variational, vcl
from dwc.study.paper import keep_config
from dwc.study.settings import ALL_SITES, ORIGIN, SITES, TRAINING_SITES, UNSEEN, StudySettings
from dwc.study.sites import held_out_scans, held_out_volumes, make_manifests, scans_held
from dwc.study.statistics import COLUMNS, dice_table
from dwc.tempering import choose_temper

__all__ = ["leave_one_out", "many_sites", "rounds", "run", "tempering"]

_Result = tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]  # table, volumes, tests


def run(name: str, settings: StudySettings) -> pd.DataFrame:
    """Run a study, or what of it is not done yet; print its table and leave it with picture and raw scores.

    Parameters
    ----------
    name : str
        One of `dwc.study.study.STUDIES` but paper.
    settings : StudySettings
        As for the paper's study, whose networks it takes if they lie in the folder.

    Returns
    -------
    DataFrame
        What ``OUT/<name>/table.csv`` holds; Dice 0..1, means over volumes. Beside it ``volumes.csv`` has a line per row
        and held-out volume, and ``tests.csv`` paired t-tests across volumes of the comparisons that the study is about.

    Raises
    ------
    InputError
        If a setting or a file is wrong, before work starts; later if a loss diverges or the disk is full.
    Interrupted
        After a signal; called again, the study goes on.
    """
    if name not in _STUDIES:
        raise InputError(f"--study {name}: no such study; choose one of {', '.join(_STUDIES)}")
    settings.check()
    if name in ("many-sites", "tempering") and settings.manifests is None and settings.n_test[ORIGIN] < 2:
        raise InputError(f"--n_test.{ORIGIN} 1: every second held-out scan chooses lambda; give 2 or more")
    if name == "many-sites" and (given := settings.manifests or settings.anatomies):
        raise InputError(f"--study many-sites: simulates sites of its own, from the procedural head; leave {given} out")
    keep_config(settings)
    folder = settings.out / name
    open_folder(folder)
    table, volumes, tests = _STUDIES[name](settings, folder)
    write_table(folder / "volumes.csv", volumes)
    write_table(folder / "tests.csv", tests)
    write_table(folder / "table.csv", table)
    print(_for_people(table))
    print(f"\n{folder}: table.csv, tests.csv, volumes.csv and a picture")
    return table


def rounds(settings: StudySettings, folder: Path) -> _Result:
    """The cycle several times over the same sites; every round's consolidated network is also fine-tuned and scored.

    Columns of the table: round, network, those of Dice, weight (with which a site's means entered) and sigma_ratio
    (sigma_s / sigma_0 of that round), medians over sites and tensors.
    """
    networks, held_out = _paper_sites(settings)
    prior = variational(ORIGIN)
    volumes = [_score(settings, networks.get(prior), held_out, "0")]
    rows = [{"row": "0", "round": 0, "network": f"{ORIGIN}, before any round"}]
    for number in range(1, settings.rounds + 1):
        joint = consolidated(prior, _vcl_networks(prior))
        for row, network in ((f"{number}", joint), (f"{number} FT", finetuned(joint, ORIGIN))):
            volumes.append(_score(settings, networks.get(network), held_out, row))
        weights = pd.read_csv(networks.folder(joint) / "weights.csv")[["weight", "sigma_ratio"]].median()
        rows.append({"row": f"{number}", "round": number, "network": "consolidated", **weights})
        rows.append({"row": f"{number} FT", "round": number, "network": f"fine-tuned on {ORIGIN}"})
        prior = joint
    table, volumes = _joined(rows, volumes)
    pictures.rounds(table, folder / "rounds.png")
    return table, volumes, _tests(volumes, [(row["row"], "0") for row in rows[1:]])


def leave_one_out(settings: StudySettings, folder: Path) -> _Result:
    """Every site taken out of the consolidated posterior in turn; what is lost is what it brought.

    Columns of the table: network, those of Dice, seconds of CPU that taking out took (and those of training, for the
    row of all sites).
    """
    networks, held_out = _paper_sites(settings)
    origin = variational(ORIGIN)
    site_of = {str(networks.file(network)): network for network in _vcl_networks(origin)}
    networks.make(site_of.values())
    consolidation = Consolidation(networks.get(origin))
    for network in site_of.values():
        consolidation.add(networks.get(network))
    everything = f"all of {', '.join(SITES)}"
    volumes = [
        _score(settings, consolidation.prior, held_out, f"none ({ORIGIN})"),
        _score(settings, consolidation.posterior(), held_out, everything),
    ]
    trained = sum(networks.seconds(network) for network in site_of.values())
    rows = [{"row": f"none ({ORIGIN})"}, {"row": everything, "seconds": trained}]
    began = time.process_time()
    for site, rest in consolidation.leave_one_out(map(Posterior.load, site_of)):
        seconds = time.process_time() - began
        row = f"without {site_of[site.name].site}"
        volumes.append(_score(settings, rest, held_out, row))
        rows.append({"row": row, "seconds": seconds})
        began = time.process_time()
    table, volumes = _joined(rows, volumes)
    tests = _tests(volumes, [(everything, row["row"]) for row in rows if row["row"] != everything])
    pictures.leave_one_out(tests, folder / "leave-one-out.png")
    return table, volumes, tests


def tempering(settings: StudySettings, folder: Path) -> _Result:
    """Every lambda of the grid, chosen on half of the origin's held-out scans and scored on the other volumes.

    Columns of the table: lambda (0 is the prior), log_likelihood (nats per voxel) and validation_dice on the scans that
    choose, chosen, and those of Dice, whose H are the scans that did not choose.
    """
    networks, held_out = _paper_sites(settings)
    validation, held_out[ORIGIN] = _halves(settings, networks)
    origin = variational(ORIGIN)
    networks.make(_vcl_networks(origin))
    consolidation = Consolidation(networks.get(origin))
    for network in _vcl_networks(origin):
        consolidation.add(networks.get(network))
    chosen, scores = _choose(settings, consolidation, validation)
    rows, volumes = [], []
    for score in scores:
        network = consolidation.tempered(score.temper).posterior() if score.temper else consolidation.prior
        row = f"lambda {score.temper:.4g}"
        volumes.append(_score(settings, network, held_out, row))
        rows.append(
            {"row": row, "lambda": score.temper, "log_likelihood": score.log_likelihood,
             "validation_dice": score.dice, "chosen": score.temper == chosen}
        )  # fmt: skip
    table, volumes = _joined(rows, volumes)
    pictures.tempering(table, len(SITES), folder / "tempering.png")
    best = f"lambda {chosen:.4g}"
    return table, volumes, _tests(volumes, [(best, "lambda 0"), (best, "lambda 1"), ("lambda 1", "lambda 0")])


def many_sites(settings: StudySettings, folder: Path) -> _Result:
    """More and more simulated sites, each a mixture of N, B and W, each trained once from the origin's network.

    Columns of the table: sites (S), rule (how lambda is set: 1, 1/S, chosen on the origin), lambda, Dice on H (the
    scans that did not choose), sites (a held-out scan of each of the first ones, in or not) and A, seconds of CPU to
    read and consolidate S files, weight and sigma_ratio (medians over sites and tensors, not tempered).
    """
    counts, origin = settings.many_sites.counts, variational(ORIGIN)
    manifests = make_manifests(settings) | _simulated_sites(settings)
    networks = Networks(settings, manifests)
    names = [name for name in manifests if name.startswith("S")]
    of_sites = [s for n in names[: settings.many_sites.n_scored] for s in held_out_scans(settings, n, manifests[n])]
    validation, others = _halves(settings, networks)
    unseen = held_out_volumes(settings, UNSEEN, manifests[UNSEEN])
    held_out = {ORIGIN: others, "sites": _prepared(settings, of_sites), UNSEEN: unseen}
    volumes = [_score(settings, networks.get(origin), held_out, "0")]
    rows = [{"row": "0", "S": 0}]
    networks.make(vcl(origin, name) for name in names)
    files = [networks.file(vcl(origin, name)) for name in names]
    for n_sites in counts:
        began = time.process_time()
        consolidation = Consolidation(networks.get(origin))
        for file in files[:n_sites]:
            consolidation.add(Posterior.load(file))
        consolidation.posterior()
        seconds = time.process_time() - began
        report = pd.DataFrame(consolidation.report())
        rules = {"1": 1.0, "1/S": 1 / n_sites, "chosen": _choose(settings, consolidation, validation)[0]}
        scored = {}
        for rule, temper in rules.items():
            row = f"{n_sites}, {rule}"
            if temper not in scored:
                scored[temper] = _score(settings, consolidation.tempered(temper).posterior(), held_out, row)
            volumes.append(scored[temper].assign(row=row))
            rows.append({"row": row, "S": n_sites, "rule": rule, "lambda": temper, "seconds": seconds,
                         **report[["weight", "sigma_ratio"]].median()})  # fmt: skip
    volumes = pd.concat(volumes, ignore_index=True)
    dice = volumes.pivot_table(index="row", columns="column", values="dice")[list(held_out)]
    table = pd.DataFrame(rows).join(dice, on="row").drop(columns="row")
    pictures.many_sites(table, folder / "many-sites.png")
    return table, volumes, _tests(volumes, [(row["row"], "0") for row in rows[1:]])


_STUDIES: dict[str, Callable[[StudySettings, Path], _Result]] = {
    "many-sites": many_sites,
    "rounds": rounds,
    "leave-one-out": leave_one_out,
    "tempering": tempering,
}


def _paper_sites(settings: StudySettings) -> tuple[Networks, dict[str, SubVolumes]]:
    """The networks of the paper's five sites, and their held-out volumes."""
    manifests = make_manifests(settings)
    held_out = {site: held_out_volumes(settings, site, manifests[site]) for site in ALL_SITES}
    return Networks(settings, manifests), held_out


def _vcl_networks(prior: Network) -> list[Network]:
    return [vcl(prior, site) for site in SITES]


def _simulated_sites(settings: StudySettings) -> dict[str, Path]:
    """Manifests of S01, S02, ...: sites whose scanner and people are mixed from those of N, B and W at random."""
    manifests = {}
    for number in range(1, max(settings.many_sites.counts) + 1):
        site = _mixed_site(f"S{number:02d}", np.random.default_rng([settings.seed, number]))
        manifest = settings.out / "sites" / f"{site.name}-{settings.many_sites.n_train}" / "manifest.csv"
        with scans_held(settings):
            if not manifest.exists():
                print(f"simulating site {site.name}", flush=True)
                grid = Grid(settings.grid_size, settings.voxel_size)
                write_site(manifest.parent, site, settings.many_sites.n_train, 1, grid=grid, seed=settings.seed)
        manifests[site.name] = manifest
    return manifests


def _mixed_site(name: str, rng: np.random.Generator) -> Site:
    parts = [load_sites()[site] for site in SITES]
    shares = rng.dirichlet(np.ones(len(parts)))

    def mixed(values: Iterable[float]) -> float:
        return float(np.dot(shares, list(values)))

    tissues = {tissue: mixed(part.tissue_means[tissue] for part in parts) for tissue in parts[0].tissue_means}
    resolution = tuple(mixed(part.resolution[axis] for part in parts) for axis in range(3))
    numbers = ("sd", "noise", "bias", "scale", "ventricle", "elastic", "log_gamma")
    values = {field: mixed(getattr(part, field) for part in parts) for field in numbers}
    return replace(parts[0], name=name, tissue_means=tissues, resolution=resolution, **values)


def _halves(settings: StudySettings, networks: Networks) -> tuple[SubVolumes, SubVolumes]:
    """The origin's held-out scans in turn: those that choose lambda, and those that score.

    Raises
    ------
    InputError
        If there is one alone.
    """
    scans = held_out_scans(settings, ORIGIN, networks.manifests[ORIGIN])
    if len(scans) < 2:
        raise InputError(f"{networks.manifests[ORIGIN]}: has one scan to test on; name two, one of them chooses lambda")
    return _prepared(settings, scans[::2]), _prepared(settings, scans[1::2])


def _prepared(settings: StudySettings, scans: list[Scan]) -> SubVolumes:
    grid = Grid(settings.grid_size, settings.voxel_size)
    return prepare(scans, LabelMap.load(settings.label_map), grid, settings.cache_dir, progress=False)


def _choose(settings: StudySettings, consolidation: Consolidation, validation: SubVolumes):
    """`choose_temper` with the study's samples, seed and device."""
    return choose_temper(
        consolidation, validation, n_samples=settings.n_samples, at_most=len(validation), seed=settings.seed,
        device=choose_device(settings.device), progress=False,
    )  # fmt: skip


def _score(settings: StudySettings, posterior: Posterior, held_out: Mapping[str, SubVolumes], row: str) -> pd.DataFrame:
    """A line per held-out volume: row, column (of the table), site, subject, image and Dice."""
    print(f"scoring {row}", flush=True)
    parts = []
    for column, data in held_out.items():
        scores = score_volumes(
            [MeshNet.from_posterior(posterior)], data, n_samples=settings.n_samples, seed=settings.seed,
            device=choose_device(settings.device), precision=settings.precision, progress=False,
        )  # fmt: skip
        part = per_volume(scores)
        part.insert(0, "row", row)
        part.insert(1, "column", column)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def _joined(rows: list[dict], volumes: list[pd.DataFrame]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Table of the rows with the mean Dice of each column, and all volumes."""
    joined = pd.concat(volumes, ignore_index=True)
    dice = dice_table(joined.assign(site=joined["column"]))
    return pd.DataFrame(rows).join(dice, on="row"), joined


def _tests(volumes: pd.DataFrame, pairs: Iterable[tuple[str, str]]) -> pd.DataFrame:
    """Paired t-tests of row a against row b across the volumes of each column, and of all training sites (Avg.)."""
    dice = volumes.pivot(index=["column", "site", "subject", "image"], columns="row", values="dice")
    of_column = dice.index.get_level_values("column")
    groups = {column: of_column == column for column in volumes["column"].unique()}
    if set(TRAINING_SITES) <= groups.keys():
        groups["Avg."] = of_column.isin(TRAINING_SITES)
    return pd.DataFrame(
        {"row": a, "against": b, "column": column, **asdict(paired_test(dice[a][group], dice[b][group]))}
        for a, b in pairs
        for column, group in groups.items()
    )


def _for_people(table: pd.DataFrame) -> str:
    """Dice in per cent, one digit."""
    shown = table.copy()
    dice = [column for column in (*COLUMNS, "sites", "validation_dice") if column in shown]
    shown[dice] = (100 * shown[dice].astype(float)).round(1)
    return "\nDice in %, without background\n" + shown.to_string(index=False, float_format="%.4g", na_rep="-")
