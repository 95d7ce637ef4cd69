"""What the checks of scans find."""

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from dwc.base import ranks
from dwc.base.errors import InputError
from dwc.data.admission import admit
from dwc.data.cache import prepare
from dwc.data.checks import check_each, check_scans
from dwc.data.findings import CheckedScan, tell
from dwc.data.grid import Grid
from dwc.data.labels import LabelMap
from dwc.data.scan import Scan

FIFTY = LabelMap.load("fifty")
GRID = Grid(64, 2.0)
RAS = np.diag([2.0, 2, 2, 1])


def head(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A bright block in air, and labels of its left and right half."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 10, (60, 60, 50)).astype(np.int16)
    image[10:50, 10:50, 10:40] = rng.integers(200, 800, (40, 40, 30))
    labels = np.zeros(image.shape, np.int16)
    labels[12:30, 12:48, 12:38], labels[30:48, 12:48, 12:38] = 2, 41
    return image, labels


@pytest.fixture
def scan(tmp_path):
    """scan(name, image, labels): files of a scan; without arrays, those of `head`."""

    def scan(
        name: str = "a", image=None, labels=None, *, affine=RAS, subject: str = "", split="train", **fields
    ) -> Scan:
        default = head(sum(map(ord, name)))
        paths = [tmp_path / f"{name}_{suffix}.nii.gz" for suffix in ("T1w", "dseg")]
        for path, voxels, other in zip(paths, (image, labels), default, strict=True):
            volume = nib.Nifti1Image(other if voxels is None else voxels, affine)
            volume.set_qform(affine, 1)
            content = bytearray(volume.to_bytes())
            header = nib.Nifti1Header(bytes(content[:348]))
            for field, value in fields.items():
                header[field] = value
            content[:348] = header.binaryblock
            path.write_bytes(gzip.compress(bytes(content)))
        return Scan(*paths, subject or name, "H", split)

    return scan


def check(*scans: Scan) -> list[CheckedScan]:
    return check_scans(scans, GRID, FIFTY, workers=1, progress=False)


def found(*scans: Scan) -> set[tuple[str, str]]:
    return {(finding.severity, finding.topic) for one in check(*scans) for finding in one.findings}


def test_a_good_scan_has_no_findings_and_its_facts(scan):
    (one,) = check(scan())
    assert one.findings == ()
    assert one.facts["shape"] == (60, 60, 50)
    assert one.facts["voxel_mm"] == (2.0, 2.0, 2.0)
    assert one.facts["axes"] == "RAS"
    assert one.facts["grey_levels"] > 150
    assert one.facts["unlisted_ids"] == 0
    assert one.facts["labels_on_signal"] > 0.99
    assert one.voxels_of_class.sum() == 64**3
    assert one.voxels_of_class[1] == 36 * 36 * 26


def test_units_thick_slices_and_headers_at_odds_are_told(scan):
    assert ("warning", "units") in found(scan(affine=np.diag([0.002, 0.002, 0.002, 1]), xyzt_units=1))
    assert ("warning", "geometry") in found(scan(affine=np.diag([1.0, 1, 5, 1])))
    assert ("warning", "geometry") in found(scan(quatern_d=0.5))
    assert ("warning", "left and right") in found(scan(sform_code=0, qform_code=0))


def test_edges_no_head_has_skewed_axes_and_a_qform_that_is_not_finite_are_told(scan):
    def topics(**fields) -> set[tuple[str, str]]:
        return found(replace(scan(**fields), label=None))

    assert ("error", "units") in topics(affine=np.diag([0.4, 0.4, 0.4, 1]))
    assert topics(image=head()[0][:, :, 15:20], labels=head()[1][:, :, 15:20]) >= {("warning", "geometry")}
    skewed = RAS.copy()
    skewed[:3, 2] = [2, 0, 0.01]
    assert ("warning", "geometry") in topics(affine=skewed, qform_code=0)
    assert ("warning", "geometry") in topics(quatern_b=np.nan)
    assert ("warning", "geometry") in topics(qoffset_x=np.inf)


def test_few_grey_levels_are_told(scan):
    image = head()[0] // 100
    assert found(scan(image=image)) == {("warning", "intensity")}


def test_a_head_that_the_grid_cuts_off_is_told(scan):
    image = np.pad(head()[0], ((0, 0), (0, 0), (0, 60)))
    image[10:50, 10:50, 75:109] = 500
    labels = np.zeros(image.shape, np.int16)
    labels[12:30, 12:48, 80:100], labels[30:48, 12:48, 80:100] = 2, 41
    (one,) = check(scan(image=image, labels=labels))
    assert [finding.topic for finding in one.findings] == ["cut off", "cut off"]
    assert "lie outside of the grid" in one.findings[1].message


def test_labels_outside_the_map_are_told_and_of_another_kind_refused(scan):
    labels = head()[1]
    labels[12:14] = np.where(labels[12:14] > 0, 9999, 0)
    assert found(scan(labels=labels)) == {("warning", "labels")}
    labels[12:30] = np.where(labels[12:30] > 0, 9999, 0)
    assert found(scan(labels=labels)) == {("error", "file")}


def test_labels_in_8_bits_under_a_map_of_larger_ids_are_told(scan):
    assert found(scan(labels=head()[1].astype(np.uint8))) == {("warning", "labels")}


def test_a_mirrored_volume_is_told_by_its_ids(scan):
    image, labels = head()
    assert found(scan(image=image[::-1], labels=labels[::-1])) == {("warning", "left and right")}


def test_a_scan_mirrored_against_its_neighbours_is_told(scan):
    scans = [scan(name) for name in "abcd"]
    assert found(*scans) == set()
    image, labels = head(9)
    flipped = np.diag([-2.0, 2, 2, 1])
    odd = scan("e", image[::-1], labels[::-1], affine=flipped)
    checked = check(*scans, odd)
    assert [len(one.findings) for one in checked] == [0, 0, 0, 0, 1]
    assert "mirrored against the others" in checked[-1].findings[0].message


def test_labels_of_another_brain_are_told(scan):
    labels = np.roll(head()[1], 25, axis=1)
    assert ("warning", "overlap") in found(scan(labels=labels))


def test_labels_off_the_images_grid_are_refused(scan):
    assert found(scan(labels=head()[1][1:])) == {("error", "file")}


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32])
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_same_scan_under_two_names_is_told_and_refused_between_train_and_test(scan, tmp_path, dtype, split):
    first = scan("a", subject="one")
    volume = nib.load(first.image)
    other = volume.as_reoriented(np.array([[1, -1], [0, 1], [2, -1]]))
    nib.save(nib.Nifti1Image(np.asanyarray(other.dataobj).astype(dtype), other.affine), tmp_path / "copy.nii")
    second = Scan(tmp_path / "copy.nii", None, "two", "H", split)
    severity = "warning" if split == "train" else "error"
    assert found(first, second) == {(severity, "duplicate")}


