"""`dwc experiment` runs the paper's study end to end, estimates its cost beforehand, and resumes."""

import json
import os
import shutil
import subprocess
import sys
import time
from itertools import product
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import yaml

from dwc.base.tables import read_table, write_table
from dwc.cli import main
from dwc.study import cost
from dwc.study.graph import map_network, variational
from dwc.study.paper import choose_rows, rows_of
from dwc.study.settings import PRESETS, preset_file
from dwc.training.loop import train_network
from dwc.training.settings import TrainSettings
from tests.study.tiny_study import tiny_settings

pytest_plugins = ["tests.tiny_runs"]
pytestmark = pytest.mark.usefixtures("one_thread")

DWC = "H->N+B+W->H (DWC)"
PAPER = {  # Table 2's rows and two more
    "H MAP", "N MAP", "B MAP", "W MAP", "H->N", "H->B", "H->W", "H->N->B->W", "H->W->B->N",
    "H->N+B+W (DWC w/o FT)", "Ensemble", DWC, "HNBW MAP", "H->N+B+W (plain average)", "H (variational)",
}  # fmt: skip


def command(out, *more: str) -> int:
    return main(["experiment", "--preset", "smoke", "--device", "cpu", "--out", str(out), *more])


@pytest.fixture(scope="module")
def smoke(tmp_path_factory, one_thread, offline_here):
    out = tmp_path_factory.mktemp("smoke") / "out"
    assert command(out) == 0
    return out


@pytest.fixture
def no_pictures(monkeypatch):
    """Skip the pictures, which are slow and tested elsewhere."""
    monkeypatch.setattr("dwc.study.paper.write_report", lambda out: out / "report.html")
    monkeypatch.setattr("dwc.study.pooling.write_report", lambda out: out / "report.html")
    monkeypatch.setattr("dwc.study.paper.site_slices", lambda *_, **__: None)


def test_an_experiment_needs_no_network(smoke, offline_here):
    assert not offline_here.exists()


@pytest.fixture
def volumes(smoke) -> pd.DataFrame:
    return pd.read_csv(smoke / "volumes.csv")


