"""The recipe of a network for the package runs its whole cycle, and goes on where it stopped."""

import pytest

from benchmarks import cycle, packaged_network
from dwc.base.tables import read_table
from dwc.data.grid import Grid

pytestmark = pytest.mark.usefixtures("one_thread")
pytest_plugins = ["tests.tiny_runs"]


def test_the_cycle_is_trained_and_scored_and_a_second_call_trains_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(packaged_network, "GRID", Grid(32, 6.0))
    monkeypatch.setattr(packaged_network, "N_TRAIN", 1)
    monkeypatch.setattr(packaged_network, "STEPS", dict.fromkeys(packaged_network.STEPS, packaged_network.EPOCHS))
    words = ["--out", str(tmp_path), "--width", "2", "--dilations", "1", "--batch-size", "1"]
    packaged_network.main(words)
    table = read_table(tmp_path / "table.csv")
    assert list(dict.fromkeys(table["network"])) == ["H MAP", "H", "DWC without fine-tuning", "DWC"]
    assert set(table["site"]) == {"H", "N", "B", "W"}
    monkeypatch.setattr(cycle, "train_network", lambda *_, **__: pytest.fail("trained again"))
    packaged_network.main(words)
    assert read_table(tmp_path / "table.csv").equals(table)
