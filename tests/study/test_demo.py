"""`dwc demo` runs the whole cycle, resumes, and refuses another demo's folder."""

import socket
from pathlib import Path

import pandas as pd
import pytest
import yaml

from dwc.cli import main

TINY = [
    *("--width", "2", "--n_test", "1", "--n_samples", "1", "--grid_size", "32", "--voxel_size", "6.0"),
    *("--n_train", '{"H": 2, "N": 1, "B": 1, "W": 1}'),
    *(part for stage in ("map", "vi", "vcl", "finetune") for part in (f"--{stage}.steps", "2")),
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory, offline_here):
    out = tmp_path_factory.mktemp("demo") / "out"
    assert main(["demo", "--out", str(out), *TINY]) == 0
    return out


def test_the_demo_needs_no_network(demo, offline_here):
    assert not offline_here.exists()
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("192.0.2.1", 80)):
        pass
    assert "192.0.2.1" in offline_here.read_text()  # the guard does guard
    offline_here.unlink()


def test_another_preset_is_chosen_by_name_and_the_folder_stays(monkeypatch):
    seen = []
    monkeypatch.setattr("dwc.study.demo.run", seen.append)
    assert main(["demo", "--preset", "smoke"]) == main(["demo"]) == 0
    smoke, demo = seen
    assert (smoke.grid_size, smoke.width, demo.grid_size, demo.width) == (32, 4, 64, 12)
    assert smoke.out == demo.out == Path("demo").absolute()


def test_every_network_is_scored_at_every_site(demo):
    table = pd.read_csv(demo / "table.csv", index_col="network")
    assert list(table.columns) == ["H", "N", "B", "W", "Avg.", "A"]
    assert len(table) == 12
    assert table.notna().all(axis=None)
    assert table.stack().between(0, 1).all()


def test_the_weight_of_each_site_in_each_layer_is_kept(demo):
    weights = pd.read_csv(demo / "consolidation.csv")
    assert set(weights["site"]) == {"H_N", "H_B", "H_W"}
    assert len(weights) == 3 * 2 * 5  # sites, weight and bias, layers
    assert weights["sigma_ratio"].between(0, 1).all()


def test_it_leaves_picture_networks_and_settings(demo):
    assert (demo / "segmentation.png").stat().st_size > 10_000
    assert len(list((demo / "networks").glob("*/posterior.safetensors"))) == 11
    assert yaml.safe_load((demo / "config.yaml").read_text())["map"]["steps"] == 2


def test_called_again_it_resumes_and_gives_the_same_table(demo):
    table = (demo / "table.csv").read_bytes()
    (demo / "table.csv").unlink()
    (last,) = (demo / "networks").glob("H_NBW_H-*")
    for file in ("posterior.safetensors", "checkpoint.safetensors"):
        (last / file).unlink()
    (site,) = (demo / "networks").glob("H_N-*")
    kept = (site / "checkpoint.safetensors").stat().st_mtime_ns
    assert main(["demo", "--out", str(demo), *TINY]) == 0
    assert (demo / "table.csv").read_bytes() == table
    assert (site / "checkpoint.safetensors").stat().st_mtime_ns == kept


def test_another_demo_is_refused_in_the_same_folder(demo, capsys):
    assert main(["demo", "--config", str(demo / "config.yaml"), "--out", str(demo), "--seed", "1"]) == 2
    assert "other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid_size", "33"], "multiple of 32"),
        (["--n_test", "0"], "positive"),
        (["--n_train", '{"H": 1}'], "each of H, N, B and W"),
        (["--map.steps", "many"], "steps"),
        (["--vcl.steps", "0"], "--vcl.steps 0"),
        (["--finetune.lr", "-1"], "-1"),
        (["--label_map", "nope"], "nope"),
    ],
)
def test_bad_settings_are_named(tmp_path, arguments, message, capsys):
    assert main(["demo", "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
