"""`dwc report` on a folder of segmentations, without a browser."""

import base64
import gzip
import html
import io
import json
import re
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dwc import cli
from dwc.base.errors import InputError
from dwc.derivatives import Derivatives
from dwc.report import predictions
from dwc.report.cohort import outlier_limit, read_cohort, read_sidecar, robust_z
from dwc.report.thumbnails import PANEL, thumbnail
from dwc.report.volumes import read_volumes
from dwc.report.words import DASH
from dwc.scan_table import scan_table
from tests.report.made_predictions import LIA, Classes, write_cohort, write_scan

pytest_plugins = ["tests.tiny_runs"]

RAS_LONG = np.array([[1.0, 0, 0, -20], [0, 1.0, 0, 5], [0, 0, 2.5, -30], [0, 0, 0, 1]])
ATTACK = "x</script><script>alert(1)<"  # a folder x<, and a file in it


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    """Eleven scans, one of them much larger; a twelfth failed."""
    folder = tmp_path_factory.mktemp("cohort")
    names = [f"sub-{n:02d}" for n in range(11)]
    write_cohort(folder, names, failed={"sub-99": "sub-99_T1w.nii.gz: truncated <or> damaged"})
    table = pd.read_csv(folder / "volumes.tsv", sep="\t", dtype=str, keep_default_na=False)
    table.loc[table["scan"] == "sub-03", "Thalamus_mm3"] = "1700.5"
    table.loc[table["scan"] == "sub-04", ["quality", "reason"]] = ["check", "noise is 0.40 of the tissue's range"]
    table.to_csv(folder / "volumes.tsv", sep="\t", index=False)
    return folder


