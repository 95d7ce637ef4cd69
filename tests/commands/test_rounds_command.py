"""Rounds on the same scans by hand: `dwc train` with a cavity and a start, `dwc consolidate --state`."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from dwc.base.errors import InputError
from dwc.cli import main
from dwc.posterior import Posterior
from dwc.site_factors import Factors
from dwc.training.loop import train_network

pytest_plugins = ["tests.tiny_runs"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def round_1(networks, tmp_path):
    """The files a round by hand leaves: network, state, cavities of sites a and b."""
    for name in ("a", "b"):
        networks[name].save(tmp_path / f"{name}.safetensors")
    words = [
        "consolidate", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"),
        "--prior", networks["vi"].name, "--state", str(tmp_path / "state.safetensors"),
        "--cavities", str(tmp_path / "next"), "--out", str(tmp_path / "q1.safetensors"),
    ]  # fmt: skip
    assert main(words) == 0
    return tmp_path


@pytest.fixture
def vcl(settings, tmp_path):
    """How a site trains; network and grid are the prior's."""

    def train(*, resume: bool = False, **changes: Any) -> Posterior:
        shape = dict.fromkeys(("label_map", "grid_size", "width", "dilations"))
        changes = {"mode": "vcl", "epochs": 1, "out": tmp_path / "run", **shape, **changes}
        return train_network(replace(settings, **changes), resume=resume)

    return train


def test_two_rounds_by_hand_with_the_commands_of_the_documentation(round_1, networks, settings, capsys):
    train = [
        "train", "--mode", "vcl", "--data", str(settings.data), "--prior", str(round_1 / "next" / "a.safetensors"),
        "--init", str(round_1 / "q1.safetensors"), "--out", str(round_1 / "run"), "--epochs", "1",
        "--steps-per-epoch", "2", "--batch-size", "1", "--cache-dir", str(settings.cache_dir), "--device", "cpu",
    ]  # fmt: skip
    assert main(train) == 0
    (round_1 / "run" / "posterior.safetensors").rename(round_1 / "a.safetensors")
    words = [
        "consolidate", str(round_1 / "a.safetensors"), "--prior", networks["vi"].name, "--damping", "0.7",
        "--state", str(round_1 / "state.safetensors"), "--out", str(round_1 / "q2.safetensors"),
    ]  # fmt: skip
    assert main(words) == 0
    again = Factors(networks["vi"])
    for name in ("a", "b"):
        again.replace(name, networks[name], cavity=networks["vi"], damping=0.5)
    again.replace("a", Posterior.load(round_1 / "a.safetensors"), damping=0.7)
    assert Posterior.load(round_1 / "q2.safetensors").sha256 == again.posterior().sha256
    printed = capsys.readouterr().out
    assert "damping 0.7" in printed
    assert "2 sites, 6 volumes" in printed


