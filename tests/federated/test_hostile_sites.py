"""What one site sends costs that site alone: files made to break the server, and files made to steer the result."""

import contextlib
import json
import re
import struct

import pytest
import safetensors.torch
import torch

from dwc.base.files import canonical_json, content_sha256
from dwc.federated import exchange as module
from dwc.federated.cycle import Cycle
from dwc.federated.project import Project
from dwc.federated.server_state import describe
from dwc.posterior import Posterior
from tests.federated.test_exchange import Pass
from tests.made_cycles import NOW, file_of
from tests.made_posteriors import a_prior, a_site

HONEST = ("north", "east", "west")


def raw(tensors: dict[str, torch.Tensor], header: str) -> bytes:
    return safetensors.torch.save(tensors, {"dwc": header})


def many_dimensions(site: Posterior, _) -> bytes:
    """A valid file with a tensor of 71 dimensions, which PyTorch cannot hold."""
    entry = {"dtype": "F32", "shape": [1] * 71, "data_offsets": [0, 4]}
    head = json.dumps({"__metadata__": {"dwc": canonical_json(site.metadata)}, "layers.0.bias.mu": entry}).encode()
    return struct.pack("<Q", len(head)) + head + struct.pack("<f", 1.0)


def header(**changes):
    def make(site: Posterior, folder) -> bytes:
        tensors = dict(site._tensors())
        changed = {**site.metadata, **changes}
        metadata = {"dwc": json.dumps(changed)}
        with contextlib.suppress(ValueError):  # a number that JSON cannot spell
            metadata["dwc_sha256"] = content_sha256(tensors, changed)
        return safetensors.torch.save(tensors, metadata)

    return make


def nested(site: Posterior, _) -> bytes:
    text = canonical_json(site.metadata)[:-1] + ',"training":' + '{"a":' * 990 + "1" + "}" * 991
    return raw(dict(site._tensors()), text)


def flipped(site: Posterior, folder) -> bytes:
    content = bytearray(file_of(site, folder))
    content[-5] ^= 4
    return bytes(content)


def louder(mu: float = 1.0, sigma: float = 1.0):
    def make(site: Posterior, folder) -> bytes:
        prior = a_prior()
        means = {name: prior.mu[name] + mu * (mean - prior.mu[name]) for name, mean in site.mu.items()}
        sigmas = {name: sigma * width for name, width in site.sigma.items()}
        return file_of(Posterior(means, sigmas, site.metadata), folder)

    return make


def replay(site: Posterior, folder) -> bytes:
    """North's posterior with one number changed."""
    other = a_site(a_prior(), 1)
    other.mu["layers.0.bias"][0] += 1e-3
    return file_of(other, folder)


HOSTILE = {
    "dimensions": many_dimensions,
    "volumes": header(n_volumes=2**53 - 1),
    "prior-list": header(prior_sha256=["ab"]),
    "prior-dict": header(prior_sha256={"ab": 1}),
    "power": header(sites=[{"sha256": "ab", "n_volumes": 1, "temper": 10**400}]),
    "mixed": header(sites=[{"sha256": "ab", "n_volumes": 1}, {"sha256": 7, "n_volumes": 1}]),
    "nested": nested,
    "text": header(training={"note": "x" * 10**6}),
    "flipped": flipped,
    "infinite": louder(mu=1e30),
    "replay": replay,
    "huge": lambda site, folder: file_of(site, folder) + b"\0" * 2**22,
    "nothing": lambda site, folder: b"",
}


@pytest.fixture
def cycle(tmp_path) -> Cycle:
    a_prior().save(tmp_path / "prior.safetensors")
    sites = [*HONEST, *HOSTILE]
    project = Project("brains", "localhost", sites, tmp_path / "prior.safetensors", quorum=3, method="dwc")
    return Cycle.create(tmp_path / "server", project)


def answer(content: bytes) -> dict:
    return {"state": "trained", "round": 1, "prior_sha256": a_prior().sha256, "posterior": content}


def test_a_pass_enters_exactly_the_honest_sites_and_names_each_of_the_others(cycle, monkeypatch, tmp_path):
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    answers = {site: answer(file_of(a_site(a_prior(), 1 + n), tmp_path)) for n, site in enumerate(HONEST)}
    for n, (site, make) in enumerate(HOSTILE.items()):
        answers[site] = answer(make(a_site(a_prior(), 100 + n), tmp_path))
    Pass(dict(sorted(answers.items(), key=lambda item: item[0] not in HONEST))).make(cycle)
    state = Cycle(cycle.folder).state
    assert sorted(row["site"] for row in state["posteriors"]) == sorted(HONEST)
    assert sorted(row["site"] for row in state["refused"]) == sorted(HOSTILE)
    assert len(state["priors"]) == 2  # the round closed all the same
    said = describe(state)
    for site in HOSTILE:
        assert f"refused: {site}'s posterior: " in said
    assert state["trouble"] == []


