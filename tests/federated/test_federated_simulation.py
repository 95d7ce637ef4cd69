import json
import os
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from dwc import cli
from dwc.federated import local  # noqa: F401 (before Popen is replaced)
from dwc.federated.capacity import capacity_table
from dwc.posterior import Posterior

pytestmark = pytest.mark.usefixtures("offline")


def test_three_sites_and_two_rounds_in_the_simulator_give_what_consolidate_gives_by_hand(tmp_path, monkeypatch):
    environments, popen = [], subprocess.Popen
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: environments.append(k.get("env")) or popen(*a, **k))
    out = tmp_path / "simulation"
    words = ["--sites", "3", "--rounds", "2", "--steps", "2", "--width", "2", "--dilations", "[1]", "--n_train", "1"]
    words += ["--method", "dwc", "--temper", "0.5", "--plan_sites", "[]", "--limit_s", "300", "--out", str(out)]
    assert cli.main(["federated", "simulate", *words]) == 0
    assert int(environments[0]["OMP_NUM_THREADS"]) == max(1, os.cpu_count() // 3)  # sites share the cores
    server = out / "books" / "server"
    state = json.loads((server / "state.json").read_text())
    table = pd.read_csv(out / "rounds.csv", index_col="network")
    traffic = pd.read_csv(out / "traffic.csv", index_col=["round", "site"])
    scans = []
    for number in (1, 2):
        rows = [row for row in state["posteriors"] if row["round"] == number]
        assert sorted(row["site"] for row in rows) == ["site-1", "site-2", "site-3"]
        files, prior = [str(server / row["file"]) for row in rows], str(server / f"q{number - 1}.safetensors")
        by_hand = tmp_path / f"by_hand-{number}.safetensors"
        assert cli.main(["consolidate", *files, "--prior", prior, "--temper", "0.5", "--out", str(by_hand)]) == 0
        assert Posterior.load(by_hand).sha256 == Posterior.load(server / f"q{number}.safetensors").sha256
        assert table.loc[f"q{number}", "posteriors"] == 3
        assert 0 <= table.loc[f"q{number}", "dice"] <= 1
        assert table.loc[f"q{number}", "bytes_from_a_site"] == traffic.loc[number, "bytes_from_a_site"].max()
        for row in rows:
            assert row["bytes"] < traffic.loc[(number, row["site"]), "bytes_from_a_site"] < row["bytes"] + 10**6
            assert Path(prior).stat().st_size < traffic.loc[(number, row["site"]), "bytes_to_a_site"]
        for path in out.glob(f"books/site-*/round-{number}-*/scans.json"):
            scans += json.loads(path.read_text())["scans"]
    assert len({*scans}) == len(scans) == 6  # each site and round has its own


def test_rounds_on_the_same_scans_in_the_simulator_give_what_consolidate_with_a_state_gives_by_hand(tmp_path):
    out, server = tmp_path / "simulation", tmp_path / "simulation" / "books" / "server"
    words = ["--sites", "2", "--rounds", "2", "--steps", "2", "--width", "2", "--dilations", "[1]", "--n_train", "1"]
    assert cli.main(["federated", "simulate", *words, "--plan_sites", "[]", "--limit_s", "300", "--out", str(out)]) == 0
    state = json.loads((server / "state.json").read_text())
    by_hand, q0 = tmp_path / "by_hand.safetensors", str(server / "q0.safetensors")
    for number in (1, 2):
        files = [str(server / f"round-{number}" / f"site-{site}.safetensors") for site in (1, 2)]
        words = ["--state", str(tmp_path / "state.safetensors"), "--damping", "0.5", "--out", str(by_hand)]
        assert cli.main(["consolidate", *files, "--prior", q0, *words]) == 0
        assert Posterior.load(by_hand).sha256 == state["priors"][number]
    assert state["refused"] == []
    starts = list(out.glob("books/site-*/round-2-*/start.safetensors"))
    trained = [
        Posterior.load(start.parent / "run" / "posterior.safetensors").metadata["training"]["init_sha256"]
        for start in starts
    ]
    assert sorted(trained) == sorted(state["networks"][1]["starts"].values())
    scans = [json.loads(path.read_text())["scans"] for path in out.glob("books/site-1/round-*/scans.json")]
    assert scans[0] == scans[1]


def test_the_plan_says_what_is_measured_and_what_is_not():
    table = capacity_table([2, 9, 100], n_classes=3, width=2, link_mbit_s=8.0)
    assert list(table["basis"]) == ["measured", "extrapolated from 2", "extrapolated from 2"]
    assert table.loc[100, "link_s"] == pytest.approx(100 * 2 * table.loc[2, "payload_mb"])
    assert table.loc[100, "answer_timeout_s"] == pytest.approx(table.loc[100, "link_s"] / 2)
    assert table.loc[100, "memory_mb"] == table.loc[2, "memory_mb"]  # sites stream through
    assert table.loc[100, "consolidation_s"] == pytest.approx(50 * table.loc[2, "consolidation_s"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sites", "0"], "--sites 0: give a positive number"),
        (["--temper", "0"], "--temper 0.0: give a positive number"),
        (["--temper", "0.5"], "--temper 0.5: is for --method dwc; use --damping"),
        (["--damping", "1.5"], "--damping 1.5: give a number above 0 and at most 1"),
        (["--method", "dwc", "--damping", "0.5"], "--damping 0.5: is for --method pvi"),
        (["--grid_size", "33"], "--grid-size 33: give a multiple of 32"),
        (["--plan_sites", "[0]"], "--plan-sites [0]"),
    ],
)
def test_a_simulation_that_cannot_be_meant_is_refused_before_it_begins(words, message, tmp_path, capsys):
    assert cli.main(["federated", "simulate", *words, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
