"""`dwc simulate` as a person types it."""

import pytest

from dwc import cli
from dwc.data.manifest import read_manifest


def test_a_simulated_site_has_scans_labels_and_a_split(tmp_path, capsys):
    words = ["simulate", "N", "--out", str(tmp_path / "N"), "--n-train", "2", "--n-test", "1"]
    assert cli.main([*words, "--grid-size", "32", "--voxel-size", "6"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'N' / 'manifest.csv'}  (2 scans to train on, 1 held out)\n"
    scans = read_manifest(tmp_path / "N" / "manifest.csv")
    assert [scan.split for scan in scans] == ["train", "train", "test"]
    assert all(scan.image.is_file() and scan.label.is_file() for scan in scans)
    assert cli.main(words) == 2
    assert "manifest.csv: exists already; give another --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["Q"], "site 'Q' is not simulated; choose one of H, N, B, W, A"),
        (["H", "--n-train", "-1"], "site H: -1 + 2 scans"),
        (["H", "--grid-size", "0"], "a grid of size 0"),
        (["H", "--anatomies", "nowhere"], "nowhere"),
        (["H", "--seed", "x"], "--seed x"),
        (["H", "--n-trian", "3"], "no option --n-trian; did you mean --n-train?"),
    ],
)
def test_bad_input_of_simulate_is_one_line_and_writes_nothing(flags, line, tmp_path, capsys):
    assert cli.main(["simulate", *flags, "--out", str(tmp_path / "site")]) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
    assert not (tmp_path / "site").exists()


def test_scans_of_random_contrasts_are_of_the_same_people_at_another_scanner(tmp_path):
    images = []
    for out, flags in (("plain", []), ("random", ["--random-contrasts"])):
        words = ["simulate", "N", "--out", str(tmp_path / out), "--n-train", "1", "--n-test", "0", *flags]
        assert cli.main([*words, "--grid-size", "32", "--voxel-size", "6"]) == 0
        images.append((tmp_path / out / "N-000_T1w.nii.gz").read_bytes())
    plain, random = (read_manifest(tmp_path / out / "manifest.csv") for out in ("plain", "random"))
    assert [scan.subject for scan in plain] == [scan.subject for scan in random]
    assert images[0] != images[1]
