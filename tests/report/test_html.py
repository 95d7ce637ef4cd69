import base64
import io
import re
from typing import get_args

import matplotlib.image
import pandas as pd
import pytest

from dwc.base.errors import InputError
from dwc.report import plots
from dwc.report.findings import MARGIN
from dwc.report.html import SITES_PICTURE, write_report
from dwc.report.words import points
from dwc.study.scoring import Kind
from tests.report.studies import DWC, ENSEMBLE, ROWS, write_pooled, write_study

PIXEL = base64.b64decode("iVBORw0KGgo=")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    out = write_study(tmp_path_factory.mktemp("study"))
    write_report(out)
    return out


@pytest.fixture(scope="module")
def page(study) -> str:
    return (study / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def quick_pictures(monkeypatch):
    """Replace charts by one pixel, for tests of the text around them."""

    def save(figure, path):
        path.write_bytes(PIXEL)

    monkeypatch.setattr(plots, "save", save)


def cells(page: str, row: str) -> list[str]:
    """The printed cells of the table row with this first cell."""
    (line,) = re.findall(rf"<tr[^>]*><td[^>]*>{re.escape(row)}</td>(.*?)</tr>", page)
    return re.findall(r"<td[^>]*>(.*?)</td>", line)


def test_the_page_asks_for_nothing_from_elsewhere(page):
    assert "<script" not in page
    assert not re.findall(r"(?:https?:)?//[\w.]", re.sub(r"base64,[^\"]*", "", page))
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in sources)


