"""`dwc data check` as a user types it."""

import json
import os
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

from dwc import cli

GRID = ("--grid-size", "64", "--voxel-size", "2")


@pytest.fixture
def folder(tmp_path):
    """Three labelled scans and their manifest."""
    rows = ["image,label,subject,split"]
    for number in range(3):
        rng = np.random.default_rng(number)
        image = np.zeros((50, 50, 50), np.int16)
        image[10:40, 10:40, 10:40] = rng.integers(100, 900, (30, 30, 30))
        labels = np.where(image > 0, 2, 0).astype(np.int16)
        for name, voxels in (("T1w", image), ("dseg", labels)):
            nib.save(nib.Nifti1Image(voxels, np.diag([2.0, 2, 2, 1])), tmp_path / f"s{number}_{name}.nii.gz")
        rows.append(f"s{number}_T1w.nii.gz,s{number}_dseg.nii.gz,p{number},{'test' if number else 'train'}")
    (tmp_path / "m.csv").write_text("\n".join(rows))
    return tmp_path


def test_good_data_are_a_row_each_class_frequencies_and_exit_code_0(folder):
    words = [sys.executable, "-m", "dwc.cli", "data", "check", str(folder / "m.csv"), *GRID]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert (process.returncode, process.stderr) == (0, "")
    lines = process.stdout.splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [["ok", f"s{n}_T1w.nii.gz"] for n in range(3)]
    assert any(line.split() == ["1", "Cerebral-White-Matter", "100.000%", "3"] for line in lines)
    assert lines[-1] == "3 scans, 3 with labels: 0 refused, 0 odd"


def test_a_folder_is_checked_as_a_manifest_is(folder, capsys):
    assert cli.main(["data", "check", str(folder), *GRID]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "3 scans, 3 with labels: 0 refused, 0 odd"


def test_bad_scans_are_all_told_and_the_exit_code_says_so(folder, capsys):
    for name in ("s0_T1w.nii.gz", "s2_dseg.nii.gz"):
        (folder / name).write_bytes((folder / name).read_bytes()[:300])
    assert cli.main(["data", "check", str(folder / "m.csv"), *GRID]) == 2
    captured = capsys.readouterr()
    assert captured.out.count("    error: ") == 2
    assert captured.err.splitlines()[-1] == f"dwc: {folder / 'm.csv'}: 3 scans, 3 with labels: 2 refused, 0 odd"


def test_missing_files_pointers_and_ambiguous_names_are_a_row_each(folder, capsys):
    (folder / "lfs.nii.gz").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n")
    with (folder / "m.csv").open("a") as table:
        table.write("\ngone.nii.gz,s0_dseg.nii.gz,p7,train\nlfs.nii.gz,s0_dseg.nii.gz,p8,train\n")
    assert cli.main(["data", "check", str(folder / "m.csv"), *GRID]) == 2
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "5 scans, 5 with labels: 2 refused, 0 odd"
    assert "gone.nii.gz does not exist" in printed
    assert "git-LFS pointer" in printed
    anat = folder / "bids" / "sub-1" / "anat"
    anat.mkdir(parents=True)
    for name in ("sub-1_T1w.nii", "sub-1_T1w.nii.gz", "sub-1_run-2_T1w.nii.gz"):
        (anat / name).touch()
    assert cli.main(["data", "check", str(folder / "bids"), *GRID]) == 2
    assert "several images of one scan" in capsys.readouterr().out


def test_letters_that_turn_the_direction_of_text_are_not_printed(folder, capsys):
    text = (folder / "m.csv").read_text().replace("p0", "p\u202e0")
    (folder / "m.csv").write_text(text, encoding="utf-8")
    assert cli.main(["data", "check", str(folder / "m.csv"), *GRID]) == 0
    captured = capsys.readouterr()
    assert "\u202e" not in captured.out + captured.err


def test_json_has_what_the_table_has(folder, capsys):
    nib.save(nib.Nifti1Image(np.ones((50, 50, 50), np.int16), np.diag([2.0, 2, 2, 1])), folder / "s1_T1w.nii.gz")
    assert cli.main(["data", "check", str(folder / "m.csv"), *GRID, "--json", "--threads", "2"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert [scan["refused"] for scan in report["scans"]] == [False, True, False]
    assert report["scans"][0]["shape"] == [50, 50, 50]
    assert report["scans"][1]["findings"][0]["severity"] == "error"
    assert "every voxel is 1" in report["scans"][1]["findings"][0]["message"]
    assert report["classes"][0] == {"class": 1, "name": "Cerebral-White-Matter", "share": 1.0, "scans": 2}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.csv"], "none.csv: cannot be read"),
        (["m.csv", "--label-map", "ninety"], "ninety: no such label map"),
        (["m.csv", "--grid-size", "0"], "grid"),
        (["m.csv", "--gird-size", "64"], "no option --gird-size"),
    ],
)
def test_bad_arguments_are_one_line(folder, monkeypatch, capsys, words, message):
    monkeypatch.chdir(folder)
    assert cli.main(["data", "check", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1
