"""`dwc consolidate` as a person types it: sites in, tempered by a number or on the origin's scans, sites out again."""

import csv
import re
import shutil

import pytest

from dwc.cli import main
from dwc.consolidation import consolidate
from dwc.posterior import Posterior
from dwc.tempering import temper_grid

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
    assert "1 sites, 3 volumes" in capsys.readouterr().out


def without_split(settings, folder) -> str:
    """The site's manifest, its scans beside it, without the column that tells the split."""
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
    site = networks["finetune"]  # trained from the consolidated network, whose header tells no split
    prior = site.name.replace("finetune", "dwc")
    words = ["consolidate", site.name, "--prior", prior, "--out", str(tmp_path / "c.safetensors")]
    assert main([*words, "--temper", "auto", "--data", without_split(settings, tmp_path)]) == 2
    assert "has no split column" in capsys.readouterr().err
    assert main([*words, "--temper", "auto", "--data", str(settings.data)]) == 0
