"""The recipe of a network for the package runs its whole cycle, and goes on where it stopped."""

import pytest

from benchmarks import cycle, packaged_network
from dwc.base.tables import read_table
from dwc.data.grid import Grid
from dwc.posterior import Posterior

pytestmark = pytest.mark.usefixtures("one_thread")
pytest_plugins = ["tests.tiny_runs"]


def test_the_cycle_is_trained_from_coarse_to_fine_and_scored_and_a_second_call_trains_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(packaged_network, "GRIDS", (Grid(32, 8.0), Grid(64, 4.0)))
    monkeypatch.setattr(packaged_network, "MAP_STEPS", (4, 4))
    monkeypatch.setattr(packaged_network, "MAP_RATES", (1e-2, 1e-2))
    monkeypatch.setattr(packaged_network, "STEPS", {"vi": 4, "vcl": 4, "finetune": 4})
    monkeypatch.setattr(packaged_network, "N_TRAIN", 1)
    monkeypatch.setitem(packaged_network.NETWORK, "width", 2)
    monkeypatch.setitem(packaged_network.NETWORK, "dilations", [1])
    packaged_network.main(["--out", str(tmp_path)])
    networks = [
        Posterior.load(tmp_path / "runs" / name / "posterior.safetensors") for name in ("H_MAP_32", "H_MAP_64", "DWC")
    ]
    assert [network.metadata["preprocessing"]["voxel_size"] for network in networks] == [8.0, 4.0, 4.0]
    table = read_table(tmp_path / "table.csv")
    assert list(dict.fromkeys(table["network"])) == ["H MAP", "H", "DWC without fine-tuning", "DWC"]
    assert set(table["site"]) == {"H", "N", "B", "W"}
    monkeypatch.setattr(cycle, "train_network", lambda *_, **__: pytest.fail("trained again"))
    packaged_network.main(["--out", str(tmp_path)])
    assert read_table(tmp_path / "table.csv").equals(table)