def test_the_pictures_are_inside_and_beside_the_page(study, page):
    inside = [base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([^\"]*)", page)]
    beside = {path.name: path.read_bytes() for path in (study / "figures").iterdir()}
    assert sorted(beside) == ["calibration.png", "classes.png", "table.png", "training.png"]
    assert sorted(inside) == sorted(beside.values())
    assert all(matplotlib.image.imread(io.BytesIO(png)).shape[1] > 1000 for png in inside)


def test_the_table_is_the_studys_in_per_cent(study, page):
    table = pd.read_csv(study / "table.csv").set_index("row")
    printed = cells(page, "H → N+B+W → H (DWC)")
    assert printed == [*(f"{100 * dice:.2f}" for dice in table.loc[DWC]), "150", "550"]
    best = re.findall(r'<td class="best">(.*?)</td>', page)
    assert best == [f"{100 * dice:.2f}" for dice in table.max()]


def test_every_finding_is_shown_with_its_verdict(page):
    verdicts = re.findall(r'<span class="verdict ([a-z-]+)">([a-z ]+)</span>', page)
    assert verdicts == [("holds", "holds")] * 5


def test_every_test_is_shown_with_its_unit_and_they_are_counted(study, page):
    tests = pd.read_csv(study / "tests.csv")
    assert f"{len(tests)} two-tailed paired t-tests, not corrected for their number" in page
    lines = re.findall(r'<td class="words">(volume|subject)</td><td>(\d+)</td>', page)
    assert [(unit, int(n)) for unit, n in lines] == list(zip(tests["unit"], tests["n"], strict=True))


def test_the_rules_of_the_verdicts_and_their_margin_are_shown(page):
    assert f"Not below: it lies above {points(-MARGIN)} points." in page
    assert "predicts at its means" in page


def test_dice_by_steps_are_in_per_cent_and_columns_without_a_number_are_left_out(page):
    assert cells(page, "N") == ["150", "45.00", "60.00", "40.00", "400", "63.00", "60.00", "200", "50"]
    assert "steps to the plateau</th>" not in page


def test_the_same_tables_give_the_same_page(study, page):
    write_report(study)
    assert (study / "report.html").read_text(encoding="utf-8") == page


def test_pooled_seeds_show_mean_and_standard_deviation(tmp_path, quick_pictures):
    out = write_pooled(tmp_path)
    page = write_report(out).read_text(encoding="utf-8")
    mean, sd = (pd.read_csv(out / f"{name}.csv").set_index("row") for name in ("table", "table_sd"))
    printed = cells(page, ENSEMBLE)
    assert printed[4] == f"{100 * mean.loc[ENSEMBLE, 'Avg.']:.2f} ({100 * sd.loc[ENSEMBLE, 'Avg.']:.2f})"
    assert "3 seeds (0, 1, 2); held-out volumes: H 15, N 18, B 6, W 6, A 15" in page
    assert page.count("in the reports of the seeds") == 2
    by_seed = pd.read_csv(out / "by_seed.csv")
    first = by_seed[by_seed["comparison"] == by_seed["comparison"].iloc[0]]["mean_difference"].iloc[:3]
    printed = "".join(f"<td>{points(value)}</td>" for value in first)
    assert f'<td class="words">H, N, B, W</td>{printed}</tr>' in page
    assert re.search(r"<td class=\"words\">Ensemble</td><td>\d\.\d\d \(\d\.\d\d\)</td>", page)


def test_names_are_shown_as_text_whatever_they_hold(tmp_path, quick_pictures):
    out, name = write_study(tmp_path), '<script>alert(1)</script> & "co"'
    for table in ("rows", "volumes", "classes", "table"):
        frame = pd.read_csv(out / f"{table}.csv")
        frame["row"] = frame["row"].replace("N MAP", name)
        frame.to_csv(out / f"{table}.csv", index=False)
    page = write_report(out).read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &#34;co&#34;" in page


def test_a_study_of_few_rows_shows_these_and_says_what_is_missing(tmp_path, quick_pictures):
    out = write_study(tmp_path)
    for table in ("rows", "volumes", "classes", "table"):
        frame = pd.read_csv(out / f"{table}.csv")
        frame[frame["row"].isin(["H MAP", ENSEMBLE])].to_csv(out / f"{table}.csv", index=False)
    for table in ("tests", "speed", "calibration"):
        frame = pd.read_csv(out / f"{table}.csv")
        frame[:0].to_csv(out / f"{table}.csv", index=False)
    page = write_report(out).read_text(encoding="utf-8")
    assert {path.name for path in (out / "figures").iterdir()} == {"table.png", "classes.png"}
    assert "It needs the scores of DWC and both chains." in page
    assert "Not scored yet: pooled MAP, DWC." in page
    assert "No site&#39;s MAP, VCL and control networks have all been trained." in page
    assert "They need DWC and the pooled MAP network." in page


def test_a_folder_without_tables_gets_a_page_that_says_so(tmp_path):
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert page.count("not tested</span>") == 5
    assert "No row has been scored yet." in page
    assert "<img" not in page


def test_site_pictures_and_further_studies_in_the_folder_are_shown(tmp_path, quick_pictures):
    out = write_study(tmp_path)
    (out / "figures").mkdir()
    (out / "figures" / SITES_PICTURE).write_bytes(PIXEL)
    (out / "many-sites").mkdir()
    (out / "many-sites" / "many-sites.png").write_bytes(PIXEL)
    pd.DataFrame({"sites": [2, 64], "Avg.": [0.5, 0.61234]}).to_csv(out / "many-sites" / "table.csv", index=False)
    page = write_report(out).read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,iVBORw0KGgo="') == 2 + 4
    assert "Beyond the paper: many sites" in page
    assert cells(page, "64") == ["0.6123"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("volumes.csv", "row,site\nx,H\n", "volumes.csv: has no column subject, image, dice"),
        ("tests.csv", "", "tests.csv: is not a table"),
        ("config.yaml", "a: [", "config.yaml: is not YAML"),
    ],
)
def test_a_malformed_file_in_the_folder_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        write_report(tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder; give the folder of a study"):
        write_report(tmp_path / "nowhere")


def test_every_kind_of_row_that_a_study_has_is_known_to_the_charts():
    assert set(get_args(Kind)) == set(plots.STYLE) == {kind for kind, *_ in ROWS.values()}
