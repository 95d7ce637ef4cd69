import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from dwc.base.errors import InputError
from dwc.data.cache import prepare
from dwc.data.grid import Grid
from dwc.data.labels import LabelMap
from dwc.data.manifest import Scan, read_manifest
from dwc.evaluation import (
    Evaluation,
    Score,
    calibration,
    evaluate,
    per_class,
    per_site,
    per_volume,
    scans_to_score,
    score_volumes,
    summary,
)
from dwc.metrics.calibration import CalibrationCounts
from dwc.metrics.confusion import confusion_matrix
from dwc.posterior import Posterior
from dwc.prediction import load_networks, predict_volume

pytest_plugins = ["tests.tiny_runs"]
pytestmark = pytest.mark.usefixtures("one_thread")

GRID = Grid(32, 2.0)
COARSE = LabelMap.load("coarse")


def score(site: str, subject: str, right: int, wrong: int, klass: int = 1) -> Score:
    """Background and one class in the truth, with `right` voxels correct and `wrong` voxels predicted as class 2."""
    confusion = torch.zeros(COARSE.n_classes, COARSE.n_classes, dtype=torch.int64)
    confusion[0, 0], confusion[klass, klass], confusion[klass, 2] = 100, right, wrong
    counts = CalibrationCounts(COARSE.n_classes)
    counts.add(np.full(right + wrong, 0.9), np.full(right + wrong, 0.5), np.arange(right + wrong) < right)
    return Score(
        Scan(Path(f"{subject}_T1w.nii.gz"), Path("l"), subject, site, "test"), confusion, counts.frame(), nll=0.5
    )


@pytest.fixture
def scores() -> list[Score]:
    """Dice 1 and 2/3 at H, 0 at N."""
    return [score("H", "h1", 10, 0), score("H", "h2", 5, 5), score("N", "n1", 0, 10)]


def test_sessions_that_share_a_files_name_are_told_apart_by_their_folders(scores):
    def session(number: int, name: str = "T1.mgz") -> Score:
        scan = replace(scores[0].scan, image=Path(f"data/h1/ses-{number}/{name}"))
        return replace(scores[0], scan=scan)

    assert per_volume([session(1), session(2)])["image"].tolist() == ["ses-1/T1.mgz", "ses-2/T1.mgz"]
    assert per_class([session(1), session(2)], COARSE, GRID)["image"].nunique() == 2
    assert per_volume([session(1), session(2, "b.mgz")])["image"].tolist() == ["T1.mgz", "b.mgz"]


def test_each_volume_is_the_mean_over_the_classes_of_its_truth(scores):
    table = per_volume(scores)
    assert list(table.columns) == ["site", "subject", "image", "n_classes", "dice", "dice_with_background", "nll"]
    assert table.dice.tolist() == pytest.approx([1, 2 / 3, 0])
    assert table.dice_with_background.tolist() == pytest.approx([1, 5 / 6, 1 / 2])
    assert table.n_classes.tolist() == [1, 1, 1]
    assert table.image.tolist() == ["h1_T1w.nii.gz", "h2_T1w.nii.gz", "n1_T1w.nii.gz"]


def test_each_class_has_its_dice_and_its_volumes_in_mm3(scores):
    table = per_class(scores, COARSE, GRID)
    assert len(table) == 3 * COARSE.n_classes
    row = table[(table.subject == "h2") & (table["class"] == 1)].iloc[0]
    assert (row["name"], row.truth_mm3, row.predicted_mm3) == (COARSE.names[1], 10 * 8.0, 5 * 8.0)
    assert row.dice == pytest.approx(2 / 3)
    absent = table[(table.subject == "h2") & (table["class"] == 2)].iloc[0]
    assert math.isnan(absent.dice)
    assert absent.predicted_mm3 == 5 * 8.0


def test_sites_average_the_volumes_whose_truth_has_the_class(scores):
    table = per_site([*scores, score("H", "h3", 3, 0, klass=3)], COARSE, GRID).set_index(["site", "class"])
    assert table.loc[("H", 1), "n_volumes"] == 2
    assert table.loc[("H", 1), "dice"] == pytest.approx(5 / 6)
    assert table.loc[("H", 1), "dice_sd"] == pytest.approx(pd.Series([1, 2 / 3]).std())
    assert table.loc[("H", 3), "n_volumes"] == 1
    assert math.isnan(table.loc[("N", 3), "dice"])


def test_the_summary_weighs_sites_by_their_volumes_and_alike(scores):
    result = summary(scores)
    assert result["n_volumes"] == 3
    assert result["sites"]["H"] == {
        "n_volumes": 2, "dice": pytest.approx(5 / 6), "dice_with_background": pytest.approx(11 / 12),
    }  # fmt: skip
    assert result["volume_weighted"]["dice"] == pytest.approx(5 / 9)
    assert result["site_mean"]["dice"] == pytest.approx(5 / 12)


def test_a_site_with_nothing_to_score_is_null_rather_than_zero():
    assert summary([score("H", "h", 0, 0)])["sites"]["H"]["dice"] is None
    assert summary([score("H", "h", 0, 0)])["volume_weighted"]["dice_with_background"] == 1