def test_two_processes_share_a_study_and_both_print_its_table(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    words = ["experiment", "--preset", "smoke", "--device", "cpu", "--out", tmp_path / "out", "--only", "Ensemble"]
    words = [sys.executable, "-m", "dwc.cli", *map(str, words)]
    both = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    lines = sorted(line for output in outputs for line in output.splitlines())
    assert [line for line in lines if line.startswith("simulating")] == [f"simulating site {s}" for s in "ABHNW"]
    assert [line for line in lines if line.endswith(" MAP")] == [f"training {s} MAP" for s in "BHNW"]
    assert sum("scoring Ensemble" in output for output in outputs) == 1
    assert all("Dice in %" in output for output in outputs)


def test_every_row_of_the_papers_table_is_there(smoke):
    table = pd.read_csv(smoke / "table.csv", index_col="row")
    assert set(table.index) == PAPER
    assert list(table.columns) == ["H", "N", "B", "W", "Avg.", "A"]
    assert table.stack().between(0, 1).all()
    assert len(table.stack()) == 15 * 6


def test_every_row_is_scored_on_every_held_out_volume(smoke, volumes):
    n_test = yaml.safe_load((smoke / "config.yaml").read_text())["n_test"]
    assert volumes.groupby("row").size().eq(sum(n_test.values())).all()
    assert not volumes.duplicated(["row", "site", "subject", "image"]).any()
    classes = pd.read_csv(smoke / "classes.csv")
    mean = classes[classes["class"] > 0].groupby(["row", "image"])["dice"].mean()
    assert mean.to_numpy() == pytest.approx(volumes.groupby(["row", "image"])["dice"].mean().to_numpy(), rel=1e-4)


def test_no_subject_is_in_two_sites_or_in_training_and_test(smoke):
    scans = pd.concat(pd.read_csv(smoke / "sites" / site / "manifest.csv") for site in "HNBWA")
    assert (scans.groupby("subject")[["site", "split"]].nunique() == 1).all(axis=None)
    pooled = pd.read_csv(smoke / "sites" / "HNBW" / "manifest.csv")
    assert set(pooled["site"]) == set("HNBW")
    assert sorted(pooled["split"]) == sorted(scans[scans["site"] != "A"]["split"])


def test_the_steps_behind_each_row_are_reported(smoke):
    rows = pd.read_csv(smoke / "rows.csv", index_col="row")
    preset = yaml.safe_load(preset_file("smoke").read_text())
    steps = {name: preset[name]["steps"] for name in ("map", "vi", "vcl", "finetune")}
    assert rows.loc["H->N", "total_steps"] == steps["map"] + steps["vi"] + steps["vcl"]
    assert rows.loc["H->N->B->W", "total_steps"] == steps["map"] + steps["vi"] + 3 * steps["vcl"]
    assert rows.loc[DWC, "total_steps"] == steps["map"] + steps["vi"] + 3 * steps["vcl"] + steps["finetune"]
    assert rows.loc["Ensemble", "steps"] == rows.loc["Ensemble", "total_steps"] == 4 * steps["map"]
    assert rows.loc["H->N+B+W (DWC w/o FT)", "steps"] == 0
    assert all((smoke / file).is_file() for files in rows["networks"] for file in files.split(";"))


def test_dwc_is_compared_with_the_ensemble_and_both_chains_and_they_with_each_other(smoke):
    tests = pd.read_csv(smoke / "tests.csv")
    pairs = {f"{DWC} - {row}" for row in ("Ensemble", "H->N->B->W", "H->W->B->N")}
    pairs |= {"H->W->B->N - H->N->B->W", "H->N+B+W (DWC w/o FT) - H->N+B+W (plain average)"}
    assert set(tests["comparison"]) == pairs
    assert set(zip(tests["columns"], tests["unit"], strict=True)) == set(
        product(("H, N, B, W", "A"), ("volume", "subject"))
    )
    assert "20 paired two-tailed t-tests" in (smoke / "table.txt").read_text()


def test_each_vcl_network_is_compared_with_a_map_network_of_as_many_steps(smoke):
    speed = pd.read_csv(smoke / "speed.csv")
    assert speed["site"].tolist() == ["N", "B", "W"]
    preset = yaml.safe_load(preset_file("smoke").read_text())
    assert set(speed["steps"]) == {preset["vcl"]["steps"]}
    assert set(speed["map_steps"]) == {preset["map"]["steps"]}
    (log,) = (
        json.loads(path.read_text().splitlines()[-1]) for path in smoke.glob("networks/N_MAP_control-*/log.jsonl")
    )
    assert speed["map_dice"].iloc[0] == pytest.approx(log["dice"], rel=1e-5)
    assert speed[["map_plateau_step", "vcl_plateau_step"]].isna().all(axis=None)  # learning rates fall


def test_the_dice_of_step_0_is_the_priors_as_training_would_log_it(smoke, monkeypatch):
    monkeypatch.setattr("dwc.training.loop._Run._step", lambda run, *_: setattr(run.state, "step", run.state.step + 1))
    (prior,) = smoke.glob("networks/H-*/posterior.safetensors")
    preset = yaml.safe_load(preset_file("smoke").read_text())
    still = TrainSettings(
        mode="vcl", data=smoke / "sites" / "W" / "manifest.csv", prior=prior, out=smoke / "still", epochs=1,
        steps_per_epoch=1, cache_dir=smoke / "cache", validation_sub_volumes=preset["validation_sub_volumes"],
    )  # fmt: skip
    train_network(still)
    logged = json.loads((smoke / "still" / "log.jsonl").read_text())["dice"]
    start = pd.read_csv(smoke / "speed.csv").set_index("site").loc["W", "vcl_start_dice"]
    assert start == pytest.approx(logged, rel=1e-5)


def test_calibration_counts_every_voxel_of_three_rows(smoke, volumes):
    counts = pd.read_csv(smoke / "calibration.csv")
    voxels = counts.groupby(["row", "kind"])["n"].sum()
    assert set(counts["row"]) == {"HNBW MAP", "Ensemble", DWC}
    assert (voxels == volumes["image"].nunique() * 32**3).all()


def test_it_leaves_a_report_and_pictures(smoke):
    assert (smoke / "report.html").stat().st_size > 10_000
    assert (smoke / "figures" / "sites.png").stat().st_size > 10_000
    assert "Dice in %" in (smoke / "table.txt").read_text()


@pytest.mark.usefixtures("no_pictures")
def test_called_again_it_trains_and_scores_nothing_and_gives_the_same_tables(smoke, monkeypatch):
    table = (smoke / "table.csv").read_bytes()
    monkeypatch.setattr("dwc.study.networks.train_network", None)
    monkeypatch.setattr("dwc.study.scoring.score_volumes", None)
    assert command(smoke) == 0
    assert (smoke / "table.csv").read_bytes() == table


def test_only_one_row_trains_and_scores_what_it_needs(tmp_path, capsys):
    out = tmp_path / "out"
    assert command(out, "--map.steps", "2", "--map.epochs", "1", "--only", "h map") == 0
    assert len(list((out / "networks").iterdir())) == 1
    assert pd.read_csv(out / "table.csv")["row"].tolist() == ["H MAP"]
    assert not (out / "speed.csv").exists()
    assert (out / "report.html").is_file()
    assert "1 of 1 networks, 2 steps" in capsys.readouterr().out


def test_a_dry_run_reports_what_is_left_and_writes_nothing(smoke, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dwc.study.cost._measure", lambda *_: (1.0, 0.1))
    assert command(tmp_path / "new", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "17 of 17 networks" in printed
    assert "15 rows, 144 predictions" in printed  # the ensemble's row has four networks; 8 volumes
    assert "estimated from" in printed
    assert not (tmp_path / "new").exists()
    before = {path: path.stat().st_mtime_ns for path in smoke.rglob("*")}
    assert command(smoke, "--dry-run", "--vcl.steps", "12") == 0
    printed = capsys.readouterr().out
    assert "11 of 17 networks" in printed  # the seven of VCL, the fine-tuned one and the controls
    assert "to score: 8 rows, 64 predictions" in printed  # those and the two that are computed; MAP and H's are there
    assert {path: path.stat().st_mtime_ns for path in smoke.rglob("*")} == before


def test_a_study_that_is_done_has_nothing_left_and_measures_nothing(smoke, capsys, monkeypatch):
    monkeypatch.setattr("dwc.study.cost._measure", lambda *_: pytest.fail("measured"))
    assert command(smoke, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "0 of 17 networks" in printed
    assert "to score: 0 rows" in printed
    assert "nothing is left" in printed


def test_the_estimate_adds_steps_and_predictions_of_each_kind(monkeypatch):
    monkeypatch.setattr(cost, "_measure", lambda _, bayesian: (2.0, 0.5) if bayesian else (1.0, 0.25))
    settings, grid = SimpleNamespace(n_samples=3), SimpleNamespace(size=64)
    study = SimpleNamespace(device=torch.device("cpu"), settings=settings, grid=grid)
    printed = cost.estimate(study, cost.Left({map_network("H"): 10, variational("H"): 20}, 2, {False: 1, True: 2}))
    assert "training about 50 s, scoring about 26 s" in printed  # 8 sub-volumes x (0.25 + 2 x 3 samples x 0.5)


@pytest.mark.parametrize("slow_first", [0.05, 0.3])
def test_the_call_that_warms_up_is_never_the_measure(slow_first, monkeypatch):
    monkeypatch.setattr(cost, "_PATIENCE", 0.1)
    calls = iter((slow_first, *[0.01] * 9))
    assert cost._seconds(lambda: time.sleep(next(calls)), torch.device("cpu")) < 0.04


@pytest.mark.usefixtures("no_pictures")
def test_seeds_are_pooled(smoke, volumes, tmp_path, capsys):
    other = tmp_path / "seed-1"
    shutil.copytree(smoke, other, ignore=shutil.ignore_patterns("networks", "sites", "cache", "scores"))
    values = yaml.safe_load((other / "config.yaml").read_text())
    (other / "config.yaml").write_text(yaml.safe_dump({**values, "seed": 1}))
    volumes.assign(dice=volumes["dice"] + 0.1).to_csv(other / "volumes.csv", index=False)
    out = tmp_path / "pooled"
    assert main(["experiment", "--pool", str(smoke), str(other), "--out", str(out)]) == 0
    one, mean, sd = (pd.read_csv(path, index_col="row") for path in (
        smoke / "table.csv", out / "table.csv", out / "table_sd.csv"))  # fmt: skip
    assert (mean - one - 0.05).abs().max(axis=None) < 1e-5
    assert (sd - 0.1 / 2**0.5).abs().max(axis=None) < 1e-5
    tests = pd.read_csv(out / "tests.csv")
    assert (tests["n"] == 2 * pd.read_csv(smoke / "tests.csv")["n"]).all()  # phantoms are different heads in each seed
    assert set(pd.read_csv(out / "volumes.csv")["seed"]) == {0, 1}
    by_seed = pd.read_csv(out / "by_seed.csv")
    assert set(by_seed["comparison"]) == set(tests["comparison"])
    assert by_seed.groupby("seed")["n"].sum().tolist() == [5 * 8] * 2
    assert yaml.safe_load((out / "config.yaml").read_text()) == {k: v for k, v in values.items() if k != "seed"}
    assert main(["experiment", "--pool", str(smoke), str(smoke), "--out", str(out)]) == 2
    assert "give each seed once" in capsys.readouterr().err


@pytest.mark.usefixtures("no_pictures")
def test_a_head_that_recurs_under_several_seeds_or_at_several_sites_is_one_subject(smoke, tmp_path):
    seeds = [tmp_path / f"seed-{seed}" for seed in (0, 1)]
    values = yaml.safe_load((smoke / "config.yaml").read_text())
    for seed, folder in enumerate(seeds):
        shutil.copytree(smoke, folder, ignore=shutil.ignore_patterns("networks", "sites", "cache", "scores"))
        (folder / "config.yaml").write_text(yaml.safe_dump({**values, "seed": seed, "anatomies": "heads"}))
    volumes = pd.read_csv(seeds[1] / "volumes.csv")
    head = volumes.loc[volumes["site"] == "H", "subject"].iloc[0].removeprefix("H-")
    moved = volumes["site"] == "N"
    volumes.loc[moved, "subject"] = f"N-{head}"  # N's head under the second seed is one of H's under the first
    volumes.to_csv(seeds[1] / "volumes.csv", index=False)
    out = tmp_path / "pooled"
    assert main(["experiment", "--pool", *map(str, seeds), "--out", str(out)]) == 0
    n = pd.read_csv(out / "tests.csv").groupby("unit")["n"].sum()
    assert (n["volume"], n["subject"]) == (5 * 16, 5 * 8)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", None, "config.yaml: cannot be read"),
        ("config.yaml", "a: [", "config.yaml: is not YAML"),
        ("config.yaml", "", "config.yaml: holds no settings"),
        ("volumes.csv", None, "volumes.csv: cannot be read"),
        ("volumes.csv", "row\n", "volumes.csv: has no column site, subject"),
    ],
)
def test_a_folder_that_lacks_a_file_is_not_pooled(tmp_path, capsys, name, content, message):
    folders = [tmp_path / "a", tmp_path / "b"]
    for seed, folder in enumerate(folders):
        folder.mkdir()
        (folder / "config.yaml").write_text(f"seed: {seed}")
        for table in ("table", "rows", "volumes", "classes"):
            (folder / f"{table}.csv").write_text("row,kind,networks,site,subject,image,dice\n")
    path = folders[1] / name
    path.unlink() if content is None else path.write_text(content)
    assert main(["experiment", "--pool", *map(str, folders), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_damaged_config_is_named(tmp_path, capsys):
    (tmp_path / "sites" / "H").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text("a: [")
    assert command(tmp_path) == 2
    assert "config.yaml: is not YAML" in capsys.readouterr().err


def test_a_subject_called_na_keeps_its_name(tmp_path):
    write_table(tmp_path / "a.csv", pd.DataFrame({"subject": ["NA", "x"], "dice": [0.5, None]}))
    table = read_table(tmp_path / "a.csv", ("subject", "dice"))
    assert table["subject"].tolist() == ["NA", "x"]
    assert table["dice"].isna().tolist() == [False, True]


@pytest.mark.usefixtures("no_pictures")
def test_given_manifests_take_the_place_of_simulated_sites(smoke, tmp_path):
    manifests = {site: str(smoke / "sites" / site / "manifest.csv") for site in "HNBWA"}
    config = tmp_path / "study.yaml"
    config.write_text(yaml.safe_dump({"manifests": manifests, "map": {"steps": 2}}))
    assert command(tmp_path / "out", "--config", str(config), "--map.epochs", "1", "--only", "HNBW MAP") == 0
    assert pd.read_csv(tmp_path / "out" / "volumes.csv").groupby("site").size().to_dict() == {
        "A": 2, "B": 1, "H": 2, "N": 2, "W": 1,
    }  # fmt: skip
    assert not (tmp_path / "out" / "sites" / "H").exists()


@pytest.mark.parametrize("twin", ["A", "W"])
def test_an_image_in_the_manifests_of_two_sites_is_refused(smoke, tmp_path, capsys, twin):
    manifests = {site: str(smoke / "sites" / site / "manifest.csv") for site in "HNBWA"}
    manifests[twin] = manifests["N"]
    config = tmp_path / "study.yaml"
    config.write_text(yaml.safe_dump({"manifests": manifests}))
    assert command(tmp_path / "out", "--config", str(config)) == 2
    assert "too; give it to one site" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("preset", PRESETS)
def test_shipped_presets_are_valid(preset, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dwc.study.cost._measure", lambda *_: (1.0, 0.1))
    assert main(["experiment", "--preset", preset, "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    n = 14 if preset == "paper" else 17  # plateaus compare there, so MAP needs no control
    assert f"{n} of {n} networks" in capsys.readouterr().out


@pytest.mark.parametrize(("preset", "train", "test"), [("cpu", 60, 18), ("paper", 1, 1)])
def test_site_sizes_are_in_the_papers_proportions(preset, train, test):
    values = yaml.safe_load(preset_file(preset).read_text())
    for site, n in {"H": 956, "N": 1136, "B": 183, "W": 120}.items():
        assert abs(values["n_train"][site] - 0.9 * n / train) < 1
        assert abs(values["n_test"][site] - 0.1 * n / test) < 1
    assert PRESETS[-1] != preset or values["n_test"]["A"] == 893


def test_a_row_is_chosen_by_its_name_with_or_without_the_part_in_brackets():
    rows = rows_of(tiny_settings())
    assert [row.name for row in choose_rows(rows, ["ensemble", "h->n+b+w->h"])] == ["Ensemble", DWC]
    assert choose_rows(rows, []) == rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "H->N+B+W"], "several rows"),
        (["--only", "H->X"], "no row"),
        (["--preset", "huge"], "choose one of smoke"),
        (["--grid_size", "33"], "multiple of 32"),
        (["--n_train", '{"H": 1}'], "each of H, N, B and W"),
        (["--n_test.A", "0"], "--n-test.A 0"),
        (["--vcl.epochs", "7"], "does not divide"),
        (["--vcl.lr", "-1"], "-1"),
        (["--anatomies", "nowhere"], "no such folder"),
        (["--manifests", '{"H": "h.csv"}'], "each of H, N, B, W and A"),
        (["--manifests", '{"H": "h", "N": "n", "B": "b", "W": "w", "A": "a"}'], "cannot be read"),
        (["--pool", "nowhere"], "two seeds or more"),
        (["--pool", "nowhere", "elsewhere"], "no finished study"),
    ],
)
def test_bad_input_is_named_in_one_line_before_any_work(tmp_path, arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("dwc.study.networks.train_network", None)
    monkeypatch.setattr("dwc.study.paper.what_is_left", None)
    start = [] if "--preset" in arguments else ["--preset", "smoke"]
    assert main(["experiment", *start, "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_other_scans_than_those_in_the_folder_are_refused(smoke, capsys):
    assert command(smoke, "--seed", "1") == 2
    assert "other scans" in capsys.readouterr().err


def test_the_help_shows_the_values_of_the_preset(capsys):
    with pytest.raises(SystemExit):
        main(["experiment", "--preset", "smoke", "--help"])
    assert "default: {'H': 4, 'N': 5, 'B': 1, 'W': 1}" in " ".join(capsys.readouterr().out.split())