@pytest.fixture(scope="module")
def report(cohort, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report")
    assert cli.main(["report", str(cohort), "--out", str(out)]) == 0
    return out


def text(markup: str) -> str:
    return " ".join(html.unescape(re.sub("<[^>]*>", " ", markup)).split())


def row_of(page: str, scan: str) -> dict[str, str]:
    """The row's attributes and the text of its cells by heading."""
    table = page[page.index('<table id="scans">') :]
    headings = [text(cell) for cell in re.findall(r"<th scope=\"col\".*?</th>", table, re.DOTALL)]
    (row,) = [row for row in re.findall(r"<tr data-quality.*?</tr>", table, re.DOTALL) if f'data-value="{scan}"' in row]
    cells = re.findall(r"<t[hd][ >].*?</t[hd]>", row, re.DOTALL)
    return dict(zip(headings, map(text, cells), strict=True))


def data_of(page: Path) -> dict:
    """What the page gives to its viewer."""
    (content,) = re.findall(r'<script type="application/json" id="volumes">(.*?)</script>', page.read_text("utf-8"))
    return json.loads(content)


def test_robust_z_is_the_distance_from_the_median_in_robust_standard_deviations():
    values = pd.DataFrame({"a": [1.0, 2, 3, 4, 5, 6, 7, 8, 9, 30], "b": [0.0] * 9 + [5]})
    z = robust_z(values)
    assert z["a"].iloc[-1] == pytest.approx((30 - 5.5) / (1.4826 * 2.5))
    assert z["b"].isna().all()  # half of the values are equal
    assert robust_z(values.iloc[1:]).isna().all(axis=None)  # nine scans


@pytest.mark.parametrize(("n_scans", "n_structures"), [(10, 50), (30, 20)])
def test_one_scan_in_twenty_of_a_normal_cohort_is_marked(n_scans, n_structures):
    limit, rng = outlier_limit(n_scans, n_structures), np.random.default_rng(5)
    cohorts = [robust_z(pd.DataFrame(rng.standard_normal((n_scans, n_structures)))) for _ in range(100)]
    assert 0.03 < np.mean([(z.abs() > limit).any(axis=1) for z in cohorts]) < 0.07
    assert outlier_limit(1000, 50) == 3.5


def test_a_scan_without_a_volume_is_no_part_of_the_cohort():
    values = pd.DataFrame({"a": [float(n) for n in range(9)] + [np.nan]})
    assert robust_z(values).isna().all(axis=None)


def test_each_scan_has_a_row_with_volumes_flags_and_reasons(report):
    page = (report / "index.html").read_text(encoding="utf-8")
    plain, large, flagged, failed = (row_of(page, f"sub-{n}") for n in ("00", "03", "04", "99"))
    assert plain["Thalamus"] == "1.00 ± 0.01"
    assert plain["Outlying volumes"] == DASH
    assert plain["Mean entropy"] == "0.30"
    assert large["Outlying volumes"].startswith("Thalamus 1")
    assert flagged["Quality"].startswith("check noise is 0.40")
    assert failed["Quality"] == "failed sub-99_T1w.nii.gz: truncated <or> damaged"
    tiles = re.findall(r'<li><strong class="number">(.*?)</strong>(.*?)</li>', page)
    assert tiles == [
        ("12", "scans"), ("10", "pass"), ("1", "check"), ("1", "failed"), ("1", "with outlying volumes")
    ]  # fmt: skip
    assert page.count("<img ") == 11
    assert "below, entropy (nats), brightest at 0.76 and above" in text(page)  # 0.6 of 255 steps of 0.005
    assert "label map two; networks abababababab; version 0.1.0" in page


def test_with_fewer_than_ten_scans_no_volume_is_called_outlying(tmp_path):
    write_cohort(tmp_path, [f"sub-{n}" for n in range(9)])
    table = (tmp_path / "volumes.tsv").read_text().replace("1000.0", "9000.0")
    (tmp_path / "volumes.tsv").write_text(table)
    page = predictions.write_predictions_report(tmp_path, tmp_path / "report").read_text(encoding="utf-8")
    assert "No volume was judged: it takes at least 10 segmented scans, and there are 9." in text(page)
    assert "data-outlying" not in page


def test_the_first_page_holds_all_that_it_shows_and_the_others_add_the_viewer(report):
    for path in [report / "index.html", *(report / "scans").iterdir()]:
        page = re.sub(r"base64,[^\"]*|\"base64\": \"[^\"]*", "", path.read_text(encoding="utf-8"))
        assert not re.findall(r"https?://", page)
        for source in re.findall(r'(?:src|href)="([^"]*)"', page):
            assert source.startswith(("data:", "#")) or (path.parent / source).is_file()
    assert len(list((report / "scans").iterdir())) == 11


def test_strings_from_files_cannot_become_markup(tmp_path):
    write_cohort(tmp_path / "in", [ATTACK, "<img src=x onerror=alert(1)>"], failed={"z": "<b onclick=alert(1)>"})
    table = tmp_path / "in" / f"{ATTACK}_dseg.tsv"
    table.write_text(table.read_text().replace("Hippocampus", "</script><script>alert(2)</script>"))
    index = predictions.write_predictions_report(tmp_path / "in", tmp_path / "out")
    pages = [index, *(index.parent / "scans").iterdir()]
    assert len(pages) == 3
    for path in pages:
        page = path.read_text(encoding="utf-8")
        assert not re.findall(r"<script>alert|<img src=x|<b onclick", page)
        assert "&lt;" in page
    (hostile,) = (path for path in pages if "script" in path.name)
    assert hostile.parent == index.parent / "scans"
    if (index.parent / predictions.NIIVUE).exists():
        assert data_of(hostile)["labels"]["labels"][1] == "</script><script>alert(2)</script>"


@pytest.mark.parametrize("affine", [LIA, RAS_LONG], ids=["LIA", "RAS with long voxels"])
def test_the_viewers_volumes_are_the_scans_cropped_and_stay_where_they_are(tmp_path, affine, monkeypatch):
    (tmp_path / "volumes.tsv").write_bytes(scan_table([write_scan(tmp_path, "sub-1", 900.0, affine=affine)], Classes()))
    _vendor_anything(monkeypatch, tmp_path)
    index = predictions.write_predictions_report(tmp_path, tmp_path / "report")
    data = data_of(next((index.parent / "scans").iterdir()))
    assert data["labels"]["labels"] == ["background", "Hippocampus", "Thalamus"]
    assert [data["labels"][channel][2] for channel in "RGBA"] == [0x44, 0x77, 0xDD, 255]
    shown = {volume["kind"]: _decoded(volume["base64"]) for volume in data["volumes"]}
    labels = nibabel.load(tmp_path / "sub-1_dseg.nii.gz")
    for label, position in ((10, 2), (17, 1)):
        where = np.argwhere(np.asarray(labels.dataobj) == label)
        expected = nibabel.affines.apply_affine(labels.affine, where)
        found = np.argwhere(np.asarray(shown["classes"].dataobj) == position)
        in_mm = nibabel.affines.apply_affine(shown["classes"].affine, found)
        assert np.allclose(sorted(in_mm.tolist()), sorted(expected.tolist()))
    assert nibabel.aff2axcodes(shown["image"].affine) == ("L", "I", "A")
    assert np.asarray(shown["image"].dataobj).max() == 252
    assert np.asarray(shown["uncertainty"].dataobj).max() == pytest.approx(1.0)
    assert shown["image"].shape < labels.shape or affine is RAS_LONG


def _vendor_anything(monkeypatch, folder: Path) -> None:
    """Make pages with a viewer where NiiVue has not been vendored."""
    (folder / "vendor").mkdir()
    (folder / "vendor" / predictions.NIIVUE).write_text("")
    (folder / "vendor" / "niivue.LICENSE.txt").write_text("BSD-2-Clause")
    monkeypatch.setattr(predictions, "files", lambda package: folder)


def _decoded(content: str) -> nibabel.Nifti1Image:
    return nibabel.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(content)))