def test_whole_volumes_are_scored_against_their_conformed_labels(networks, site, tmp_path):
    ensemble = load_networks([networks["finetune"].name])
    scans = read_manifest(site / "manifest.csv")
    data = prepare(scans, ensemble.label_map, ensemble.grid, tmp_path, progress=False)
    results = score_volumes(ensemble.networks, data, n_samples=2, seed=3, progress=False)
    assert [result.scan for result in results] == scans
    image, truth = data.volume(2)
    predicted = predict_volume(ensemble.networks, image, n_samples=2, seed=3)
    assert torch.equal(results[2].confusion, confusion_matrix(truth, predicted.labels, 9))
    assert results[2].confusion.sum() == 32**3
    counts = results[2].calibration.groupby("kind")[["n", "correct", "sum"]].sum()
    assert counts["n"].tolist() == [32**3] * 2
    assert counts["correct"].tolist() == [results[2].confusion.diagonal().sum()] * 2
    expected = [predicted.confidence.sum(dtype=float), predicted.entropy.sum(dtype=float)]
    assert counts["sum"].tolist() == pytest.approx(expected)


def test_the_calibration_of_a_site_adds_up_that_of_its_volumes(scores):
    table = calibration(scores)
    assert list(table.columns) == ["site", "kind", "bin", "low", "high", "n", "correct", "sum"]
    row = table[(table.site == "H") & (table.kind == "confidence") & (table.n > 0)]
    assert row[["low", "high", "n", "correct", "sum"]].to_numpy().tolist() == [pytest.approx([0.9, 0.95, 20, 15, 18])]
    assert table[table.site == "N"].groupby("kind").correct.sum().tolist() == [0, 0]


def manifest(folder: Path, split: bool = False) -> Path:
    """Twenty subjects with empty files; without a split column unless asked for."""
    lines = ["image,label,subject" + ",split" * split]
    for n in range(20):
        for kind in ("T1w", "dseg"):
            (folder / f"{n}_{kind}.nii.gz").touch()
        lines.append(f"{n}_T1w.nii.gz,{n}_dseg.nii.gz,{n}" + (",test" if n < 3 else ",train") * split)
    (folder / "manifest.csv").write_text("\n".join(lines))
    return folder / "manifest.csv"


def trained(seed: int, fraction: float = 0.2, name: str = "net") -> Posterior:
    return Posterior({}, {}, {"training": {"seed": seed, "test_fraction": fraction}}, name)


CONSOLIDATED = Posterior({}, {}, {"sites": []}, "consolidated")


def subjects(scans) -> set[str]:
    return {scan.subject for scan in scans}


def test_without_a_split_column_the_scans_are_those_that_the_network_was_not_trained_on(tmp_path):
    data = manifest(tmp_path)
    held_out = {s.subject for s in read_manifest(data, seed=4, test_fraction=0.2) if s.split == "test"}
    assert len(held_out) == 4
    assert subjects(scans_to_score(data, [trained(4)])) == held_out
    assert subjects(scans_to_score(data, [trained(5)])) != held_out
    assert subjects(scans_to_score(data, [CONSOLIDATED], split_seed=4, test_fraction=0.2)) == held_out
    assert not subjects(scans_to_score(data, [trained(4)], split="train")) & held_out
    assert len(scans_to_score(data, [trained(4), trained(5)], split="all")) == 20


@pytest.mark.parametrize("posteriors", [[CONSOLIDATED], [trained(4), CONSOLIDATED]])
def test_without_a_split_column_a_network_that_names_no_split_needs_one(tmp_path, posteriors):
    data = manifest(tmp_path)
    for split in ("test", "train"):
        with pytest.raises(
            InputError, match=r"consolidated: does not say which split .* column .* or give the `split_seed`"
        ):
            scans_to_score(data, posteriors, split=split)
    assert len(scans_to_score(data, posteriors, split="all")) == 20
    assert scans_to_score(data, posteriors, split_seed=4, test_fraction=0.2)


def test_a_split_column_decides_whatever_the_seeds(tmp_path):
    scans = scans_to_score(manifest(tmp_path, split=True), [trained(4), trained(5), CONSOLIDATED])
    assert subjects(scans) == {"0", "1", "2"}


def test_networks_trained_on_different_splits_are_refused_naming_both(tmp_path):
    with pytest.raises(InputError, match="b was trained on another split of it than a; add a split column"):
        scans_to_score(manifest(tmp_path), [trained(4, name="a"), trained(5, name="b")])


def test_nothing_to_score_and_a_missing_label_are_refused(tmp_path):
    data = manifest(tmp_path, split=True)
    data.write_text(data.read_text().replace(",test", ",train"))
    with pytest.raises(InputError, match=r"has no scan to test on; .*`split` all"):
        scans_to_score(data, [CONSOLIDATED])
    data.write_text(data.read_text().replace("1_dseg.nii.gz", "", 1))
    with pytest.raises(InputError, match=r"1_T1w\.nii\.gz has no label; scores need one"):
        scans_to_score(data, [CONSOLIDATED], split="all")


def test_no_cell_of_the_written_tables_runs_in_a_spreadsheet(scores, tmp_path):
    hostile = [replace(one, scan=replace(one.scan, site="=1+1", subject="@x")) for one in scores]
    table = per_volume(hostile)
    Evaluation(table, table, table, {}).write(tmp_path)
    for path in tmp_path.glob("*.csv"):
        assert "'=1+1,'@x," in path.read_text()


def test_an_evaluation_warns_of_what_training_warns_of(networks, site, capsys, monkeypatch):
    told = []
    monkeypatch.setattr("dwc.evaluation.admit", lambda scans, *_, **__: told.append([scan.image for scan in scans]))
    evaluate(networks["map"], site / "manifest.csv")
    assert [[path.name for path in paths] for paths in told] == [["sub-3_T1w.nii.gz"]]