def test_a_site_starts_from_the_current_network_with_the_cavity_as_its_prior(round_1, vcl):
    cavity, current = round_1 / "next" / "a.safetensors", round_1 / "q1.safetensors"
    trained = vcl(prior=cavity, init=current, lr=1e-12, rho_lr=1e-12, steps_per_epoch=1)
    start, prior = Posterior.load(current), Posterior.load(cavity)
    for name in start.mu:
        torch.testing.assert_close(trained.mu[name], start.mu[name], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(trained.sigma[name], start.sigma[name], rtol=1e-5, atol=0)
    assert trained.metadata["prior_sha256"] == prior.sha256
    assert trained.metadata["training"]["init_sha256"] == start.sha256


def test_a_resumed_round_gives_the_same_bits_and_another_start_is_refused(round_1, vcl):
    files = {"prior": round_1 / "next" / "a.safetensors", "init": round_1 / "q1.safetensors"}
    whole = vcl(**files, epochs=2, out=round_1 / "whole")
    vcl(**files, epochs=1)
    with pytest.raises(InputError, match="start_sha256"):
        vcl(prior=files["prior"], epochs=2, resume=True)
    assert vcl(**files, epochs=2, resume=True).sha256 == whole.sha256


def test_a_start_that_the_cavity_does_not_allow_is_refused(round_1, networks, vcl):
    cavity = round_1 / "next" / "a.safetensors"
    with pytest.raises(InputError, match="is a MAP network; give the current network"):
        vcl(prior=cavity, init=networks["map"].name)
    wide = {name: 2 * sigma for name, sigma in networks["vi"].sigma.items()}
    Posterior(networks["vi"].mu, wide, networks["vi"].metadata).save(round_1 / "wide.safetensors")
    with pytest.raises(InputError, match="sigma exceeds the prior's in"):
        vcl(prior=cavity, init=round_1 / "wide.safetensors")


def test_a_site_taken_out_leaves_the_others(round_1, networks, capsys):
    words = [
        "consolidate", str(round_1 / "a.safetensors"), "--earlier", networks["vi"].name, "--without", "b",
        "--prior", networks["vi"].name, "--damping", "1", "--state", str(round_1 / "state.safetensors"),
        "--out", str(round_1 / "alone.safetensors"),
    ]  # fmt: skip
    assert main(words) == 0
    alone = Posterior.load(round_1 / "alone.safetensors")
    for name, sigma in networks["a"].sigma.items():
        torch.testing.assert_close(alone.sigma[name], sigma, rtol=2e-7, atol=0)
    assert "100.0%" in capsys.readouterr().out


def test_damping_auto_is_chosen_on_the_organizations_scans_and_said(round_1, networks, settings, vcl, capsys):
    for name in ("a", "b"):
        prior, out = round_1 / "next" / f"{name}.safetensors", round_1 / f"run-{name}"
        vcl(prior=prior, init=round_1 / "q1.safetensors", steps_per_epoch=1, out=out)
        (out / "posterior.safetensors").rename(round_1 / f"{name}.safetensors")
    words = [
        "consolidate", str(round_1 / "a.safetensors"), str(round_1 / "b.safetensors"), "--prior", networks["vi"].name,
        "--data", str(settings.data), "--cache-dir", str(round_1 / "cache"), "--validation-sub-volumes", "2",
    ]  # fmt: skip
    state = (round_1 / "state.safetensors").read_bytes()
    chosen = {}
    for damping in ("auto", "0.5", "1.0"):
        (round_1 / "state.safetensors").write_bytes(state)
        out = round_1 / f"q2-{damping}.safetensors"
        more = ["--damping", damping, "--state", str(round_1 / "state.safetensors"), "--out", str(out)]
        assert main([*words, *more]) == 0
        printed = capsys.readouterr().out
        assert "log-likelihood" in printed
        (line,) = [line for line in printed.splitlines() if line.endswith("chosen")]
        chosen[damping] = (float(line.split()[0]), Posterior.load(out).sha256)
    assert chosen["auto"] == chosen["0.5"] or chosen["auto"] == chosen["1.0"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--damping", "auto"],
            "--damping auto: needs the organization's scans to choose on; give --data",
        ),
        (["--damping", "auto", "--data", "none.csv"], "none.csv"),
        (["--damping", "0.5", "--device", "cpu"], "--device cpu: is for --damping auto; give --data too"),
        (["--damping", "1.5"], "--damping 1.5: give a number above 0 and at most 1"),
        (["--damping", "nan", "--data", "none.csv"], "--damping nan: give a number above 0 and at most 1"),
        (["--temper", "0.5"], "--temper 0.5: is for a consolidation without --state"),
        (["--out", "{state}"], "is the --state file"),
        (["--without", "nobody"], "nobody: has no factor here; give one of a, b"),
    ],
)
def test_wrong_words_are_one_line_and_the_state_stays(round_1, networks, capsys, words, message):
    state = round_1 / "state.safetensors"
    before = state.read_bytes()
    basic = {
        "--prior": networks["vi"].name, "--state": str(state), "--earlier": networks["vi"].name,
        "--out": str(round_1 / "q2.safetensors"),
    }  # fmt: skip
    given = dict(zip(words[::2], [word.format(state=state) for word in words[1::2]], strict=True))
    flags = [word for pair in {**basic, **given}.items() for word in pair]
    assert main(["consolidate", str(round_1 / "a.safetensors"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert state.read_bytes() == before


def test_the_flags_of_rounds_need_a_state(networks, tmp_path, capsys):
    words = [
        "consolidate",
        networks["a"].name,
        "--prior",
        networks["vi"].name,
        "--out",
        str(tmp_path / "q.safetensors"),
    ]
    assert main([*words, "--damping", "0.5"]) == 2
    assert "--damping 0.5: is for rounds on the same scans; give --state too" in capsys.readouterr().err
