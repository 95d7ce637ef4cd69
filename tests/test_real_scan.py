"""The whole path on a real 256^3 scan: conform, cache, train, predict, evaluate, look; skipped without the scan.

A tiny network learns white matter in seconds on a 64^3 grid around the centre of the head (256^3 is mostly air), and
its results are mapped back to the scan's grid.
"""

import csv
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from dwc import cli
from dwc.data.conform import conform_image, conform_labels
from dwc.data.grid import Grid
from dwc.data.labels import LabelMap
from dwc.metrics.confusion import confusion_matrix, dice
from dwc.report.figures import overlay

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "real"
SCAN, LABELS = REAL / "S1_T1w.nii.gz", REAL / "S1_aparc+aseg.nii.gz"

pytestmark = [
    pytest.mark.skipif(not REAL.is_dir(), reason=f"the folder with the real scan is absent ({REAL})"),
    pytest.mark.usefixtures("one_thread"),
]
pytest_plugins = ["tests.tiny_runs"]


def test_a_real_scan_goes_the_whole_way_from_file_to_scores_and_picture(tmp_path, capsys):
    lines = ["image,label,subject,split", f"{SCAN},{LABELS},S1,train"]
    (tmp_path / "train.csv").write_text("\n".join(lines))
    (tmp_path / "test.csv").write_text("\n".join(lines).replace("train", "test"))
    run, cache = tmp_path / "run", tmp_path / "cache"
    assert cli.main([
        "train", "--mode", "map", "--data", str(tmp_path / "train.csv"), "--out", str(run), "--cache_dir", str(cache),
        "--label_map", "coarse", "--grid_size", "64", "--voxel_size", "2.5", "--width", "8", "--dilations", "[1,1,2]",
        "--epochs", "1", "--steps_per_epoch", "150", "--batch_size", "2", "--lr", "0.03", "--schedule", "one_cycle",
        "--validation_sub_volumes", "0", "--device", "cpu",
    ]) == 0  # fmt: skip
    assert len(list(cache.glob("[!.]*"))) == 1
    network = str(run / "posterior.safetensors")
    assert cli.main(["predict", "--network", network, str(SCAN), "--out", str(tmp_path / "p"), "--device", "cpu"]) == 0
    assert cli.main([
        "evaluate", "--data", str(tmp_path / "test.csv"), "--network", network, "--cache_dir", str(cache),
        "--out", str(tmp_path / "e"), "--device", "cpu",
    ]) == 0  # fmt: skip
    assert len(list(cache.glob("[!.]*"))) == 1  # evaluation has used what training prepared

    coarse = LabelMap.load("coarse")
    segmented = nibabel.load(tmp_path / "p" / "S1_dseg.nii.gz")
    np.testing.assert_array_equal(segmented.affine, nibabel.load(SCAN).affine)
    predicted = coarse.apply(np.asarray(segmented.dataobj))
    truth = conform_labels(LABELS, Grid(), coarse, SCAN)
    white = dice(confusion_matrix(truth, predicted, coarse.n_classes))[1]
    assert white > 0.4  # seen: 0.64; by chance 0.04
    rows = {row["name"]: row for row in csv.DictReader((tmp_path / "e" / "per_class.csv").open())}
    assert float(rows["White-Matter"]["dice"]) == pytest.approx(white.item(), abs=0.1)  # on 2.5 mm rather than 1 mm
    assert float(rows["White-Matter"]["truth_mm3"]) == pytest.approx((truth == 1).sum(), rel=0.03)
    summary = json.loads((tmp_path / "e" / "summary.json").read_text())
    assert summary["n_volumes"] == 1

    entropy = np.asarray(nibabel.load(tmp_path / "p" / "S1_entropy.nii.gz").dataobj)
    image = conform_image(SCAN, Grid())
    assert entropy[truth > 0].mean() > 2 * entropy[image == 0].mean()  # more certain about air than about the brain
    picture = overlay(image, truth, {"MAP": predicted}, tmp_path / "S1.png", names=coarse.names, title="S1")
    assert picture.stat().st_size > 100_000
