"""Sites may have any names and number: an origin, at least one site, and optional unseen ones."""

import pandas as pd
import pytest
import yaml

from dwc.base.errors import InputError
from dwc.cli import main
from dwc.report.findings import NOT_TESTED, findings_of
from dwc.report.results import read_results
from dwc.simulation.scans import load_sites
from dwc.study import beyond, demo, paper
from dwc.study.settings import ManySites, preset_file
from tests.study.tiny_study import tiny_settings

pytest_plugins = ["tests.tiny_runs"]
pytestmark = pytest.mark.usefixtures("one_thread")

FIVE = ("Bergen", "Graz", "Lund", "N", "site-5")


@pytest.fixture(scope="module")
def one_site(tmp_path_factory):
    """A study of an origin and one site, none unseen."""
    out = tmp_path_factory.mktemp("one")
    paper.run(tiny_settings(out=out, origin="Oslo", sites=("Bergen",), unseen=()))
    return out


def test_one_site_and_none_unseen_give_a_whole_study_without_chains(one_site):
    table = pd.read_csv(one_site / "table.csv", index_col="row")
    assert list(table.columns) == ["Oslo", "Bergen", "Avg."]
    assert list(table.index) == [
        "Oslo MAP", "Bergen MAP", "Oslo (variational)", "Oslo->Bergen", "Oslo->Bergen (plain average)",
        "Oslo->Bergen (DWC w/o FT)", "Ensemble", "Oslo->Bergen->Oslo (DWC)", "Oslo+Bergen MAP",
    ]  # fmt: skip
    assert table.notna().all(axis=None)
    assert set(pd.read_csv(one_site / "tests.csv")["columns"]) == {"Oslo, Bergen"}
    assert "took no part in training" not in (one_site / "table.txt").read_text()
    assert pd.read_csv(one_site / "speed.csv")["site"].tolist() == ["Bergen"]


def test_findings_on_unseen_sites_and_chains_are_untested_where_a_study_has_none(one_site):
    found = findings_of(read_results(one_site))
    assert found[1].verdict == found[2].verdict == found[3].verdict == NOT_TESTED
    assert found[1].evidence == "The study has no unseen site."
    page = (one_site / "report.html").read_text(encoding="utf-8")
    assert "(unseen)" not in page
    assert "held-out volumes: Oslo 1, Bergen 1" in page


def test_five_sites_and_two_unseen_have_chains_through_all_and_a_test_on_each_unseen_site(tmp_path):
    paper.run(tiny_settings(out=tmp_path, origin="Oslo", sites=FIVE, unseen=("A", "Ulm")))
    table = pd.read_csv(tmp_path / "table.csv", index_col="row")
    assert list(table.columns) == ["Oslo", *FIVE, "Avg.", "A", "Ulm"]
    assert "->".join(("Oslo", *FIVE)) in table.index
    assert "->".join(("Oslo", *FIVE[::-1])) in table.index
    assert f"Oslo->{'+'.join(FIVE)}->Oslo (DWC)" in table.index
    assert table.notna().all(axis=None)
    tests = pd.read_csv(tmp_path / "tests.csv")
    assert set(tests["columns"]) == {", ".join(("Oslo", *FIVE)), "A", "Ulm"}
    found = findings_of(read_results(tmp_path))
    assert found[1].claim.endswith("on every unseen site (A, Ulm).")
    assert "Ulm (unseen)" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    return tmp_path_factory.mktemp("halves")


@pytest.mark.parametrize(("sites", "unseen"), [(("Bergen",), ()), (("Bergen", "N"), ("Ulm", "A"))])
@pytest.mark.parametrize("name", ["rounds", "leave-one-out", "tempering", "many-sites"])
def test_every_study_beyond_the_paper_takes_other_sites(name, sites, unseen, halves):
    out, many = halves / f"{len(sites)}", ManySites(counts=(1, 2), n_train=1, n_scored=1)
    names = {"origin": "Oslo", "sites": sites, "unseen": unseen}
    settings = tiny_settings(out=out, **names, n_test=2, rounds=1, many_sites=many)
    if name == "leave-one-out" and len(sites) == 1:
        with pytest.raises(InputError, match="`sites` Bergen: one leaves none"):
            beyond.run(name, settings)
        return
    table = beyond.run(name, settings)
    assert (out / name / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    expected = {"Oslo", *unseen} | ({"sites"} if name in ("many-sites", "rounds") else {*sites, "Avg."})
    assert expected <= set(table.columns)
    assert not {"H", "B", "W"} & set(table.columns)


def test_the_demo_takes_other_sites(tmp_path, capsys):
    demo.run(tiny_settings(out=tmp_path, origin="Oslo", sites=("Bergen", "N"), unseen=()))
    table = pd.read_csv(tmp_path / "table.csv", index_col="network")
    assert list(table.columns) == ["Oslo", "Bergen", "N", "Avg."]
    assert "(1/2 each would average the sites" in capsys.readouterr().out


def test_manifests_of_other_sites_need_no_numbers_of_simulated_scans(one_site, tmp_path, capsys):
    names = {"Rom": "Oslo", "Wien": "Bergen"}
    manifests = {name: str(one_site / "sites" / folder / "manifest.csv") for name, folder in names.items()}
    config = tmp_path / "study.yaml"
    config.write_text(yaml.safe_dump({"manifests": manifests, "origin": "Rom", "sites": ["Wien"], "unseen": []}))
    words = ["--preset", "smoke", "--config", str(config), "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main(["experiment", *words, "--map.steps", "2", "--map.epochs", "1", "--only", "Wien MAP"]) == 0
    table = pd.read_csv(tmp_path / "out" / "table.csv", index_col="row")
    assert list(table.columns) == ["Rom", "Wien", "Avg."]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sites": ()}, "`sites` .*: name one site or more"),
        ({"sites": ("N", "N")}, "give each a name of its own"),
        ({"unseen": ("H",)}, "give each a name of its own"),
        ({"sites": ("N+B",)}, "`sites` 'N\\+B': give letters"),
        ({"sites": ("row",)}, "`sites` 'row'.*no name that tables use"),
        ({"sites": ("../N",)}, "`sites` '../N': give letters"),
        ({"origin": "untrained"}, "`sites` 'untrained'.*no name that tables use"),
        ({"origin": "Oslo", "n_train": {"H": 1, "N": 1, "B": 1, "W": 1}}, "`n_train` H, N, B, W: give one for each of"),
        ({"n_test": 0}, "`n_test` 0: give a positive number"),
        ({"n_test": {"H": 1, "N": 1, "B": 1, "W": 1, "A": 0}}, "`n_test.A` 0: give a positive number"),
        ({"manifests": {"H": "h.csv"}}, "`manifests` H: give one for each of H, N, B, W and A"),
        ({"sites": "N"}, "`sites` 'N'"),
    ],
)
def test_bad_sites_are_refused_when_the_settings_are_made(changes, message):
    with pytest.raises(InputError, match=message):
        tiny_settings(**changes)


def test_the_papers_letters_and_their_cohorts_are_the_presets():
    for preset in ("smoke", "small", "demo", "cpu", "paper"):
        text = preset_file(preset).read_text()
        values = yaml.safe_load(text)
        assert (values["origin"], values["sites"], values["unseen"]) == ("H", ["N", "B", "W"], ["A"])
        assert all(cohort in text for cohort in ("HCP", "NKI", "Buckner", "WU120", "ABIDE"))
    assert list(load_sites()) == ["H", "N", "B", "W", "A"]