def test_without_niivue_there_are_pages_without_a_viewer_that_say_how_to_get_it(tmp_path, monkeypatch):
    write_cohort(tmp_path, ["sub-1"])
    monkeypatch.setattr(predictions, "files", lambda package: tmp_path)
    index = predictions.write_predictions_report(tmp_path, tmp_path / "report")
    page = next((index.parent / "scans").iterdir()).read_text(encoding="utf-8")
    assert "There is no viewer in this report: call `make viewer`" in page
    assert "<script" not in page
    assert page.count("<img ") == 1


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda folder: (folder / "sub-1_T1w.nii.gz").unlink(), "no such file; put the scan back"),
        (lambda folder: (folder / "sub-1_T1w.nii.gz").write_bytes(b"other"), "is not the scan that was segmented"),
        (lambda folder: (folder / "sub-1_dseg.nii.gz").write_bytes(b"cut"), "sub-1_dseg.nii.gz"),
        (lambda folder: (folder / "sub-1_dseg.json").write_text("{"), "sub-1_dseg.json: cannot be read"),
        (lambda folder: (folder / "sub-1_dseg.json").write_text("[]"), "Sources is missing or of another type"),
        (lambda folder: (folder / "sub-1_dseg.tsv").write_text("index\n1\n"), "sub-1_dseg.tsv"),
        (lambda folder: (folder / "sub-1_entropy.nii.gz").unlink(), "sub-1_entropy.nii.gz"),
    ],
)
def test_a_scan_whose_files_cannot_be_read_keeps_its_row_and_says_why_it_has_no_picture(tmp_path, harm, reason):
    write_cohort(tmp_path, ["sub-1", "sub-2"])
    harm(tmp_path)
    page = predictions.write_predictions_report(tmp_path, tmp_path / "report").read_text(encoding="utf-8")
    row = row_of(page, "sub-1")
    assert "No pictures:" in row["Quality"]
    assert reason in row["Quality"]
    assert row["Thalamus"] == "1.00 ± 0.01"
    assert page.count("<img ") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.replace("quality", "grade"), "is no table of scans"),
        (lambda table: table.replace("1000.0", "many"), "could not convert"),
        (lambda table: table.replace("1000.0", "inf"), "infinite"),
        (lambda table: table.replace("sub-2", "sub-1"), "sub-1 stands there twice"),
        (lambda table: "", "cannot be read"),
        (lambda table: table + "x\t" * 40 + "\n", "cannot be read"),
    ],
)
def test_a_damaged_table_is_one_line_that_names_it(tmp_path, capsys, change, message):
    write_cohort(tmp_path, ["sub-1", "sub-2"])
    path = tmp_path / "volumes.tsv"
    path.write_text(change(path.read_text()))
    assert cli.main(["report", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"dwc: {path}: ")
    assert message in line
    assert not (tmp_path / "report").exists()


def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path):
    write_cohort(tmp_path / "in", ["sub-1"])
    write_scan(tmp_path, "other", 1.0)
    with pytest.raises(InputError, match="lies outside of the folder"):
        read_sidecar(tmp_path / "in", "../other")


