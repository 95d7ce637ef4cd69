"""Each study beyond the paper's at a tiny size: its table, and that the table holds what was computed."""

import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from dwc.base.errors import InputError
from dwc.base.tables import write_table
from dwc.cli import main
from dwc.consolidation import consolidate
from dwc.data.labels import LabelMap
from dwc.posterior import Posterior
from dwc.simulation.scans import load_sites, mixed_site
from dwc.site_factors import Factors
from dwc.study import beyond
from dwc.study.context import Study
from dwc.study.graph import variational, vcl, with_parents
from dwc.study.networks import Networks
from dwc.study.rounds import lines_of, trajectory
from dwc.study.rows import simulate_mixed
from dwc.study.settings import STUDIES, ManySites, StudySettings
from dwc.study.sites import pool
from dwc.tempering import temper_grid
from tests.study.tiny_study import tiny_settings

pytest_plugins = ["tests.tiny_runs"]
pytestmark = pytest.mark.usefixtures("one_thread")
SITES = ("N", "B", "W")
DICE = ["H", "N", "B", "W", "Avg.", "A"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> StudySettings:
    """Networks of two steps; the studies share the folder and so the networks."""
    return tiny_settings(
        out=tmp_path_factory.mktemp("studies"), n_train={"H": 2, "N": 1, "B": 1, "W": 1},
        n_test={"H": 2, "N": 1, "B": 1, "W": 1, "A": 1}, rounds=2,
        many_sites=ManySites(counts=(1, 2), n_train=1, n_scored=2),
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tiny, one_thread):
    """The table of a study, run once."""
    tables: dict[str, pd.DataFrame] = {}

    def table(name: str) -> pd.DataFrame:
        if name not in tables:
            tables[name] = beyond.run(name, tiny)
        return tables[name]

    return table


def volumes(tiny, name: str) -> pd.DataFrame:
    return pd.read_csv(tiny.out / name / "volumes.csv")


@pytest.mark.parametrize("name", STUDIES[2:])
def test_a_study_leaves_its_table_raw_scores_and_a_picture(name, run, tiny):
    table = run(name)
    kept = pd.read_csv(tiny.out / name / "table.csv", dtype={"row": str})
    assert list(kept.columns) == list(table.columns)
    assert len(kept) == len(table)
    dice = table[[column for column in (*DICE, "sites") if column in table]]
    assert dice.stack().between(0, 1).all()
    assert dice.notna().all(axis=None)
    assert (tiny.out / name / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    raw = volumes(tiny, name)
    assert raw["dice"].between(0, 1).all()
    assert not raw.duplicated(["row", "column", "site", "subject", "image"]).any()


def test_rounds_compare_methods_that_share_their_first_training(run, tiny):
    table = run("rounds")
    methods = np.repeat(["dwc", "tempered", "average", "factors"], 2).tolist()
    methods += ["chain", "ensemble", "finetuned", "pooled", "pooled"]
    assert list(table["S"]) == [0, *[1] * 13, *[2] * 13]
    assert list(table["method"]) == ["start", *methods * 2]
    assert list(table["round"]) == [0, *([1, 2] * 4 + [1, 1, 1, 1, 2]) * 2]
    for value in ("nll", "ece"):
        assert table[[f"{value} {column}" for column in ("H", "sites", "A")]].gt(0).all(axis=None)
    of_one = table[(table["S"] == 1) & (table["round"] == 1)].set_index("method")
    dice = ["H", "sites", "A"]
    for method in ("tempered", "average", "factors"):  # one site's network, whatever the rule
        np.testing.assert_allclose(of_one.loc[method, dice].astype(float), of_one.loc["dwc", dice].astype(float))


def test_rows_beside_the_methods_take_as_many_steps(run, tiny):
    """One site after another, all scans at once: each takes the steps of all sites in a round, or in all rounds."""
    run("rounds")
    study = Study(tiny)
    simulate_mixed(study, ["S01", "S02"])
    pool(study, "2 sites", ["S01", "S02"])
    networks, lines = Networks(study), {line.name: line for line in lines_of(tiny, ["S01", "S02"])}

    def steps(row):
        return sum(map(networks.steps, lines[row].trained))

    assert all(networks.is_done(network) for line in lines.values() for network in line.networks)
    assert [steps(f"2, {row}") for row in ("dwc, 1", "chain, 1", "pooled, 1", "pooled, 2")] == [4, 4, 4, 8]
    sites = lines["2, dwc, 1"].trained
    assert lines["2, ensemble, 1"].networks == sites
    first, second = lines["2, chain, 1"].trained
    assert (first, second.parents, second.site) == (sites[0], (first,), "S02")
    pooled = networks.get(lines["2, pooled, 2"].networks[0]).metadata
    assert pooled["n_volumes"] == 2
    assert pooled["prior_sha256"] == networks.get(variational("H")).sha256


def test_the_bytes_and_seconds_of_a_round_are_counted(run, tiny):
    table = run("rounds").set_index(["S", "method", "round"])

    def size(pattern):
        return sum(f.stat().st_size for f in (tiny.out / "networks").glob(f"{pattern}/posterior.safetensors")) / 1e6

    for method in ("dwc", "tempered", "average", "factors"):
        of_method = table.xs((2, method), level=("S", "method"))
        there_and_back = 2 * size(f"{method}_of_2_round_1-*") + size(f"{method}_of_2_round_2_S0[12]-*")
        assert of_method.loc[2, "MB"] == pytest.approx(there_and_back)  # a network to each site, and its answer
        assert list(of_method["total MB"]) == pytest.approx(list(of_method["MB"].cumsum()))
        assert list(of_method["total seconds"]) == pytest.approx(list(of_method["seconds"].cumsum()))
    scans = [*(tiny.out / "sites").glob("S0[12]-1/S0?-000*.gz")]  # of each site's two, the one to train on
    assert len(scans) == 4
    for row in (1, 2):
        assert table.loc[(2, "pooled", row), "total MB"] == pytest.approx(sum(f.stat().st_size for f in scans) / 1e6)
    assert table["seconds"].drop((0, "start", 0)).gt(0).all()


def test_a_class_that_one_site_does_not_label_is_scored_where_it_is_labelled(tmp_path):
    many = ManySites(counts=(2,), n_train=1, n_scored=2, missing="Cerebellum")
    settings = tiny_settings(out=tmp_path, n_test={"H": 2, "N": 1, "B": 1, "W": 1, "A": 1}, rounds=1, many_sites=many)
    table = beyond.run("rounds", settings)
    label_map = LabelMap.load("coarse")
    cerebellum = label_map.names.index("Cerebellum")

    def has_it(scan):
        return bool((label_map.apply(np.asanyarray(nib.load(scan).dataobj)) == cerebellum).any())

    first, second = (tmp_path / "sites" / folder for folder in (f"S01-1-without-{cerebellum}", "S02-1"))
    assert not has_it(first / "S01-000_dseg.nii.gz")  # to train on
    assert has_it(first / "S01-001_dseg.nii.gz")  # held out
    assert has_it(second / "S02-000_dseg.nii.gz")
    columns = ["dice of Cerebellum H", "dice of Cerebellum sites", "dice of Cerebellum A"]
    assert table[columns].stack().between(0, 1).all()
    assert table[columns].notna().all(axis=None)
    tests = pd.read_csv(tmp_path / "rounds" / "tests.csv")
    assert set(tests["value"]) == {"dice", "nll", "dice of Cerebellum"}
    each = volumes(settings, "rounds")
    of_classes = each[[f"dice of {name}" for name in label_map.names[1:]]]
    np.testing.assert_allclose(of_classes.mean(axis="columns"), each["dice"], atol=1e-5)


@pytest.mark.parametrize("method", ["dwc", "tempered", "average", "factors"])
def test_the_networks_of_many_rounds_are_listed_once_each(method):
    """Forty rounds have more paths through their graph than could be walked."""
    q0, sites, rounds = variational("H"), ["S01", "S02", "S03"], 40
    networks = with_parents([trajectory(method, q0, sites, rounds)[-1]])
    computed = rounds + (3 * (rounds - 1) if method == "factors" else 0)
    assert len(networks) == 2 + 3 * rounds + computed  # H's MAP network and its variational one
    again = with_parents([trajectory(method, q0, sites, rounds)[-1]])
    assert again == networks
    assert len({*again, *networks}) == len(networks)


def test_each_method_takes_its_prior_and_start_from_the_round_before(run, tiny):
    run("rounds")
    study = Study(tiny)
    simulate_mixed(study, ["S01", "S02"])
    networks, q0 = Networks(study), variational("H")

    def of(method):
        first, second = trajectory(method, q0, ["S01", "S02"], 2)
        posteriors = [networks.get(network) for network in (first, second)]
        return *posteriors, [networks.get(network) for network in second.parents if network.mode == "vcl"]

    start = networks.get(q0)
    first, second, sites = of("dwc")
    assert {site.metadata["prior_sha256"] for site in sites} == {first.sha256}
    assert second.sha256 == consolidate(first, sites).sha256
    first, second, sites = of("tempered")
    assert second.sha256 == consolidate(first, sites, temper=0.5).sha256
    first, second, sites = of("average")
    assert {site.metadata["prior_sha256"] for site in sites} == {start.sha256}
    assert {site.metadata["training"]["init_sha256"] for site in sites} == {first.sha256}
    first, second, sites = of("factors")
    answers = [networks.get(n) for n in trajectory("factors", q0, ["S01", "S02"], 1)[0].parents[2:]]
    factors = Factors(start)
    for name, answer in zip(("S01", "S02"), answers, strict=True):
        factors.replace(name, answer, cavity=start, damping=0.5)
    assert factors.posterior().sha256 == first.sha256
    cavities = [factors.cavity(name) for name in ("S01", "S02")]
    assert [site.metadata["prior_sha256"] for site in sites] == [cavity.sha256 for cavity in cavities]
    for name, site, cavity in zip(("S01", "S02"), sites, cavities, strict=True):
        factors.replace(name, site, cavity=cavity, damping=0.5)
    assert factors.posterior().sha256 == second.sha256


def test_leaving_one_out_scores_the_network_that_the_others_alone_would_give(run, tiny, monkeypatch):
    table = run("leave-one-out").set_index("row")
    assert list(table.index) == ["none (H)", "all of N, B, W", "without N", "without B", "without W"]
    scored = {}
    monkeypatch.setattr(beyond, "score_row", lambda _, posterior, __, row: scored.setdefault(row, posterior))
    monkeypatch.setattr(beyond.pictures, "leave_one_out", lambda *_: None)
    monkeypatch.setattr(beyond, "join_rows", lambda *_: (pd.DataFrame(columns=["row", "seconds"]), None))
    monkeypatch.setattr(beyond, "compare_rows", lambda *_: None)
    beyond.leave_one_out(Study(tiny), tiny.out)
    networks = Networks(Study(tiny))
    origin = variational("H")
    prior = Posterior.load(networks.file(origin))
    others = [Posterior.load(networks.file(vcl(origin, site))) for site in ("N", "W")]
    assert scored["without B"].sha256 == consolidate(prior, others).sha256


def test_what_a_site_contributes_is_tested_across_volumes(run, tiny):
    table, raw = run("leave-one-out").set_index("row"), volumes(tiny, "leave-one-out")
    tests = pd.read_csv(tiny.out / "leave-one-out" / "tests.csv").set_index(["against", "column"])
    assert set(tests["row"]) == {"all of N, B, W"}
    for against in ("none (H)", "without N", "without B", "without W"):
        for column in DICE:
            brought = table.loc["all of N, B, W", column] - table.loc[against, column]
            assert tests.loc[(against, column), "mean_difference"] == pytest.approx(brought, abs=1e-6)
    assert tests.loc[("without N", "Avg."), "n"] == raw[raw["column"] != "A"]["image"].nunique() == 5


def test_lambda_is_chosen_on_scans_that_are_not_scored(run, tiny):
    table = run("tempering")
    assert tuple(table["lambda"]) == pytest.approx((0.0, *temper_grid(3)))
    grid = table[table["lambda"] > 0]
    assert grid["chosen"].sum() == 1
    assert grid[grid["chosen"]]["log_likelihood"].item() == grid["log_likelihood"].max()
    raw = volumes(tiny, "tempering")
    assert raw[raw["column"] == "H"]["image"].nunique() == 1  # of two held-out scans, one chose
    run("leave-one-out")
    everything = volumes(tiny, "leave-one-out")
    assert everything[everything["column"] == "H"]["image"].nunique() == 2


def test_more_sites_are_the_same_sites_and_others(run, tiny):
    table = run("many-sites")
    assert list(table["S"]) == [0, 1, 1, 1, 2, 2, 2]
    assert list(table["rule"][1:4]) == ["1", "1/S", "chosen"]
    grown = table[table["S"] == 2].set_index("rule")["lambda"]
    assert grown["1/S"] == 1 / 2
    assert grown["chosen"] in temper_grid(2)
    one = table[table["S"] == 1].set_index("rule")
    assert one.loc["1", DICE[:1]].equals(one.loc["1/S", DICE[:1]])  # one and the same lambda
    networks = list((tiny.out / "networks").glob("H_S0*"))
    assert len(networks) == 2
    assert volumes(tiny, "many-sites")["site"].nunique() == 4  # H, A and the two sites that are scored


def test_a_mixed_site_lies_between_those_it_is_mixed_from():
    parts = [load_sites()[site] for site in SITES]
    mixed = mixed_site("S01", np.random.default_rng(0))
    assert min(part.noise for part in parts) < mixed.noise < max(part.noise for part in parts)
    for tissue, mean in mixed.tissue_means.items():
        means = [part.tissue_means[tissue] for part in parts]
        assert min(means) - 1e-9 <= mean <= max(means) + 1e-9
    assert mixed.tissue_means != mixed_site("S02", np.random.default_rng(1)).tissue_means


def test_a_study_gives_the_same_table_again_and_trains_nothing_twice(run, tiny, monkeypatch):
    before = (run("rounds"), (tiny.out / "rounds" / "table.csv").read_bytes())
    monkeypatch.setattr("dwc.study.networks.train_network", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr("dwc.study.scoring.score_volumes", lambda *_, **__: pytest.fail("scored again"))
    pd.testing.assert_frame_equal(beyond.run("rounds", tiny), before[0])
    assert (tiny.out / "rounds" / "table.csv").read_bytes() == before[1]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("few-sites", {}, "`study` few-sites: no such study; choose one of many-sites, rounds"),
        ("tempering", {"n_test": {"H": 1, "N": 1, "B": 1, "W": 1, "A": 1}}, "`n_test.H` 1: every second"),
        ("many-sites", {"n_test": {"H": 1, "N": 1, "B": 1, "W": 1, "A": 1}}, "`n_test.H` 1: every second"),
        ("many-sites", {"anatomies": "."}, "simulates its own sites from the procedural head; leave .* out"),
        (
            "many-sites",
            {"sites": ("S01", "B", "W"), "n_train": 1, "n_test": 2},
            "names its own sites S01 and so on; rename",
        ),
        ("rounds", {"rounds": 0}, "`rounds` 0: give a positive number"),
        (
            "rounds",
            {"many_sites": ManySites(counts=(2,), n_scored=2, missing="Cerebelum")},
            "`many_sites.missing` Cerebelum: no class of the label map coarse; choose one of White-Matter, Cortex",
        ),
    ],
)
def test_bad_settings_are_refused_before_anything_is_made(tiny, tmp_path, name, changes, message):
    out = tmp_path / "out"
    with pytest.raises(InputError, match=message):
        beyond.run(name, replace(tiny, out=out, **changes))
    assert not out.exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"counts": (4, 2)}, r"`counts` \[4, 2\]: give ascending"),
        ({"counts": (2,), "n_scored": 3}, "`n_scored` 3"),
        ({"n_train": 0}, "`n_train` 0"),
    ],
)
def test_bad_numbers_of_sites_are_refused_when_the_settings_are_made(values, message):
    with pytest.raises(InputError, match=message):
        ManySites(**values)


