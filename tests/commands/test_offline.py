"""Every command runs without a network: connections other than to loopback fail, and none is even attempted."""

import subprocess
import sys
from pathlib import Path

import pytest

from dwc.cli import COMMANDS
from dwc.posterior import Posterior
from dwc.signing import sign
from tests.made_keys import write_keys
from tests.made_models import layers_of, write

pytest_plugins = ["tests.tiny_runs"]
pytestmark = pytest.mark.usefixtures("one_thread", "offline")

COVERED_ELSEWHERE = {  # by tests with the same guard
    "federated",  # tests/federated/test_federated_simulation.py
    "experiment", "demo",  # tests/study/test_paper.py and tests/study/test_demo.py
}  # fmt: skip


STEPS = [
    "consolidate --state",
    "posterior sign",
    "posterior verify",
    "posterior audit",
    "federated init",
]  # beside those that `words` gives each command


@pytest.fixture
def words(networks, settings, tmp_path) -> dict[str, list[str]]:
    """The arguments of each command, for the tiny site."""
    data, prior, out = str(settings.data), networks["vi"].name, str(tmp_path / "out")
    scan = str(next(Path(data).parent.glob("*_T1w.nii.gz")))
    train = ["--data", data, "--out", out, "--label-map", "coarse", "--grid-size", "32", "--width", "2"]
    sites = [networks["a"].name, networks["b"].name]
    project = tmp_path / "project.yml"
    project.write_text(f"{{name: brains, server: localhost, sites: [a, b], prior: {prior}}}")
    two_of_each = Path(data).with_name("two_of_each.csv")
    two_of_each.write_text(Path(data).read_text().replace("2,train", "2,test"))
    signed = tmp_path / "signed.safetensors"
    sign(Posterior.load(sites[0]), write_keys(tmp_path, "a")).save(signed)
    published = str(write(tmp_path / "model", layers_of("relu")))
    return {
        "data": ["check", data],
        "import": [published, "--label-map", "coarse", "--out", str(tmp_path / "i.safetensors")],
        "train": [*train, "--dilations", "[1]", "--epochs", "1", "--steps-per-epoch", "1", "--device", "cpu"],
        "consolidate": [*sites, "--prior", prior, "--out", str(tmp_path / "c.safetensors")],
        "posterior": ["inspect", sites[0], "--prior", prior],
        "consolidate --state": [
            str(tmp_path / "f.safetensors"),
            sites[0],
            "--prior",
            prior,
            "--out",
            out + ".safetensors",
        ],
        "posterior sign": [sites[0], "--key", str(tmp_path / "a.key"), "--out", out + ".safetensors"],
        "posterior audit": [sites[0], "--data", str(two_of_each), "--sub-volumes", "2", "--device", "cpu"],
        "posterior verify": [str(signed), "--trusted", str(tmp_path / "trusted")],
        "federated init": [str(project), "--out", out],
        "predict": ["--network", prior, "--n-samples", "1", "--out", out, scan],
        "export": [prior, "--format", "bundle", "--out", out],
        "report": [out],  # of what predict wrote
        "simulate": ["H", "--out", out, "--n-train", "1", "--n-test", "1", "--grid-size", "32", "--voxel-size", "6"],
        "evaluate": ["--network", prior, "--n-samples", "1", "--data", data, "--out", out],
    }


@pytest.mark.parametrize("command", [*sorted(COMMANDS.keys() - COVERED_ELSEWHERE), *STEPS])
def test_a_command_needs_no_network(words, command):
    for step in ["predict", command] if command == "report" else [command]:
        run = [sys.executable, "-m", "dwc.cli", *step.split(), *words[step]]
        ended = subprocess.run(run, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr


def test_what_an_organizer_types_needs_no_network(words, tmp_path):
    """init, then what reads or changes the books; serve, join and round are in tests/federated, on loopback."""
    kit = tmp_path / "out" / "brains" / "prod_00" / "localhost"
    init, project = words["federated init"], words["federated init"][0]
    for step in (["init", *init], ["status", kit], ["amend", kit, project], ["prune", kit]):
        run = [sys.executable, "-m", "dwc.cli", "federated", *map(str, step)]
        ended = subprocess.run(run, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
