"""Networks are trained once per key, and an interrupted study resumes."""

import shutil
from dataclasses import replace

import pytest
import torch

from dwc.base.errors import Interrupted
from dwc.data.augmentation import Augmentation
from dwc.posterior import Posterior
from dwc.study import networks as module
from dwc.study.context import Study
from dwc.study.graph import (
    average,
    consolidated,
    control_network,
    finetuned,
    map_network,
    untrained,
    variational,
    vcl,
    with_parents,
)
from dwc.study.networks import Networks
from dwc.study.settings import Stage, StudySettings
from dwc.study.sites import begin
from dwc.training.loop import _Run
from tests.study.tiny_study import tiny_settings

pytest_plugins = ["tests.tiny_runs"]
pytestmark = pytest.mark.usefixtures("one_thread")

ORIGIN = variational("H")
SITES = [vcl(ORIGIN, site) for site in "NBW"]
JOINT = consolidated(ORIGIN, SITES)
DWC = finetuned(JOINT, "H")
KEYS = {  # of `tiny_settings`, each site's name for the digest of its scans
    "H MAP": "ec35b9a441fb", "H": "a9f60313635c", "H->N": "158a672d866e", "H->B": "a1074664a290",
    "H->W": "b3cdafad47b4", "H->N+B+W": "bb31689888a6", "H->N+B+W->H": "c06741218596",
}  # fmt: skip


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> StudySettings:
    """Networks of two steps."""
    return tiny_settings(out=tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def study(settings) -> Study:
    study = Study(settings)
    begin(study)
    return study


@pytest.fixture(scope="module")
def trained(study) -> Networks:
    store = Networks(study)
    store.get(DWC)
    return store


def test_a_network_comes_after_all_that_it_starts_from():
    order = [network.name for network in with_parents([DWC, map_network("N")])]
    assert order == ["H MAP", "H", "H->N", "H->B", "H->W", "H->N+B+W", "H->N+B+W->H", "N MAP"]


def test_another_setting_changes_only_the_networks_that_depend_on_it(settings, study):
    ours, theirs = Networks(study), Networks(Study(replace(settings, vcl=Stage(steps=3))))
    same = {network.name for network in with_parents([DWC]) if ours.key(network) == theirs.key(network)}
    assert same == {"H MAP", "H"}


def test_the_cubes_change_all_networks(settings, study):
    for cubes in ({"cubes": "paper"}, {"margin": 3}, {"augmentation": Augmentation(gamma=0.1)}):
        assert Networks(study).key(map_network("H")) != Networks(Study(replace(settings, **cubes))).key(
            map_network("H")
        )


def test_other_scans_change_the_networks_of_their_site_alone(settings, study):
    moved = Study(settings)
    moved.manifests["N"] = study.manifests["B"]
    ours, theirs = Networks(study), Networks(moved)
    other = {network.name for network in with_parents([DWC]) if ours.key(network) != theirs.key(network)}
    assert other == {"H->N", "H->N+B+W", "H->N+B+W->H"}


def test_where_a_study_lies_and_computes_does_not_change_its_networks(settings, study, tmp_path):
    elsewhere = Study(replace(settings, out=tmp_path, workers=3, device="auto"))
    elsewhere.manifests = study.manifests
    assert Networks(study).key(DWC) == Networks(elsewhere).key(DWC)


def test_networks_trained_by_earlier_versions_on_the_papers_cubes_are_found_again(settings, monkeypatch):
    monkeypatch.setattr(Study, "digest", lambda self, site: site)
    study = Study(replace(settings, cubes="paper"))
    assert {network.name: Networks(study).key(network)[:12] for network in with_parents([DWC])} == KEYS


def test_another_kind_of_device_gives_other_networks(settings, study):
    on_gpu = Study(settings)
    on_gpu.device = torch.device("cuda")
    assert Networks(on_gpu).key(DWC) != Networks(study).key(DWC)


def test_a_control_takes_the_steps_of_vcl_and_is_not_the_map_network(settings, study):
    networks = Networks(Study(replace(settings, vcl=Stage(steps=3))))
    control = control_network("N")
    assert networks.key(control) != networks.key(map_network("N"))
    networks.get(control)
    assert networks.steps(control) == 3
    assert not Posterior.load(networks.file(control)).is_bayesian


def test_steps_behind_a_network_count_each_that_it_starts_from_once(trained):
    assert trained.steps(DWC) == 2
    assert trained.steps(JOINT) == 0
    assert trained.total_steps([DWC]) == 2 * 6  # H MAP, H, three sites, fine-tuning
    assert trained.total_steps([SITES[0], SITES[1]]) == 2 * 4


def test_a_network_that_is_there_is_not_trained_again(trained, monkeypatch):
    monkeypatch.setattr(module, "train_network", None)
    assert trained.get(DWC).sha256 == Posterior.load(trained.file(DWC)).sha256


def test_the_plain_average_has_the_mean_of_the_sites_means_and_no_deviations(trained):
    posterior = trained.get(average(ORIGIN, SITES))
    sites = [trained.get(site) for site in SITES]
    assert not posterior.is_bayesian
    for name, mu in posterior.mu.items():
        torch.testing.assert_close(mu, torch.stack([site.mu[name] for site in sites]).mean(dim=0))
    assert posterior.metadata["n_volumes"] == 3


def test_the_weights_of_a_consolidation_name_the_networks(trained):
    lines = (trained.folder(JOINT) / "weights.csv").read_text().splitlines()
    assert {line.split(",")[0] for line in lines[1:]} == {"H->N", "H->B", "H->W"}


def test_an_untrained_network_has_the_architecture_and_not_the_weights(trained):
    network, like = trained.get(untrained(map_network("H"))), trained.get(map_network("H"))
    assert network.metadata["architecture"] == like.metadata["architecture"]
    assert any((network.mu[name] != like.mu[name]).any() for name in like.mu)


def test_the_pooled_network_trains_on_the_scans_of_all_training_sites(trained):
    assert trained.get(map_network("HNBW")).metadata["n_volumes"] == 4


def test_a_study_stopped_in_a_network_resumes_there_and_ends_with_the_same_bits(settings, study, monkeypatch):
    slower = replace(settings, map=Stage(steps=4, epochs=2))  # another key than the other tests' network
    network = map_network("B")
    whole = Networks(Study(slower))
    digest = whole.get(network).sha256
    shutil.rmtree(whole.folder(network))
    save = _Run._save

    def stop_after_an_epoch(run, *arguments):
        save(run, *arguments)
        raise Interrupted(15, "stopped by SIGTERM after step 1 of 2", "resume with: dwc train")

    with monkeypatch.context() as patch:
        patch.setattr(_Run, "_save", stop_after_an_epoch)
        with pytest.raises(Interrupted, match="the same command continues"):
            whole.get(network)
    assert whole.steps(network) == 2
    assert not whole.is_done(network)
    assert whole.get(network).sha256 == digest
    assert whole.steps(network) == 4