@pytest.mark.parametrize(
    ("folder", "message"), [("none", "no such folder"), ("empty", "has no volumes.tsv; give a folder that dwc predict")]
)
def test_a_folder_of_another_kind_is_refused(tmp_path, capsys, folder, message):
    (tmp_path / "empty").mkdir()
    assert cli.main(["report", str(tmp_path / folder)]) == 2
    assert message in capsys.readouterr().err


def test_a_second_report_replaces_the_first_and_its_pages(tmp_path):
    write_cohort(tmp_path, ["sub-1", "sub-2"])
    predictions.write_predictions_report(tmp_path, tmp_path / "report")
    write_cohort(tmp_path, ["sub-2"])
    predictions.write_predictions_report(tmp_path, tmp_path / "report")
    assert [path.name for path in (tmp_path / "report" / "scans").iterdir()] == ["0001-sub-2.html"]


def test_a_thumbnail_has_contours_in_the_classes_colours_above_the_uncertainty(tmp_path):
    write_cohort(tmp_path, ["sub-1"])
    volumes = read_volumes(Derivatives(tmp_path / "sub-1"), read_sidecar(tmp_path, "sub-1"))
    picture = np.asarray(Image.open(io.BytesIO(thumbnail(volumes, 1.0))).convert("RGB"), int)
    assert picture.shape == (2 * PANEL[0], 3 * PANEL[1], 3)
    contours, heat = picture[: PANEL[0]], picture[PANEL[0] :]
    coloured = np.ptp(contours, axis=-1) > 25
    assert 0.005 < coloured.mean() < 0.2  # lines, not areas
    assert heat.max() > 200
    assert np.ptp(heat, axis=-1).max() > 100


def test_a_structures_place_lies_within_it(tmp_path):
    write_cohort(tmp_path, ["sub-1"])
    volumes = read_volumes(Derivatives(tmp_path / "sub-1"), read_sidecar(tmp_path, "sub-1"))
    labels = nibabel.load(tmp_path / "sub-1_dseg.nii.gz")
    for position, place in volumes.places().items():
        voxel = np.rint(nibabel.affines.apply_affine(np.linalg.inv(labels.affine), place)).astype(int)
        assert labels.dataobj[tuple(voxel)] == volumes.klasses[position].label
    assert volumes.places().keys() == {1, 2}


def test_the_cohort_is_what_predict_writes_as_a_person_types_it(networks, site, tmp_path, capsys):
    out = tmp_path / "out"
    scans = [str(site / f"sub-{n}_T1w.nii.gz") for n in (0, 3)]
    words = ["predict", "--no-picture", "--n-samples", "2", "--network", networks["finetune"].name, "--out", str(out)]
    assert cli.main([*words, *scans]) == 0
    capsys.readouterr()
    assert cli.main(["report", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out / "report" / "index.html")
    cohort = read_cohort(out)
    assert list(cohort.scans.index) == ["sub-0", "sub-3"]
    page = (out / "report" / "index.html").read_text(encoding="utf-8")
    assert page.count("<img ") == 2
    assert "± " in row_of(page, "sub-0")["total"]


def test_conformed_results_of_a_map_network_without_maps_are_shown_with_contours_alone(networks, site, tmp_path):
    out = tmp_path / "out"
    words = ["--no-picture", "--maps", "none", "--conformed", "--network", networks["map"].name, "--out", str(out)]
    assert cli.main(["predict", str(site / "sub-1_T1w.nii.gz"), *words]) == 0
    page = predictions.write_predictions_report(out, tmp_path / "report").read_text(encoding="utf-8")
    assert f'height="{PANEL[0]}"' in page
    assert "below, entropy" not in page
    assert "±" not in row_of(page, "sub-1")["total"]
    scan = next((tmp_path / "report" / "scans").iterdir()).read_text(encoding="utf-8")
    assert 'id="uncertainty"' not in scan