def test_two_spellings_of_a_subject_are_told(scan):
    assert found(scan("a", subject="sub-01"), scan("b", subject="1")) == {("warning", "subject")}


def test_several_refusals_are_told_in_one_line_and_warnings_printed(scan, capsys):
    good, bad = scan("a", image=head()[0] // 100), scan("b")
    bad.image.write_bytes(bad.image.read_bytes()[:-2000])
    tell(check(good))
    assert capsys.readouterr().err.startswith(f"warning: {good.image}: the head has")
    with pytest.raises(InputError, match=r"b_T1w\.nii\.gz: truncated or damaged .* \(and 1 more"):
        tell(check(good, bad, replace(bad, subject="c")))


def test_training_refuses_one_file_in_both_parts_also_when_it_is_prepared(scan, tmp_path):
    first = scan("a")
    shutil.copy(first.image, tmp_path / "copy.nii.gz")
    second = replace(first, image=tmp_path / "copy.nii.gz", subject="b", split="test")
    with pytest.raises(InputError, match=r"copy\.nii\.gz: holds the same scan as .*one to train and one to test on"):
        admit([first, second], FIFTY, GRID, tmp_path / "cache")
    prepare([first, second], FIFTY, GRID, tmp_path / "cache", workers=1, progress=False)
    with pytest.raises(InputError, match=r"one to train and one to test on"):
        admit([first, second], FIFTY, GRID, tmp_path / "cache")


def test_prepared_scans_are_not_checked_again(scan, tmp_path, monkeypatch, capsys):
    odd = scan("a", image=head()[0] // 100)
    admit([odd], FIFTY, GRID, tmp_path / "cache")
    assert "grey levels" in capsys.readouterr().err
    prepare([odd], FIFTY, GRID, tmp_path / "cache", workers=1, progress=False)
    admit([odd], FIFTY, GRID, tmp_path / "cache")
    assert capsys.readouterr().err == ""


def test_a_rescaled_copy_of_a_prepared_scan_is_not_tested_on(scan, tmp_path):
    first = scan("a")
    prepare([first], FIFTY, GRID, tmp_path / "cache", workers=1, progress=False)
    volume = nib.load(first.image)
    copy = nib.Nifti1Image(2 * np.asanyarray(volume.dataobj), volume.affine)
    nib.save(copy, tmp_path / "copy.nii")
    second = replace(first, image=tmp_path / "copy.nii", subject="b", split="test")
    for scans in ([first, second], [second, first]):
        with pytest.raises(InputError, match=r"one to train and one to test on"):
            admit(scans, FIFTY, GRID, tmp_path / "cache")


def test_prepared_scans_count_where_a_mirrored_one_is_compared_with_its_neighbours(scan, tmp_path, capsys):
    scans = [scan(name) for name in "abcd"]
    prepare(scans, FIFTY, GRID, tmp_path / "cache", workers=1, progress=False)
    image, labels = head(9)
    odd = scan("e", image[::-1], labels[::-1], affine=np.diag([-2.0, 2, 2, 1]))
    admit([*scans, odd], FIFTY, GRID, tmp_path / "cache", progress=False)
    assert "mirrored against the others" in capsys.readouterr().err


def test_each_rank_compares_the_scans_of_all(scan, tmp_path, monkeypatch):
    scans = [scan("a"), scan("b"), scan("a", subject="c", split="test")]
    copy = tmp_path / "copy.nii.gz"
    shutil.copy(scans[0].image, copy)
    scans[1:] = [replace(scans[2], image=copy)]
    parts = [[one.to_json() for one in check_each([single], GRID, FIFTY, progress=False)] for single in scans]
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr(ranks, "share", lambda items: items[1:])
    monkeypatch.setattr(ranks, "gather", lambda _: json.loads(json.dumps(parts)))
    checked = check_scans(scans, GRID, FIFTY, progress=False)
    assert [one.is_refused for one in checked] == [False, True]
    assert checked[0].facts["shape"] == (60, 60, 50)
    with pytest.raises(InputError, match="one to train and one to test on"):
        tell(checked)


def test_outliers_do_not_count_as_grey_levels_of_a_head(scan):
    image = head()[0]
    hot = np.random.default_rng(1).choice(np.flatnonzero(image > 100), 300, replace=False)
    image.flat[hot] = np.random.default_rng(2).integers(800, 32000, 300)
    (one,) = check(scan(image=image))
    assert one.facts["grey_levels"] < 64
    assert "intensity" in {finding.topic for finding in one.findings}


def test_air_above_the_dark_tenth_of_the_range_is_told(scan):
    image = head()[0] + 500
    image[:6] = 0
    (one,) = check(scan(image=np.where(image == 0, 0, image).astype(np.int16)))
    assert one.findings == ()  # clipped
    image = np.where(head()[0] < 10, 300, head()[0]).astype(np.int16)
    image[0, 0] = np.arange(50)
    assert any("most common grey level" in finding.message for finding in check(scan(image=image))[0].findings)


def test_the_real_scan_has_no_findings(shared_data):
    folder = Path(shared_data) / "real"
    real = Scan(folder / "S1_T1w.nii.gz", folder / "S1_aparc+aseg.nii.gz", "S1", "S", "train")
    (one,) = check_scans([real], Grid(64, 4.0), FIFTY, progress=False)
    assert one.findings == ()


def test_a_few_labelled_voxels_beyond_a_small_grid_are_told(scan):
    image, labels = head()
    image[:, :, 2:48] = np.random.default_rng(0).integers(200, 800, (60, 60, 46))
    labels[29:31, 29:31, 2:48] = 2
    (one,) = check_scans([scan(image=image, labels=labels)], Grid(44, 2.0), FIFTY, progress=False)
    assert any("% of the labelled voxels lie outside" in finding.message for finding in one.findings)
    assert not one.is_refused
