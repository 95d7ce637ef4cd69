"""The cycle on an imported network runs to its table, on tiny heads with a tiny network."""

import pytest
import torch

from benchmarks import cycle, imported_cycle
from dwc.base.tables import read_table
from dwc.data.grid import Grid
from dwc.data.intensity import IN_HEADERS
from dwc.data.labels import LabelMap
from dwc.meshnet import MeshNet
from dwc.posterior import Posterior

pytestmark = pytest.mark.usefixtures("one_thread")
pytest_plugins = ["tests.tiny_runs"]


def test_every_network_of_the_cycle_is_scored_at_every_site_and_a_second_call_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(imported_cycle, "GRID", Grid(32, 6.0))
    monkeypatch.setattr(imported_cycle, "N_TRAIN", 1)
    monkeypatch.setattr(imported_cycle, "STEPS", {"vi": 1, "vcl": 1, "finetune": 1})
    fifty = LabelMap.load("fifty")
    torch.manual_seed(0)
    network = MeshNet(50, 2, [1], activation="elu", bayesian=False)
    Posterior.from_model(
        network, architecture=network.architecture, label_map={"name": "fifty", "sha256": fifty.sha256}, n_volumes=0,
        preprocessing={"grid_size": 32, "voxel_size": 6.0, "sub_volume": 32, "intensity": IN_HEADERS["quantile"]},
    ).save(tmp_path / "net.safetensors")  # fmt: skip
    words = ["--network", str(tmp_path / "net.safetensors"), "--out", str(tmp_path / "out")]
    imported_cycle.main(words)
    text = (tmp_path / "out" / "table.csv").read_text()
    table = read_table(tmp_path / "out" / "table.csv")
    assert len(table) == 9 * 5
    assert set(table["site"]) == {"H", "N", "B", "W", "A"}
    assert {"imported", "H", "average of the sites", "DWC", "ensemble of the sites"} < set(table["network"])
    assert table[["mean", "white", "cortex"]].notna().all(axis=None)
    assert (tmp_path / "out" / "A.png").exists()
    monkeypatch.setattr(cycle.dwc, "predict", lambda *_: pytest.fail("predicted again"))
    imported_cycle.main(words)
    assert (tmp_path / "out" / "table.csv").read_text() == text
