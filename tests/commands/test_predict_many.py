"""`dwc predict` on what a lab has: folders, data sets and lists, with a bad scan in them, stopped and started again."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest

from dwc import batch, cli
from dwc.data.checks import examine
from dwc.data.labels import LabelMap

pytest_plugins = ["tests.tiny_runs"]
pytestmark = pytest.mark.usefixtures("one_thread")

TOP = {"volumes.tsv", "labels_freesurfer.txt", "labels_itksnap.txt", "labels_slicer.ctbl", "dataset_description.json"}


@pytest.fixture
def network(networks) -> str:
    return networks["finetune"].name


@pytest.fixture
def cohort(site, tmp_path) -> Path:
    """Three scans in a folder with a blank and an umlaut, one of them broken."""
    folder = tmp_path / "Ünser scans"
    folder.mkdir()
    for number in (0, 3):
        (folder / f"sub-{number}_T1w.nii.gz").write_bytes((site / f"sub-{number}_T1w.nii.gz").read_bytes())
    (folder / "sub-2_T1w.nii.gz").write_bytes((site / "sub-2_T1w.nii.gz").read_bytes()[:-2000])
    return folder


def predict(*words) -> int:
    return cli.main(["predict", "--no-picture", "--n-samples", "2", *map(str, words)])


def table(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "volumes.tsv").open(), delimiter="\t"))


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_bad_scan_is_reported_and_the_others_finish(network, cohort, tmp_path, capsys):
    assert predict(cohort, "--network", network, "--out", tmp_path / "out") == 1
    captured = capsys.readouterr()
    bad, last = captured.err.splitlines()
    assert bad.startswith(f"dwc: {cohort / 'sub-2_T1w.nii.gz'}: truncated or damaged")
    assert last == f"dwc: 1 of 3 scans could not be segmented; {tmp_path / 'out' / 'failures.tsv'} says why"
    assert len(captured.out.splitlines()) == 2
    per_scan = {f"sub-{n}_{end}" for n in (0, 3) for end in
                ("dseg.nii.gz", "dseg.tsv", "dseg.json", "entropy.nii.gz", "volumes.tsv")}  # fmt: skip
    assert {path.name for path in (tmp_path / "out").iterdir()} == TOP | per_scan | {"failures.tsv"}
    (failure,) = csv.DictReader((tmp_path / "out" / "failures.tsv").open(), delimiter="\t")
    assert failure["scan"] == "sub-2"
    assert "truncated" in failure["reason"]
    rows = table(tmp_path / "out")
    assert [(row["scan"], row["quality"] == "failed") for row in rows] == [
        ("sub-0", False), ("sub-2", True), ("sub-3", False),
    ]  # fmt: skip
    assert float(rows[0]["total_mm3"]) > 0
    assert float(rows[0]["Thalamus-VentralDC_sd_mm3"]) >= 0


def test_skip_existing_does_only_what_is_missing_and_ends_as_one_run_would(
    network, cohort, site, tmp_path, capsys, monkeypatch
):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    (cohort / "sub-2_T1w.nii.gz").write_bytes((site / "sub-2_T1w.nii.gz").read_bytes())
    assert predict(cohort, "--network", network, "--out", whole) == 0
    assert predict(cohort / "sub-3_T1w", "--network", network, "--out", stopped) == 0
    assert predict(cohort / "sub-0_T1w", "--network", network, "--out", stopped) == 0
    (stopped / "sub-3_dseg.nii.gz").write_bytes((stopped / "sub-3_dseg.nii.gz").read_bytes()[:-1])
    (stopped / ".sub-2_dseg.nii.gz.xyz.part").write_bytes(b"left by a kill")
    capsys.readouterr()
    segmented = []
    monkeypatch.setattr(batch, "segment", _recorded(batch.segment, segmented))
    assert predict(cohort, "--network", network, "--out", stopped, "--skip-existing") == 0
    assert segmented == ["sub-2_T1w.nii.gz", "sub-3_T1w.nii.gz"]
    assert f"{stopped / 'sub-0_dseg.nii.gz'}  (done before)" in capsys.readouterr().out
    assert contents(stopped) == contents(whole)
    segmented.clear()
    assert predict(cohort, "--network", network, "--out", stopped, "--skip-existing") == 0
    assert not segmented


@pytest.mark.parametrize(
    "change", ["samples", "seed", "network", "version", "scan", "maps", "conformed", "sidecar", "table"]
)
def test_a_scan_made_in_another_way_is_not_done(networks, network, cohort, tmp_path, monkeypatch, change):
    scan, out, words = cohort / "sub-3_T1w.nii.gz", tmp_path / "out", []
    assert predict(scan, "--network", network, "--out", out) == 0
    if change == "scan":
        image = nibabel.load(scan)
        nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj)[::-1].copy(), image.affine), scan)
    if change == "version":
        monkeypatch.setattr(batch, "__version__", "0.0.1")
    if change == "network":
        network = networks["vi"].name
    if change == "sidecar":
        (out / "sub-3_dseg.json").write_text("{")
    if change == "table":
        (out / "sub-3_volumes.tsv").unlink()
    words += {
        "samples": ["--n-samples", "3"],
        "seed": ["--seed", "1"],
        "maps": ["--maps", "[entropy,variance]"],
        "conformed": ["--conformed"],
    }.get(change, [])
    segmented: list[str] = []
    monkeypatch.setattr(batch, "segment", _recorded(batch.segment, segmented))
    assert predict(scan, "--network", network, "--out", out, "--skip-existing", *words) == 0
    assert segmented == ["sub-3_T1w.nii.gz"]


def _recorded(function, names: list[str]):
    def recorded(ensemble, scan, *others, **options):
        names.append(scan.name)
        return function(ensemble, scan, *others, **options)

    return recorded


def test_labels_made_by_hand_are_kept_when_going_on(network, cohort, site, tmp_path, capsys):
    (cohort / "sub-2_T1w.nii.gz").unlink()
    by_hand = cohort / "sub-3_dseg.nii.gz"
    by_hand.write_bytes((site / "sub-3_dseg.nii.gz").read_bytes())
    assert predict(cohort, "--network", network, "--out", cohort, "--skip-existing") == 1
    assert f"{by_hand}: was not written by dwc and is kept; give another --out, or --over" in capsys.readouterr().err
    assert by_hand.read_bytes() == (site / "sub-3_dseg.nii.gz").read_bytes()
    assert [row["quality"] == "failed" for row in table(cohort)] == [False, True]
    (cohort / "sub-0_dseg.json").unlink()  # as after a kill just before the end of a scan
    assert predict(cohort / "sub-0_T1w.nii.gz", "--network", network, "--out", cohort, "--skip-existing") == 0


def test_a_scan_that_goes_away_during_the_run_is_a_failure(network, cohort, tmp_path, capsys, monkeypatch):
    (cohort / "sub-2_T1w.nii.gz").unlink()

    def examined(path, grid):
        (cohort / "sub-3_T1w.nii.gz").unlink(missing_ok=True)
        return examine(path, grid)

    monkeypatch.setattr(batch, "examine", examined)
    assert predict(cohort, "--network", network, "--out", tmp_path / "out") == 1
    assert f"dwc: {cohort / 'sub-3_T1w.nii.gz'}: no such file" in capsys.readouterr().err
    assert [row["quality"] for row in table(tmp_path / "out")][-1] == "failed"


def test_a_run_folder_is_a_network_and_an_unfinished_one_is_told(network, cohort, tmp_path, capsys):
    scan = cohort / "sub-3_T1w.nii.gz"
    assert predict("--network", Path(network).parent, scan, "--out", tmp_path / "out") == 0
    unfinished = tmp_path / "run"
    unfinished.mkdir()
    (unfinished / "checkpoint.safetensors").touch()
    for folder, message in ((unfinished, "its run has not ended"), (cohort, "give the folder of a run")):
        capsys.readouterr()
        assert predict("--network", folder, scan, "--out", tmp_path / "out2") == 2
        assert message in capsys.readouterr().err


def test_sessions_of_a_data_set_lie_apart_and_the_sidecar_says_what_made_them(networks, network, site, tmp_path):
    for session in (1, 2):
        folder = tmp_path / "bids" / "sub-3" / f"ses-{session}" / "anat"
        folder.mkdir(parents=True)
        name = f"sub-3_ses-{session}_T1w.nii.gz"
        (folder / name).write_bytes((site / f"sub-{session}_T1w.nii.gz").read_bytes())
    out = tmp_path / "out"
    assert predict(tmp_path / "bids", "--network", network, "--out", out, "--seed", "7") == 0
    assert [row["scan"] for row in table(out)] == [f"sub-3/ses-{n}/anat/sub-3_ses-{n}" for n in (1, 2)]
    folder = out / "sub-3" / "ses-1" / "anat"
    sidecar = json.loads((folder / "sub-3_ses-1_dseg.json").read_text())
    assert sidecar["Networks"] == [networks["finetune"].sha256]
    assert (sidecar["Samples"], sidecar["Seed"], sidecar["Version"]) == (2, 7, cli.__version__)
    assert (folder / sidecar["Sources"][0]).resolve() == (
        tmp_path / "bids" / "sub-3" / "ses-1" / "anat" / "sub-3_ses-1_T1w.nii.gz"
    )
    assert json.loads((out / "dataset_description.json").read_text())["DatasetType"] == "derivative"


def test_maps_are_uint8_with_a_scale_and_the_labels_say_that_they_are_labels(network, site, tmp_path):
    scan, out = site / "sub-3_T1w.nii.gz", tmp_path / "out"
    maps = ("entropy", "mutual_information", "variance", "confidence")
    words = ["--maps", "entropy,mutual-information", "variance", "confidence", scan]  # the flag takes the scan too
    assert predict("--network", network, "--out", out, *words) == 0
    for name in maps:
        image = nibabel.load(out / f"sub-3_{name}.nii.gz")
        assert image.get_data_dtype() == np.uint8
        values = image.get_fdata()
        assert values.min() >= 0
        assert 0 < values.max() <= (np.log(9) if name in maps[:2] else 1) + 1e-6
        np.testing.assert_array_equal(image.affine, nibabel.load(scan).affine)
    labels = nibabel.load(out / "sub-3_dseg.nii.gz")
    assert labels.header.get_intent()[0] == "label"
    assert bytes(labels.header["descrip"]).startswith(b"dwc ")
    assert predict(scan, "--network", network, "--out", tmp_path / "none", "--maps", "none") == 0
    assert not list((tmp_path / "none").glob("*entropy*"))


def test_conformed_results_lie_on_the_networks_grid_with_the_scan_beside_them(network, tmp_path):
    voxels = np.random.default_rng(0).integers(1, 255, (20, 30, 16), np.uint8)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([-1.5, 1, 2, 1])), tmp_path / "a.nii")
    assert predict(tmp_path / "a.nii", "--network", network, "--out", tmp_path / "out", "--conformed") == 0
    labels, image = (
        nibabel.load(tmp_path / "out" / f"a_{end}") for end in ("dseg.nii.gz", "desc-conformed_T1w.nii.gz")
    )
    assert labels.shape == image.shape == (32, 32, 32)
    assert nibabel.aff2axcodes(labels.affine) == ("L", "I", "A")
    np.testing.assert_allclose(labels.affine, image.affine)
    np.testing.assert_allclose(nibabel.affines.voxel_sizes(labels.affine), 1)
    np.testing.assert_allclose(
        labels.affine[:3] @ [16, 16, 16, 1], np.diag([-1.5, 1, 2, 1])[:3] @ [10, 15, 8, 1], atol=2
    )


def test_the_largest_components_are_asked_for_and_recorded(network, site, tmp_path):
    scan = site / "sub-3_T1w.nii.gz"
    assert predict(scan, "--network", network, "--out", tmp_path / "a") == 0
    assert predict(scan, "--network", network, "--out", tmp_path / "b", "--largest-component") == 0
    before, after = (np.asarray(nibabel.load(tmp_path / out / "sub-3_dseg.nii.gz").dataobj) for out in "ab")
    assert before.shape == after.shape
    assert json.loads((tmp_path / "b" / "sub-3_dseg.json").read_text())["LargestComponent"] is True
    assert set(np.unique(after)) <= set(np.unique(before)) | {0}


@pytest.mark.parametrize("kind", ["nii", "mgz", "four_d", "link"])
def test_each_kind_of_file_gets_results_on_its_own_voxels(network, site, tmp_path, kind):
    source = nibabel.load(site / "sub-3_T1w.nii.gz")
    voxels = np.asarray(source.dataobj)
    path = tmp_path / ("a.mgz" if kind == "mgz" else "a.nii")
    if kind == "mgz":
        nibabel.save(nibabel.MGHImage(voxels, source.affine), path)
    elif kind == "link":
        path = tmp_path / "a.nii.gz"
        path.symlink_to(site / "sub-3_T1w.nii.gz")
    else:
        nibabel.save(nibabel.Nifti1Image(voxels[..., None] if kind == "four_d" else voxels, source.affine), path)
    assert predict(path, "--network", network, "--out", tmp_path / "out") == 0
    labels = nibabel.load(tmp_path / "out" / "a_dseg.nii.gz")
    assert labels.shape == (32, 32, 32)
    np.testing.assert_allclose(labels.affine, source.affine)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["EMPTY"], "empty: holds no scan"),
        (["x*.nii.gz"], "matches no scan"),
        (["COHORT", "--skip-existing", "--overwrite"], "--skip-existing keeps results and --overwrite replaces them"),
        (["COHORT", "--maps", "entropie"], "--maps entropie: choose from entropy, mutual_information"),
        (["TWICE/one/T1.nii.gz", "TWICE/two/T1.nii.gz"], "would all be written as"),
        (["none.nii.gz"], "none.nii.gz: no such file"),
    ],
)
def test_what_cannot_be_meant_is_one_line_and_nothing_is_written(network, cohort, tmp_path, capsys, words, message):
    (tmp_path / "empty").mkdir()
    for name in ("one", "two"):
        (tmp_path / "twice" / name).mkdir(parents=True)
        (tmp_path / "twice" / name / "T1.nii.gz").write_bytes((cohort / "sub-3_T1w.nii.gz").read_bytes())
    places = {"EMPTY": tmp_path / "empty", "COHORT": cohort, "TWICE": tmp_path / "twice"}
    for key, place in places.items():
        words = [word.replace(key, str(place)) for word in words]
    assert predict(*words, "--network", network, "--out", tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not (tmp_path / "out").exists()


def test_scans_of_one_name_in_two_folders_are_segmented_when_their_folder_is_given(network, cohort, tmp_path):
    for name in ("one", "two"):
        (tmp_path / "twice" / name).mkdir(parents=True)
        (tmp_path / "twice" / name / "T1.nii.gz").write_bytes((cohort / "sub-3_T1w.nii.gz").read_bytes())
    assert predict(tmp_path / "twice", "--network", network, "--out", tmp_path / "out") == 0
    rows = table(tmp_path / "out")
    assert [row["scan"] for row in rows] == ["one/T1", "two/T1"]
    assert "holds the same image as two/T1" in rows[0]["reason"]


def test_ctrl_c_is_one_line_that_says_how_to_go_on_and_what_is_done_stays(network, site, tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02d}.nii.gz").write_bytes((site / f"sub-{number % 4}_T1w.nii.gz").read_bytes())
    out = tmp_path / "out"
    words = ["predict", folder, "--network", network, "--out", out, "--no-picture", "--n-samples", "8"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dwc.cli", *map(str, words)], env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while process.poll() is None and not list(out.glob("*_dseg.json")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert error.splitlines()[-1] == "dwc: stopped by SIGINT; go on with --skip-existing"
    assert "Traceback" not in error
    assert not list(out.glob(".*.part"))
    assert len(list(out.glob("*_dseg.json"))) < 40


def test_no_output_names_a_merged_class_after_one_side(network, site, tmp_path):
    assert predict(site / "sub-3_T1w.nii.gz", "--network", network, "--out", tmp_path / "out") == 0
    for path in (tmp_path / "out").iterdir():
        if path.suffix in (".tsv", ".json", ".txt", ".ctbl"):
            assert "Left-" not in path.read_text()
            assert "lh-" not in path.read_text()
    assert {row["side"] for row in csv.DictReader((tmp_path / "out" / "sub-3_dseg.tsv").open(), delimiter="\t")} == {
        "both", "n/a",
    }  # fmt: skip
    assert LabelMap.load("coarse").sides[1] == "both"