def test_the_command_runs_a_study_from_flags_and_a_preset(run, tiny, capsys):
    run("leave-one-out")
    settings = tiny.out / "config.yaml"
    capsys.readouterr()
    words = ["experiment", "--study", "leave-one-out", "--config", str(settings), "--out", str(tiny.out)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "training" not in printed
    assert "without B" in printed
    assert str(tiny.out / "leave-one-out") in printed


@pytest.mark.parametrize("study", STUDIES[2:])
def test_seeds_of_a_study_are_pooled_into_means_and_tests_over_all_volumes(run, tiny, tmp_path, study, capsys):
    one = run(study)
    for seed in (0, 1):
        shutil.copytree(tiny.out / study, tmp_path / str(seed) / study)
        settings = tmp_path / str(seed) / study / "config.yaml"
        settings.write_text(settings.read_text().replace("\nseed: 0\n", f"\nseed: {seed}\n"))
    for name in ("table", "volumes"):
        path = tmp_path / "1" / study / f"{name}.csv"
        other = pd.read_csv(path, dtype={"row": str})
        columns = ["dice"] if name == "volumes" else ["H", "A"]
        if study == "tempering" and name == "table":  # another seed may choose another lambda
            other["chosen"] = np.roll(other["chosen"], 1)
        write_table(path, other.assign(**{column: other[column] / 2 for column in columns}))
    words = ["experiment", "--study", study, "--out", str(tmp_path / "pooled"), "--pool"]
    assert main([*words, str(tmp_path / "0"), str(tmp_path / "1")]) == 0
    assert "Means over 2 seeds" in capsys.readouterr().out
    pooled = tmp_path / "pooled" / study
    assert (pooled / f"{study}.png").read_bytes().startswith(b"\x89PNG")
    np.testing.assert_allclose(pd.read_csv(pooled / "table.csv")["A"], 0.75 * one["A"], rtol=1e-4)
    np.testing.assert_allclose(pd.read_csv(pooled / "table_sd.csv")["A"], one["A"] / 8**0.5, rtol=1e-4)
    before, after = (pd.read_csv(folder / "tests.csv") for folder in (tiny.out / study, pooled))
    assert list(after["n"]) == list(2 * before["n"])
    halves = after["value"].eq("dice")
    scale = 0.75 * before["mean_difference"]
    np.testing.assert_allclose(after["mean_difference"][halves], scale[halves], rtol=1e-3, atol=1e-6)
    assert main([*words, str(tmp_path / "0"), str(tiny.out)]) == 2  # the same seed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--study", "demo", "--pool", "a", "b"], "--pool: the demo has one seed; leave it out"),
        (["--study", "rounds", "--pool", "a"], "--pool: one folder; give those of two seeds or more"),
        (["--study", "few-sites"], "few-sites"),
        (["--study", "rounds", "--dry-run"], "--study rounds: --only and --dry-run are for the paper's study"),
        (["--study", "many-sites", "--preset", "small", "--many_sites.counts", "[4,2]"], "ascending"),
        (["--study", "rounds", "--preset", "small", "--rounds", "none"], "rounds"),
        (
            ["--study", "many-sites", "--preset", "small", "--many-sites.missing", "1"],
            "--many-sites.missing 1: no class",
        ),
    ],
)
def test_bad_flags_of_a_study_are_one_line_and_make_nothing(tmp_path, capsys, flags, message):
    out = tmp_path / "out"
    assert main(["experiment", *flags, "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not out.exists()
