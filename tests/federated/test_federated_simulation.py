import json

import pandas as pd
import pytest

from dwc import cli
from dwc.federated.planning import plan
from dwc.posterior import Posterior

pytestmark = pytest.mark.usefixtures("offline")


def test_three_sites_and_one_round_in_the_simulator_give_what_consolidate_gives_by_hand(tmp_path):
    out = tmp_path / "simulation"
    words = ["--sites", "3", "--rounds", "1", "--steps", "2", "--width", "2", "--dilations", "[1]", "--n_train", "1"]
    words += ["--plan_sites", "[]", "--limit_s", "300", "--out", str(out)]
    assert cli.main(["federated", "simulate", *words]) == 0
    server = out / "books" / "server"
    state = json.loads((server / "state.json").read_text())
    assert [row["site"] for row in sorted(state["posteriors"], key=lambda row: row["site"])] == [
        "site-1", "site-2", "site-3",
    ]  # fmt: skip
    files = [str(server / row["file"]) for row in state["posteriors"]]
    by_hand = tmp_path / "by_hand.safetensors"
    assert cli.main(["consolidate", *files, "--prior", str(server / "q0.safetensors"), "--out", str(by_hand)]) == 0
    assert Posterior.load(by_hand).sha256 == Posterior.load(server / "q1.safetensors").sha256
    table = pd.read_csv(out / "rounds.csv", index_col="network")
    assert table.loc["q1", "posteriors"] == 3
    assert table.loc["q1", "bytes_from_a_site"] == max(row["bytes"] for row in state["posteriors"])
    assert 0 <= table.loc["q1", "dice"] <= 1


def test_the_plan_says_what_is_measured_and_what_is_not():
    table = plan([2, 9, 100], n_classes=3, width=2, link_mbit_s=8.0)
    assert list(table["basis"]) == ["measured", "extrapolated from 2", "extrapolated from 2"]
    assert table.loc[100, "link_s"] == pytest.approx(100 * 2 * table.loc[2, "payload_mb"])
    assert table.loc[100, "memory_mb"] == table.loc[2, "memory_mb"]  # sites stream through
    assert table.loc[100, "consolidation_s"] == pytest.approx(50 * table.loc[2, "consolidation_s"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sites", "0"], "--sites 0: give a positive number"),
        (["--grid_size", "33"], "--grid_size 33: give a multiple of 32"),
        (["--plan_sites", "[0]"], "--plan_sites"),
    ],
)
def test_a_simulation_that_cannot_be_meant_is_refused_before_it_begins(words, message, tmp_path, capsys):
    assert cli.main(["federated", "simulate", *words, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
