"""`dwc consolidate` as a user types it: sites added, tempered by a number or on held-out scans, and removed."""

import csv
import re
import shutil

import pytest
import torch

from dwc.cli import main
from dwc.consolidation import consolidate
from dwc.posterior import Posterior
from dwc.tempering import temper_grid
from tests.made_posteriors import HEADER, a_prior, a_site

pytest_plugins = ["tests.tiny_runs"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def words(networks, tmp_path) -> list[str]:
    """Two sites and their prior."""
    sites = [networks["a"].name, networks["b"].name]
    return ["consolidate", *sites, "--prior", networks["vi"].name, "--out", str(tmp_path / "c.safetensors")]


@pytest.fixture
def result(tmp_path):
    return lambda name="c": Posterior.load(tmp_path / f"{name}.safetensors")


def test_a_number_tempers_and_the_file_keeps_it(words, result, networks, capsys):
    assert main([*words, "--temper", "0.5"]) == 0
    assert result().sha256 == consolidate(networks["vi"], [networks["a"], networks["b"]], temper=0.5).sha256
    assert [member["temper"] for member in result().metadata["sites"]] == [0.5, 0.5]
    assert "2 sites, 6 volumes, lambda 0.5, sha256" in capsys.readouterr().out


def test_lambda_1_is_what_no_lambda_is(words, result, networks):
    assert main([*words, "--temper", "1"]) == 0
    assert result().sha256 == networks["dwc"].sha256


def test_auto_prints_the_grid_chooses_from_it_and_the_file_keeps_lambda(words, result, settings, tmp_path, capsys):
    auto = [*words, "--temper", "auto", "--data", str(settings.data), "--cache_dir", str(tmp_path / "cache")]
    assert main(auto) == 0
    printed = capsys.readouterr().out
    rows = re.findall(r"^ +([\d.]+) +(-[\d.]+) +([\d.]+)(?:  (the prior|chosen))?$", printed, re.MULTILINE)
    grid = temper_grid(2)
    assert len(rows) == 1 + len(grid)
    assert rows[0][3] == "the prior"
    (chosen,) = [k for k, row in enumerate(rows) if row[3] == "chosen"]
    assert float(rows[chosen][1]) == max(float(row[1]) for row in rows[1:])
    digest = result().sha256
    assert {member["temper"] for member in result().metadata["sites"]} == {grid[chosen - 1]}
    assert main(auto) == 0
    assert result().sha256 == digest
    assert capsys.readouterr().out == printed


def test_a_site_is_taken_out_of_a_consolidated_file(words, result, networks, tmp_path, capsys):
    assert main([*words, "--temper", "0.5"]) == 0
    out, vi = tmp_path / "less.safetensors", networks["vi"].name
    merged = str(tmp_path / "c.safetensors")
    assert main(["consolidate", merged, "--prior", vi, "--without", networks["b"].name, "--out", str(out)]) == 0
    less, expected = result("less"), consolidate(networks["vi"], [networks["a"]], temper=0.5)
    assert less.metadata == expected.metadata
    for name, sigma in expected.sigma.items():
        assert ((less.mu[name] - expected.mu[name]).abs() < 1e-4 * sigma).all()
        assert ((less.sigma[name] / sigma - 1).abs() < 1e-5).all()
    printed = capsys.readouterr().out
    assert "1 sites, 3 volumes" in printed
    assert "sigma/sigma_0" not in printed.split("lambda 0.5")[-1]  # no heading without rows


def without_split(settings, folder) -> str:
    """The site's manifest without its split column, next to its scans."""
    for file in settings.data.parent.glob("*.nii.gz"):
        shutil.copy(file, folder)
    rows = list(csv.reader(settings.data.read_text().splitlines()))
    path = folder / "manifest.csv"
    path.write_text("\n".join(",".join(row[:-1]) for row in rows) + "\n")
    return str(path)


def test_without_a_split_column_the_held_out_scans_are_those_of_the_priors_header(words, settings, tmp_path, capsys):
    assert main([*words, "--temper", "auto", "--data", without_split(settings, tmp_path)]) == 0
    assert (tmp_path / "cache").is_dir()
    assert "chosen" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temper", "0"], "--temper 0.0: give a positive number"),
        (["--temper", "-1"], "--temper -1.0: give a positive number"),
        (["--temper", "nan"], "--temper nan: expected float"),
        (["--temper", "hot"], "temper"),
        (["--temper", "auto"], "--temper auto: needs the organization's scans to choose on; give --data, or a number"),
        (["--temper", "auto", "--data", "none.csv"], "none.csv"),
        (["--temper", "auto", "--data", "none.csv", "--validation_sub_volumes", "0"], "--validation-sub-volumes 0"),
        (["--data", "none.csv"], "--data none.csv: is for --temper auto only"),
        (["--temper", "auto", "--data", "DATA", "--device", "abacus"], "device"),
        (["--temper", "auto", "--data", "DATA", "--label_map", "fifty"], "label map"),
        (["--without", "none.safetensors"], "none.safetensors: no such file"),
        (["--without", "VI"], "was trained from prior"),
    ],
)
def test_what_cannot_be_meant_is_one_line_and_writes_nothing(
    words, settings, networks, tmp_path, capsys, flags, message
):
    real = {"DATA": str(settings.data), "VI": networks["vi"].name}
    assert main([*words, *(real.get(flag, flag) for flag in flags)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert list(tmp_path.iterdir()) == []


def test_a_site_that_is_not_in_cannot_be_taken_out(words, networks, tmp_path, capsys):
    alone = ["consolidate", networks["a"].name, *words[3:], "--without", networks["b"].name]
    assert main(alone) == 2
    assert f"{networks['b'].name}: this site is not in" in capsys.readouterr().err
    assert not (tmp_path / "c.safetensors").exists()


def test_taking_out_the_last_site_leaves_nothing_to_write(words, networks, tmp_path, capsys):
    assert main(["consolidate", networks["a"].name, *words[3:], "--without", networks["a"].name]) == 2
    assert "no posterior to consolidate" in capsys.readouterr().err


def test_a_consolidated_prior_without_a_split_column_asks_for_one(networks, settings, tmp_path, capsys):
    site = networks["finetune"]  # trained from the consolidated network, whose header names no split
    prior = site.name.replace("finetune", "dwc")
    words = ["consolidate", site.name, "--prior", prior, "--out", str(tmp_path / "c.safetensors")]
    assert main([*words, "--temper", "auto", "--data", without_split(settings, tmp_path)]) == 2
    assert "has no split column" in capsys.readouterr().err
    assert main([*words, "--temper", "auto", "--data", str(settings.data)]) == 0


@pytest.fixture
def made(tmp_path):
    """Files of a made-up prior and of sites trained from it; `make(name, site)` adds one."""
    a_prior().save(tmp_path / "prior.safetensors")

    def make(name: str, site: Posterior) -> str:
        site.save(tmp_path / f"{name}.safetensors")
        return str(tmp_path / f"{name}.safetensors")

    files = [make(name, a_site(a_prior(), seed)) for seed, name in enumerate("abcd")]
    words = ["--prior", str(tmp_path / "prior.safetensors"), "--out", str(tmp_path / "out.safetensors")]
    return make, ["consolidate", *files], words


def scaled(seed: int, mu: float, sigma: float) -> Posterior:
    site, prior = a_site(a_prior(), seed), a_prior()
    means = {name: prior.mu[name] + mu * (mean - prior.mu[name]) for name, mean in site.mu.items()}
    return Posterior(means, {name: sigma * width for name, width in site.sigma.items()}, site.metadata)


def test_honest_sites_are_consolidated_without_a_word_of_warning_and_the_limit_changes_no_bit(made, tmp_path, capsys):
    _, sites, words = made
    assert main([*sites, *words]) == 0
    assert "warning" not in capsys.readouterr().err
    plain = (tmp_path / "out.safetensors").read_bytes()
    assert main([*sites, *words, "--max-influence", "3"]) == 0
    assert (tmp_path / "out.safetensors").read_bytes() == plain


@pytest.mark.parametrize(
    ("mu", "sigma", "message"),
    [
        (1.0, 1e-30, "a sigma is "),
        (1e6, 1.0, "sigma_0 from the prior's"),
        (-1.0, 1.0, ""),
        (1.0, 1e-3, "times the precision of the median site"),
    ],
)
def test_a_loud_site_is_named_in_a_warning_and_left_out_where_there_is_a_limit(
    made, tmp_path, capsys, mu, sigma, message
):
    make, sites, words = made
    loud = make("loud", scaled(9, mu, sigma))
    assert main([*sites, loud, *words]) == 0
    assert (f"dwc: warning: {loud}: " in capsys.readouterr().err) == bool(message)
    assert main([*sites, loud, *words, "--max-influence", "3"]) == 0
    error = capsys.readouterr().err
    assert message in error
    if message:
        assert f"{loud}: is left out, its influence is far above the limit" in error
        assert "times the influence of the median site for 1 times its volumes, more than its volumes explain" in error
        assert len(Posterior.load(tmp_path / "out.safetensors").metadata["sites"]) == 4


def test_a_replay_with_one_number_changed_is_named(made, capsys):
    make, sites, words = made
    replay = a_site(a_prior(), 0)
    replay.mu["layers.0.bias"][0] += 1e-3
    assert main([*sites, make("replay", replay), *words]) == 0
    assert "it has tensors in common with" in capsys.readouterr().err


def test_means_stored_too_coarsely_for_their_sigma_are_named(tmp_path, capsys):
    prior = Posterior({"w": torch.ones(9)}, {"w": torch.full((9,), 1e-8)}, HEADER)
    prior.save(tmp_path / "prior.safetensors")
    metadata = {**HEADER, "prior_sha256": prior.sha256, "n_volumes": 1}
    Posterior(prior.mu, prior.sigma, metadata).save(tmp_path / "a.safetensors")
    words = ["--prior", str(tmp_path / "prior.safetensors"), "--out", str(tmp_path / "out.safetensors")]
    assert main(["consolidate", str(tmp_path / "a.safetensors"), *words]) == 0
    assert "w: fp32 rounds 9 means by over 0.1 sigma" in capsys.readouterr().err


def test_removing_a_confident_site_from_a_file_is_refused_and_says_the_bound(made, tmp_path, capsys):
    make, sites, words = made
    sure = make("sure", scaled(9, 1.0, 1e-4))
    assert main([*sites, sure, *words]) == 0
    merged = str(tmp_path / "out.safetensors")
    less = ["--prior", words[1], "--out", str(tmp_path / "less.safetensors")]
    assert main(["consolidate", merged, *less, "--without", sure]) == 2
    assert re.search(r"off by up to [\d.e+]+ sigma, more than 0\.01; consolidate the other", capsys.readouterr().err)
    assert main([*sites, sure, *less, "--without", sure]) == 0
    assert (
        Posterior.load(tmp_path / "less.safetensors").sha256
        == consolidate(a_prior(), [Posterior.load(site) for site in sites[1:]]).sha256
    )


def test_removing_a_consolidated_file_is_refused_with_the_bound_where_its_own_rounding_exceeds_it(
    made, tmp_path, capsys
):
    make, sites, words = made
    sure = [make(name, scaled(seed, 1.0, 2e-3)) for seed, name in ((9, "sure"), (10, "surer"))]
    merged = str(tmp_path / "merged.safetensors")
    assert main(["consolidate", *sure, "--prior", words[1], "--out", merged]) == 0
    assert main([*sites, *sure, *words, "--without", merged]) == 2
    assert re.search(r"off by up to [\d.e+]+ sigma, more than 0\.01", capsys.readouterr().err)
    assert not (tmp_path / "out.safetensors").exists()
    assert main([*sites, *sure, *words, "--without", *sure]) == 0
    expected = consolidate(a_prior(), [Posterior.load(site) for site in sites[1:]])
    assert Posterior.load(tmp_path / "out.safetensors").sha256 == expected.sha256


def test_a_limit_that_two_sites_are_too_few_for_is_said(made, capsys):
    _, sites, words = made
    assert main([*sites[:3], *words, "--max-influence", "3"]) == 0
    assert "warning: 2 sites have no median to be compared with: nobody's influence is limited" in (
        capsys.readouterr().err
    )


def test_leaving_each_site_out_says_whether_the_organizations_scans_get_likelier(words, settings, tmp_path, capsys):
    auto = ["--temper", "auto", "--data", str(settings.data), "--cache-dir", str(tmp_path / "cache")]
    assert main([*words, *auto, "--leave-one-out"]) == 0
    lines = re.findall(
        r"^log-likelihood -[\d.]+ without (\S+): (?:better|worse|no clear difference) without it "
        r"\([+-][\d.]+, standard error (?:[\d.]+|unknown with one sub-volume)\)$",
        capsys.readouterr().out, re.M,
    )  # fmt: skip
    assert lines == words[1:3]
    assert main([*words, "--leave-one-out"]) == 2
    assert "--leave-one-out: needs the organization's scans" in capsys.readouterr().err
