"""Networks that others published, from their folder to the segmentation of a real scan; skipped without the data."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from dwc.data.labels import LabelMap, read_tsv

FIFTY = LabelMap.load("fifty")


def dwc(*words: object) -> str:
    """Run `dwc` as a user types it, on one thread; returns what it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dwc.cli", *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def white_and_grey(path: Path) -> Path:
    """A label map of white matter and grey matter, in which ventricles and CSF are background."""
    rows = read_tsv(Path(__file__).parents[1] / "dwc" / "data" / "fifty_classes.tsv")
    kind = {"0": 0, "2": 0, "12": 0, "1": 1, "3": 1, "15": 1}
    names = ("Background", "White", "Grey")
    lines = ["index\tclass\tname"]
    for row in rows:
        k = kind.get(row["class"], 2)
        lines.append(f"{row['index']}\t{k}\t{names[k]}")
    path.write_text("\n".join(lines) + "\n")
    return path


def overlap(predicted: np.ndarray, truth: np.ndarray) -> float:
    return 2 * np.count_nonzero(predicted & truth) / (np.count_nonzero(predicted) + np.count_nonzero(truth))


@pytest.fixture
def segmented(shared_data, tmp_path):
    """segmented(model, label map): the real scan's predicted and true label ids, with what import printed."""
    networks, real = shared_data / "networks", shared_data / "real"
    if not networks.is_dir():
        pytest.skip(f"the folder with published networks is absent ({networks})")

    def segmented(model: str, label_map: str | Path) -> tuple[np.ndarray, np.ndarray, str]:
        network = tmp_path / "net.safetensors"
        said = dwc("import", networks / model, "--label-map", label_map, "--out", network)
        options = [] if label_map == "fifty" else ["--label-map", label_map]
        dwc("predict", "--network", network, real / "S1_T1w.nii.gz", "--out", tmp_path, "--device", "cpu", *options)
        files = tmp_path / "S1_dseg.nii.gz", real / "S1_aparc+aseg.nii.gz"
        predicted, truth = (np.asarray(nibabel.load(file).dataobj).astype(np.int32) for file in files)
        return predicted, truth, said

    return segmented


def test_a_published_network_of_three_classes_finds_white_and_grey_matter(segmented, tmp_path):
    table = white_and_grey(tmp_path / "three.tsv")
    predicted, truth, said = segmented("model5_gw_ae", table)
    assert "3 classes, 5 filters, dilations 1 2 4 8 16 8 4 2 1, relu; intensity min-max per volume" in said
    three = LabelMap.load(table)
    classes, true_classes = three.apply(predicted), three.apply(truth)
    white, grey = (overlap(classes == k, true_classes == k) for k in (1, 2))
    assert (white > 0.85, grey > 0.80) == (True, True), (white, grey)


@pytest.mark.published
def test_the_published_network_of_fifty_classes_finds_white_matter_and_cortex_in_4_gb(segmented):
    predicted, truth, said = segmented("model30chan50cls", "fifty")
    assert "50 classes, 30 filters, dilations 1 2 4 8 16 8 4 2 1, elu; intensity quantiles 0.05 to 0.95" in said
    classes, true_classes = FIFTY.apply(predicted), FIFTY.apply(truth)
    white = overlap(np.isin(classes, (1, 15)), np.isin(true_classes, (1, 15)))
    cortex = overlap(classes >= 16, true_classes >= 16)
    assert (white >= 0.93, cortex >= 0.88) == (True, True), (white, cortex)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 4e6  # KB
