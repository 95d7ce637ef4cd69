"""The recipe of a network for the package runs its whole cycle, and goes on where it stopped."""

import pytest

from benchmarks import cycle, packaged_network
from dwc.base.tables import read_table
from dwc.data.grid import Grid
from dwc.posterior import Posterior

pytestmark = pytest.mark.usefixtures("one_thread")
pytest_plugins = ["tests.tiny_runs"]


def test_the_cycle_is_trained_from_coarse_to_fine_and_scored_and_a_second_call_trains_nothing(tmp_path, monkeypatch):
    coarse, fine, whole = Grid(32, 8.0), Grid(32, 6.0), Grid(64, 6.0)
    monkeypatch.setattr(packaged_network, "FINE", fine)
    monkeypatch.setattr(packaged_network, "WHOLE", whole)
    monkeypatch.setattr(packaged_network, "MAP_STAGES", ((coarse, 4, 1e-2, 0), (fine, 4, 1e-2, 2)))
    monkeypatch.setattr(packaged_network, "STEPS", {"vi": 4, "vcl": 4, "finetune": 4})
    monkeypatch.setattr(packaged_network, "N_TRAIN", 1)
    monkeypatch.setitem(packaged_network.NETWORK, "width", 2)
    monkeypatch.setitem(packaged_network.NETWORK, "dilations", [1])
    monkeypatch.setitem(packaged_network.BAYESIAN, "margin", 0)
    packaged_network.main(["--out", str(tmp_path)])
    files = [tmp_path / "runs" / name / "posterior.safetensors" for name in ("H_MAP_1", "H_MAP_2", "DWC")]
    trained, scored = files[-1], tmp_path / "DWC_whole.safetensors"
    grids = [Posterior.load(file).metadata["preprocessing"] for file in (*files, scored)]
    assert [(grid["grid_size"], grid["voxel_size"]) for grid in grids] == [(32, 8.0), (32, 6.0), (32, 6.0), (64, 6.0)]
    before, after = Posterior.load(trained), Posterior.load(scored)
    assert all(before.mu[name].equal(after.mu[name]) for name in before.mu)
    assert all(before.sigma[name].equal(after.sigma[name]) for name in before.sigma)
    table = read_table(tmp_path / "table.csv")
    assert list(dict.fromkeys(table["network"])) == ["H MAP", "H", "DWC without fine-tuning", "DWC"]
    assert set(table["site"]) == {"H", "N", "B", "W"}
    monkeypatch.setattr(cycle, "train_network", lambda *_, **__: pytest.fail("trained again"))
    packaged_network.main(["--out", str(tmp_path)])
    assert read_table(tmp_path / "table.csv").equals(table)
