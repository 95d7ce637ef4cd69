import csv
import gzip
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from dwc import cli
from dwc.colours import VIEWER_TABLES
from dwc.data.grid import Grid
from dwc.data.labels import LabelMap
from dwc.metrics.confusion import confusion_matrix, mean_dice

pytest_plugins = ["tests.tiny_runs"]
pytestmark = pytest.mark.usefixtures("one_thread")

LIA = Grid(32).affine(np.zeros(3))


def dwc(*words) -> tuple[int, str, str]:
    """Run `dwc` as a user types it, except for the interpreter's path."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "dwc.cli", *map(str, words)]
    process = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    return process.returncode, process.stdout, process.stderr


def refused(capsys, *words) -> str:
    """The one line of a command that exits with code 2 and writes nothing."""
    assert cli.main([str(word) for word in words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("dwc: ")
    assert captured.err.count("\n") == 1
    return captured.err


def ids_of(path: Path) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj)


@pytest.fixture
def network(networks) -> str:
    return networks["finetune"].name


@pytest.fixture
def scan(site) -> Path:
    return site / "sub-3_T1w.nii.gz"


def test_predict_leaves_labels_entropy_volumes_and_a_picture(networks, network, site, tmp_path):
    out = tmp_path / "results" / "today"
    scans = [site / "sub-3_T1w.nii.gz", site / "sub-2_T1w"]
    code, printed, error = dwc("predict", "--network", networks["map"].name, network, *scans, "--out", out)
    assert (code, error) == (0, "")
    suffixes = ("dseg.nii.gz", "dseg.tsv", "dseg.json", "entropy.nii.gz", "volumes.tsv", "overlay.png")
    of_all = {"volumes.tsv", "dataset_description.json", *VIEWER_TABLES}
    of_each = {f"sub-{n}_{suffix}" for n in (2, 3) for suffix in suffixes}
    assert {path.name for path in out.iterdir()} == of_all | of_each
    assert printed.splitlines()[0].startswith(f"{out / 'sub-3_dseg.nii.gz'}  (")
    coarse = LabelMap.load("coarse")
    table = list(csv.DictReader((out / "sub-3_dseg.tsv").open(), delimiter="\t"))
    assert [row["name"] for row in table] == list(coarse.names)
    ids = ids_of(out / "sub-3_dseg.nii.gz")
    assert ids.shape == (32, 32, 32)
    assert {str(index) for index in np.unique(ids)} <= {row["index"] for row in table}
    entropy = ids_of(out / "sub-3_entropy.nii.gz")
    assert nibabel.load(out / "sub-3_entropy.nii.gz").get_data_dtype() == np.uint8
    assert 0 < entropy.mean() <= entropy.max() <= np.log(9) + 1e-6
    volumes = list(csv.DictReader((out / "sub-3_volumes.tsv").open(), delimiter="\t"))
    assert sum(float(row["volume_mm3"]) for row in volumes) == 32**3


def test_scans_before_the_networks_and_a_config_file_mean_the_same(network, scan, tmp_path, capsys):
    assert cli.main(["predict", str(scan), "--network", network, "--out", str(tmp_path / "a"), "--seed", "5"]) == 0
    (tmp_path / "c.yaml").write_text(f"network: [{network}]\nseed: 5\npicture: false\n")
    assert cli.main(["predict", str(scan), "--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "b")]) == 0
    for name in ("sub-3_dseg.nii.gz", "sub-3_entropy.nii.gz"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (tmp_path / "a" / "sub-3_overlay.png").exists()
    assert not (tmp_path / "b" / "sub-3_overlay.png").exists()


def test_overwrite_replaces_results_and_nothing_else_does(network, scan, tmp_path, capsys):
    words = ["predict", "--network", network, scan, "--out", tmp_path]
    (tmp_path / "sub-3_dseg.nii.gz").write_text("made by hand")
    assert "sub-3_dseg.nii.gz: exists already" in refused(capsys, *words)
    assert (tmp_path / "sub-3_dseg.nii.gz").read_text() == "made by hand"
    assert len(list(tmp_path.iterdir())) == 1
    assert cli.main([*map(str, words), "--overwrite", "true"]) == 0
    assert ids_of(tmp_path / "sub-3_dseg.nii.gz").shape == (32, 32, 32)


def bad_scan(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.nii.gz"
    voxels = np.random.default_rng(0).random((32, 32, 32), np.float32)
    if kind == "nan":
        voxels[3] = np.nan
    if kind == "constant":
        voxels[:] = 1
    if kind == "four_d":
        voxels = voxels.reshape(32, 32, 16, 2)
    nibabel.save(nibabel.Nifti1Image(voxels, LIA), path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-3000])
    if kind == "text":
        path.write_bytes(gzip.compress(b"not an image"))
    if kind == "missing":
        path.unlink()
    return path


BAD_SCANS = {
    "missing": "no such file",
    "text": "not a NIfTI or mgz volume",
    "truncated": "truncated or damaged",
    "four_d": "is 4-D; give one 3-D volume",
    "nan": "voxels are NaN or infinite",
    "constant": "every voxel is 1; a constant volume is no image",
}


@pytest.mark.parametrize(("kind", "message"), BAD_SCANS.items())
def test_a_bad_scan_is_one_line_and_the_others_are_segmented(network, scan, tmp_path, capsys, kind, message):
    bad = bad_scan(tmp_path, kind)
    words = ["predict", "--network", network, bad, scan, "--out", tmp_path / "out", "--no-picture"]
    assert cli.main([str(word) for word in words]) == 1
    line, last = capsys.readouterr().err.splitlines()
    assert line.startswith(f"dwc: {bad}: ")
    assert re.search(message, line)
    assert last.startswith("dwc: 1 of 2 scans could not be segmented; ")
    assert (tmp_path / "out" / "sub-3_dseg.nii.gz").exists()
    assert re.search(message, (tmp_path / "out" / "failures.tsv").read_text())


@pytest.mark.parametrize(("kind", "message"), BAD_SCANS.items())
def test_a_bad_scan_ends_evaluate_before_any_work(network, site, tmp_path, capsys, kind, message):
    bad = bad_scan(tmp_path, kind)
    label = tmp_path / "label.nii.gz"
    label.write_bytes((site / "sub-3_dseg.nii.gz").read_bytes())
    (tmp_path / "m.csv").write_text(f"image,label,split\n{bad.name},label.nii.gz,test\n")
    line = refused(capsys, "evaluate", "--data", tmp_path / "m.csv", "--network", network, "--out", tmp_path / "out")
    assert str(bad) in line
    assert re.search(message if kind != "missing" else "does not exist", line)
    assert not list(tmp_path.glob("out/*.*"))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros((32, 32, 30), np.int16), "off the grid of .*shape"),
        (np.full((32, 32, 32), 0.5, np.float32), "labels are not whole numbers"),
    ],
)
def test_bad_labels_end_evaluate_before_any_work(network, scan, tmp_path, capsys, labels, message):
    (tmp_path / "a_T1w.nii.gz").write_bytes(scan.read_bytes())
    nibabel.save(nibabel.Nifti1Image(labels, LIA), tmp_path / "l.nii.gz")
    (tmp_path / "m.csv").write_text("image,label,split\na_T1w.nii.gz,l.nii.gz,test\n")
    line = refused(capsys, "evaluate", "--data", tmp_path / "m.csv", "--network", network, "--out", tmp_path / "out")
    assert line.startswith(f"dwc: {tmp_path / 'l.nii.gz'}: ")
    assert re.search(message, line)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,label,colour\na,b,c\n", "m.csv.*colour"),
        ("image,label,subject,split\n{0},{1},s,train\n{2},{1},s,test\n", "subject s is in both train and test"),
        ("image,label,split\n{0},{1},train\n", "has no scan to test on"),
        ("image,label,split\n{0},,test\n", "has no label; scores need one"),
        ("image,label,split\nnone.nii.gz,{1},test\n", "none.nii.gz does not exist"),
        (None, "m.csv"),
    ],
)
def test_a_bad_manifest_ends_evaluate_before_any_work(network, site, tmp_path, capsys, text, message):
    names = [str(site / name) for name in ("sub-0_T1w.nii.gz", "sub-0_dseg.nii.gz", "sub-1_T1w.nii.gz")]
    if text is not None:
        (tmp_path / "m.csv").write_text(text.format(*names))
    line = refused(capsys, "evaluate", "--data", tmp_path / "m.csv", "--network", network, "--out", tmp_path / "out")
    assert re.search(message, line)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predict"], "network"),
        (["predict", "--network", "NETWORK", "--out", "OUT"], "no scan: give one or more NIfTI files"),
        (["predict", "--network", "SCAN", "--out", "OUT"], "T1w.nii.gz: does not end in .safetensors; give posterior"),
        (["predict", "--network", "N.pt", "SCAN", "--out", "OUT"], "--network N.pt: does not end in .safetensors"),
        (["predict", "--network", "none.safetensors", "SCAN", "--out", "OUT"], "none.safetensors: no such file"),
        (["predict", "--network", "CUT", "SCAN", "--out", "OUT"], "cut.safetensors: truncated or not a safetensors"),
        (["predict", "--network", "CHECKPOINT", "SCAN", "--out", "OUT"], "checkpoint.safetensors: is a checkpoint"),
        (["predict", "--network", "NETWORK", "NETWORK", "SCAN", "--out", "OUT"], "is the same network as"),
        (["predict", "--network", "NETWORK", "SCAN", "SCAN", "--out", "OUT"], "would all be written as"),
        (["predict", "--network", "NETWORK", "SCAN", "--out", "SCAN"], "T1w.nii.gz: cannot be written"),
        (["predict", "--network", "NETWORK", "SCAN", "--out", "/proc/out"], "/proc/out: cannot be written"),
        (["predict", "--network", "NETWORK", "SCAN", "--out", "OUT", "--n_samples", "0"], "--n-samples 0: give a posi"),
        (["predict", "--network", "NETWORK", "SCAN", "--out", "OUT", "--seed", "-1"], "--seed -1: give a number >= 0"),
        (["predict", "--network", "NETWORK", "SCAN", "--out", "OUT", "--label_map", "x"], "x: no such label map"),
        (["evaluate", "--network", "NETWORK", "--out", "OUT"], "data"),
        (["evaluate", "--data", "DATA", "--network", "NETWORK", "--out", "/proc/out"], "/proc/out: cannot be written"),
        (["evaluate", "--data", "DATA", "--network", "NETWORK", "--out", "OUT", "--split", "half"], "split.*half"),
        (
            ["evaluate", "--data", "DATA", "--network", "NETWORK", "--out", "OUT", "--test_fraction", "2"],
            "test fraction 2.0",
        ),
        (
            ["evaluate", "--data", "DATA", "--network", "NETWORK", "--out", "OUT", "--split_seed", "-1"],
            "--split-seed -1",
        ),
    ],
)
def test_bad_arguments_are_one_line_and_nothing_is_written(network, scan, site, tmp_path, capsys, words, message):
    (tmp_path / "cut.safetensors").write_bytes(Path(network).read_bytes()[:-9])
    stands_for = {
        "NETWORK": network, "SCAN": scan, "OUT": tmp_path / "out", "CUT": tmp_path / "cut.safetensors",
        "CHECKPOINT": Path(network).with_name("checkpoint.safetensors"), "DATA": site / "manifest.csv",
    }  # fmt: skip
    assert re.search(message, refused(capsys, *(stands_for.get(word, word) for word in words)))
    assert not (tmp_path / "out").exists()


def test_a_full_disk_ends_predict_in_one_line_and_leaves_no_part_of_a_file(network, scan, tmp_path, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))  # the folder is writable, but the entropy does not fit
    try:
        line = refused(capsys, "predict", "--network", network, scan, "--out", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.search(r"sub-3_entropy\.nii\.gz: cannot be written", line)
    assert list((tmp_path / "out").iterdir()) == []


def test_evaluate_scores_the_held_out_scans_as_predict_segments_them(network, scan, site, tmp_path):
    code, printed, error = dwc("evaluate", "--data", site / "manifest.csv", "--network", network, "--out", tmp_path)
    assert (code, error) == (0, "")
    assert {path.name for path in tmp_path.iterdir()} == {
        "per_class.csv", "per_volume.csv", "per_site.csv", "summary.json", "cache",
    }  # fmt: skip
    (row,) = csv.DictReader((tmp_path / "per_volume.csv").open())
    assert (row["subject"], row["site"], row["image"]) == ("3", site.name, scan.name)
    assert cli.main(["predict", "--network", network, str(scan), "--out", str(tmp_path / "p")]) == 0
    coarse = LabelMap.load("coarse")
    truth, predicted = (
        coarse.apply(ids_of(path)) for path in (site / "sub-3_dseg.nii.gz", tmp_path / "p" / "sub-3_dseg.nii.gz")
    )
    confusion = confusion_matrix(truth, predicted, coarse.n_classes)
    assert float(row["dice"]) == pytest.approx(mean_dice(confusion), abs=1e-5)
    assert float(row["dice_with_background"]) == pytest.approx(mean_dice(confusion, with_background=True), abs=1e-5)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["sites"][site.name]["n_volumes"] == 1
    assert summary["volume_weighted"]["dice"] == pytest.approx(float(row["dice"]), abs=1e-5)
    assert summary["networks"][0]["file"] == network
    assert f"{float(row['dice']):.3f}" in printed
    classes = list(csv.DictReader((tmp_path / "per_class.csv").open()))
    assert [int(line["class"]) for line in classes] == list(range(9))


def test_evaluate_scores_all_scans_when_asked_and_keeps_old_results(network, site, tmp_path, capsys):
    words = ["evaluate", "--data", site / "manifest.csv", "--network", network, "--cache_dir", site / "cache"]
    words = [*words, "--split", "all", "--n_samples", "1", "--out", tmp_path]
    assert cli.main([str(word) for word in words]) == 0
    capsys.readouterr()
    assert len(list(csv.DictReader((tmp_path / "per_volume.csv").open()))) == 4
    assert not (tmp_path / "cache").exists()
    assert "per_class.csv: exists already" in refused(capsys, *words)
    assert cli.main([*(str(word) for word in words), "--overwrite", "true"]) == 0
