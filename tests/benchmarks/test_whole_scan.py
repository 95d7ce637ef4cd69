"""The benchmark of whole scans runs `dwc predict` itself and goes on where it stopped."""

import numpy as np
import pandas as pd
import pytest

from benchmarks import whole_scan


@pytest.fixture
def small(monkeypatch):
    """Networks of a grid that a test can predict on."""
    monkeypatch.setattr(whole_scan, "PREPROCESSING", {**whole_scan.PREPROCESSING, "grid_size": 32})


def test_a_prediction_is_one_process_whose_cost_is_a_row(small, save, tmp_path):
    scan = save("scan_T1w.nii.gz", np.random.default_rng(0).integers(30, 200, (32, 32, 32), np.uint8), np.eye(4))
    whole_scan.main([str(scan), "--out", str(tmp_path / "out"), "--widths", "2", "--kinds", "bayesian"])
    (row,) = pd.read_csv(tmp_path / "out" / "whole_scan.csv").to_dict("records")
    assert (row["network"], row["width"], row["limit_gb"], row["n_samples"]) == ("bayesian", 2, "default", 1)
    assert row["cpu_s"] > 0
    assert row["peak_mb"] > 100


def test_a_second_call_predicts_only_what_is_missing(small, tmp_path, monkeypatch):
    predicted = []
    monkeypatch.setattr(whole_scan, "_predict", lambda *arguments: predicted.append(arguments[2]) or {"cpu_s": 1.0})
    for limits in (["1", "2.5"], ["1", "2.5", "4"]):
        arguments = ["scan.nii.gz", "--out", str(tmp_path), "--widths", "2", "--kinds", "map", "--limits", *limits]
        whole_scan.main(arguments)
    assert predicted == ["1", "2.5", "4"]


def test_a_prediction_that_fails_ends_the_command_with_its_reason(small, tmp_path, capfd):
    with pytest.raises(SystemExit, match="failed"):
        whole_scan.main([str(tmp_path / "none.nii.gz"), "--out", str(tmp_path), "--widths", "2", "--kinds", "map"])
    assert "none.nii.gz" in capfd.readouterr().err