@pytest.mark.parametrize("fault", [RuntimeError("a tensor"), RecursionError(), KeyError("x"), OverflowError("big")])
def test_any_exception_over_one_site_is_noted_with_its_name_and_the_pass_goes_on(cycle, monkeypatch, tmp_path, fault):
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    receive = Cycle.receive

    def failing(self, site, answer):
        if site == "east":
            raise fault
        return receive(self, site, answer)

    monkeypatch.setattr(Cycle, "receive", failing)
    monkeypatch.setattr(Pass, "log_exception", lambda *arguments: None, raising=False)
    Pass({site: answer(file_of(a_site(a_prior(), n), tmp_path)) for n, site in enumerate(HONEST)}).make(cycle)
    assert sorted(row["site"] for row in cycle.state["posteriors"]) == ["north", "west"]
    (trouble,) = cycle.state["trouble"]
    assert trouble.startswith(f"east: {type(fault).__name__}")


def closed_with(tmp_path, make, **settings) -> Cycle:
    """A round of five sites, one of them hostile."""
    a_prior().save(tmp_path / "prior.safetensors")
    sites = ["a", "b", "c", "d", "loud"]
    settings = {"method": "dwc", **settings}
    cycle = Cycle.create(tmp_path / "s", Project("x", "localhost", sites, tmp_path / "prior.safetensors", **settings))
    for n, site in enumerate(sites[:-1]):
        cycle.receive(site, answer(file_of(a_site(a_prior(), n), tmp_path)))
    cycle.receive("loud", answer(make(a_site(a_prior(), 50), tmp_path)))
    assert cycle.state["refused"] == []
    assert cycle.advance(NOW)
    return cycle


def shift(cycle: Cycle) -> float:
    """How far the loud site is from having made the result's means its own: 0 if it has."""
    result, loud = Posterior.load(cycle.result), Posterior.load(cycle.folder / "round-1/loud.safetensors")
    return max(((result.mu[name] - loud.mu[name]).abs() / a_prior().sigma[name]).max().item() for name in result.mu)


@pytest.mark.parametrize("make", [louder(sigma=1e-8), louder(sigma=1e-3), louder(mu=1e6)])
def test_a_site_that_would_replace_the_others_is_left_out_and_the_books_say_so(tmp_path, make):
    cycle = closed_with(tmp_path, make)
    (row,) = [row for row in cycle.state["posteriors"] if row["site"] == "loud"]
    assert row["power"] == 0
    assert "left out: loud in round 1" in describe(cycle.state)
    assert len(Posterior.load(cycle.result).metadata["sites"]) == 4
    others = [file for file in sorted((cycle.folder / "round-1").iterdir()) if file.stem != "loud"]
    from dwc.consolidation import consolidate

    expected = consolidate(a_prior(), [Posterior.load(file) for file in others])
    assert Posterior.load(cycle.result).sha256 == expected.sha256


def test_a_site_a_little_too_loud_enters_with_less_power(tmp_path):
    cycle = closed_with(tmp_path, louder(mu=8.0))
    (row,) = [row for row in cycle.state["posteriors"] if row["site"] == "loud"]
    assert 0.01 < row["power"] < 1
    assert f"limited: loud in round 1, its influence is above the limit; it enters with power {row['power']:.3g}" in (
        describe(cycle.state)
    )
    assert re.search(
        r"it enters with power [\d.]+: [\d.]+ times the influence of the median site for 1 times its volumes, "
        r"more than its volumes explain",
        describe(cycle.state),
    )
    members = {member["sha256"]: member["temper"] for member in Posterior.load(cycle.result).metadata["sites"]}
    assert members[row["sha256"]] == row["power"]


def one_bias(shift: float, sigma: float):
    def make(site: Posterior, folder) -> bytes:
        prior = a_prior()
        site.mu["layers.0.bias"][2] = prior.mu["layers.0.bias"][2] + shift * prior.sigma["layers.0.bias"][2]
        site.sigma["layers.0.bias"][2] = sigma * prior.sigma["layers.0.bias"][2]
        return file_of(site, folder)

    return make


@pytest.mark.parametrize(("shift", "sigma"), [(90.0, 0.05), (90.0, 1.0), (0.0, 1e-3)])
def test_a_site_that_steers_one_bias_is_limited_and_named(tmp_path, shift, sigma):
    cycle = closed_with(tmp_path, one_bias(shift, sigma))
    (row,) = [row for row in cycle.state["posteriors"] if row["site"] == "loud"]
    assert row["power"] < 1
    said = describe(cycle.state)
    assert re.search("(limited|left out): loud in round 1, its influence is (far )?above the limit", said)
    assert re.search("warning: loud in round 1: (it|in) ", said)
    assert not any(f"{word} {site} in round 1" in said for site in "abcd" for word in ("limited:", "warning:"))


def test_without_the_limit_a_confident_site_makes_the_means_its_own(tmp_path):
    assert shift(closed_with(tmp_path, louder(sigma=1e-8), max_influence=None)) < 1e-6


def test_the_state_warns_of_sites_that_are_too_far_too_sure_or_against_the_others(tmp_path):
    said = describe(closed_with(tmp_path, louder(mu=1e4, sigma=1e-4), max_influence=None).state)
    assert "warning: loud in round 1: a mean is " in said
    assert "warning: loud in round 1: a sigma is " in said
    assert "times the precision of the median site" in said
    assert "warning: a in" not in said
