"""Training with another activation and intensity scheme than the paper's, and from a network that was imported."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dwc import cli
from dwc.data.intensity import IN_HEADERS
from dwc.evaluation import evaluate
from dwc.meshnet import MeshNet
from dwc.posterior import Posterior
from dwc.training.loop import _network, train_network
from dwc.training.specification import resolve

pytestmark = pytest.mark.usefixtures("one_thread")
pytest_plugins = ["tests.tiny_runs"]


@pytest.fixture
def imported(networks, tmp_path) -> Posterior:
    """An ELU network for scans clipped to quantiles, as `dwc import` leaves it, but on the tiny site's grid."""
    torch.manual_seed(3)
    network = MeshNet(9, 4, (1, 2), activation="elu", bayesian=False, weight_norm=False)
    shared = {key: networks["map"].metadata[key] for key in ("label_map", "preprocessing")}
    shared["preprocessing"] = {**shared["preprocessing"], "intensity": IN_HEADERS["quantile"]}
    posterior = Posterior.from_model(network, **shared, provenance={"source": "elsewhere"})
    posterior.save(tmp_path / "imported.safetensors")
    return Posterior.load(tmp_path / "imported.safetensors")


@pytest.fixture
def first(settings, imported, tmp_path):
    """Settings of an organization's first network, which leave all to the imported network's header."""
    return replace(
        settings, mode="vi", init=Path(imported.name), out=tmp_path / "vi", epochs=1, label_map=None, grid_size=None,
        width=None, dilations=None,
    )  # fmt: skip


def test_a_variational_network_starts_as_the_imported_function_and_keeps_its_scheme(first, imported):
    specification, _ = resolve(first)
    started = _network(specification).eval()
    x = torch.randn(1, 1, 9, 9, 9)
    torch.testing.assert_close(started(x), MeshNet.from_posterior(imported)(x), rtol=1e-5, atol=1e-5)
    header = train_network(first).metadata
    for key in ("architecture", "label_map", "preprocessing"):
        assert header[key] == imported.metadata[key]
    assert header["training"]["init_sha256"] == imported.sha256
    assert header["training"]["activation"] == "elu"
    assert header["training"]["intensity"] == "quantile"


def test_the_scheme_reaches_sites_and_scores_through_the_headers_alone(first, settings, tmp_path):
    q0 = train_network(first)
    site = replace(first, mode="vcl", init=None, prior=Path(q0.name), out=tmp_path / "site")
    q1 = train_network(site)
    assert q1.metadata["preprocessing"]["intensity"] == IN_HEADERS["quantile"]
    evaluation = evaluate(q1.name, settings.data)
    z_scores = {**q1.metadata["preprocessing"], "intensity": IN_HEADERS["z_score"]}
    other = evaluate(replace(q1, metadata={**q1.metadata, "preprocessing": z_scores}), settings.data)
    assert not np.array_equal(evaluation.per_class["predicted_mm3"], other.per_class["predicted_mm3"])


def test_activation_and_intensity_are_settings_of_the_command(settings, tmp_path, capsys):
    command = [
        "train", "--mode", "map", "--data", str(settings.data), "--out", str(tmp_path / "run"), "--label-map", "coarse",
        "--grid-size", "32", "--width", "2", "--dilations", "[1]", "--epochs", "1", "--steps-per-epoch", "1",
        "--batch-size", "1", "--device", "cpu", "--activation", "elu", "--intensity", "min_max",
    ]  # fmt: skip
    assert cli.main(command) == 0
    header = Posterior.load(tmp_path / "run" / "posterior.safetensors").metadata
    assert header["architecture"]["activation"] == "elu"
    assert header["preprocessing"]["intensity"] == "min-max per volume"
    assert cli.main([*command[:6], str(tmp_path / "other"), *command[7:-1], "log"]) == 2
    assert "--intensity log: choose one of z_score, min_max, quantile; see" in capsys.readouterr().err


def test_runs_of_the_papers_scheme_keep_the_fingerprint_they_had_before_there_were_others(settings, tmp_path):
    specification, _ = resolve(replace(settings, out=tmp_path / "run"))
    assert not {"activation", "intensity", "stream"} & specification.identity.keys()
    other, _ = resolve(replace(settings, out=tmp_path / "run", activation="elu", intensity="quantile"))
    assert other.identity == {**specification.identity, "activation": "elu", "intensity": "quantile"}
