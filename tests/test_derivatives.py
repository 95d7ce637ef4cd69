from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from dwc.base.errors import InputError
from dwc.base.files import open_folder
from dwc.base.tsv import as_tsv
from dwc.data.conform import conform_image
from dwc.data.grid import Grid
from dwc.data.labels import LabelMap
from dwc.derivatives import name_derivatives, write_derivatives
from dwc.inputs import find_scan
from dwc.prediction import Prediction

COARSE = LabelMap.load("coarse")
GRID = Grid(64, 2.0)
OBLIQUE = np.array([[0.0, 2.5, 0.3, -40], [-1.9, 0.1, 0.8, 50], [0.2, -0.5, 3.1, -60], [0, 0, 0, 1]])


def scan_of(path: Path, kind=nib.Nifti1Image, shape=(40, 30, 25), affine=OBLIQUE) -> Path:
    """A scan of a bright block, with a patient description in its header."""
    voxels = np.zeros(shape, np.int16)
    voxels[10:25, 8:20, 5:15] = 1000
    image = kind(voxels, affine)
    if isinstance(image.header, nib.Nifti1Header):
        image.header.set_qform(affine, code=1, strip_shears=True)
        image.header.set_sform(affine, code=3)
        image.header["descrip"] = b"John Doe"
    nib.save(image, path)
    return path


def thresholded(scan: Path, klass: int = 4) -> Prediction:
    """The block as a class, with entropy and confidence 1 inside; two draws of class 1, 10 voxels apart."""
    block = conform_image(scan, GRID) > 127
    draws = np.zeros((2, COARSE.n_classes), np.int64)
    draws[:, 1] = 90, 100
    return Prediction(np.where(block, klass, 0).astype(np.uint8), *[block.astype(np.float32)] * 2, draws)


def written(scan: Path, out: Path):
    (files,) = name_derivatives([scan], out)
    mm3 = write_derivatives(files, thresholded(scan), scan, label_map=COARSE, grid=GRID)
    return files, mm3


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_results_lie_on_the_scans_own_grid_with_its_qform_and_sform(tmp_path, kind):
    scan = scan_of(tmp_path / "sub-01_T1w.nii.gz", kind)
    files, _ = written(scan, tmp_path)
    source = nib.load(scan)
    for path, dtype in ((files.labels, np.int16), (files.entropy, np.uint8)):
        image = nib.load(path)
        assert type(image) is kind
        assert image.shape == source.shape
        assert image.get_data_dtype() == dtype
        np.testing.assert_array_equal(image.affine, source.affine)
        for form in ("get_qform", "get_sform"):
            (ours, our_code), (theirs, code) = (getattr(h, form)(coded=True) for h in (image.header, source.header))
            np.testing.assert_array_equal(ours, theirs)
            assert our_code == code
        assert image.header.get_xyzt_units() == source.header.get_xyzt_units()
        assert b"John" not in image.header.binaryblock


def test_labels_are_freesurfer_ids_where_the_scan_shows_them(tmp_path):
    scan = scan_of(tmp_path / "sub-01_T1w.nii.gz")
    files, _ = written(scan, tmp_path)
    ids = np.asarray(nib.load(files.labels).dataobj)
    block = np.asarray(nib.load(scan).dataobj) > 0
    name = COARSE.names[4]
    assert set(np.unique(ids)) == {0, COARSE.to_ids(np.array([4]))[0]}
    assert 2 * ((ids > 0) & block).sum() / ((ids > 0).sum() + block.sum()) > 0.85  # a round trip through 2 mm voxels
    rows = [line.split("\t") for line in files.table.read_text().splitlines()]
    assert rows[0] == ["index", "name", "color", "side", "freesurfer_ids"]
    assert [str(ids.max()), name] in [row[:2] for row in rows]
    assert len(rows) == 1 + COARSE.n_classes
    np.testing.assert_array_equal(COARSE.apply(ids), np.where(ids > 0, 4, 0))


def test_volumes_are_those_of_the_written_labels(tmp_path):
    scan = scan_of(tmp_path / "sub-01_T1w.nii.gz")
    files, mm3 = written(scan, tmp_path)
    n_voxels = (np.asarray(nib.load(files.labels).dataobj) > 0).sum()
    assert mm3[4] == pytest.approx(n_voxels * abs(np.linalg.det(OBLIQUE[:3, :3])), rel=1e-5)
    rows = [line.split("\t") for line in files.volumes.read_text().splitlines()]
    assert rows[0] == ["index", "name", "volume_mm3", "sd_mm3"]
    assert float(rows[5][2]) == pytest.approx(mm3[4], abs=1e-3)
    assert float(rows[2][3]) == pytest.approx(10 / 2**0.5 * GRID.voxel_size**3, abs=1e-3)
    assert mm3.sum() == pytest.approx(40 * 30 * 25 * abs(np.linalg.det(OBLIQUE[:3, :3])), rel=1e-5)


def test_a_volume_drawn_once_has_no_standard_deviation(tmp_path):
    scan = scan_of(tmp_path / "a.nii.gz")
    once = replace(thresholded(scan), draws=np.zeros((1, COARSE.n_classes), np.int64))
    (files,) = name_derivatives([scan], tmp_path)
    write_derivatives(files, once, scan, label_map=COARSE, grid=GRID)
    rows = files.volumes.read_text().splitlines()[1:]
    assert {row.split("\t")[3] for row in rows} == {"n/a"}


def test_the_same_result_has_the_same_bytes(tmp_path):
    scan = scan_of(tmp_path / "sub-01_T1w.nii.gz")
    for name in ("a", "b"):
        open_folder(tmp_path / name)
    first, second = (written(scan, tmp_path / name)[0] for name in ("a", "b"))
    assert first.labels.read_bytes() == second.labels.read_bytes()


def test_mgz_scans_get_nifti_results_on_their_grid(tmp_path):
    scan = scan_of(tmp_path / "T1.mgz", nib.MGHImage, affine=Grid(64, 3.0).affine(np.zeros(3)))
    files, _ = written(scan, tmp_path)
    assert files.labels.name == "T1_dseg.nii.gz"
    np.testing.assert_allclose(nib.load(files.labels).affine, nib.load(scan).affine, atol=1e-4)
    assert nib.load(files.labels).header.get_sform(coded=True)[1] == 1


def test_a_4d_file_of_one_volume_gets_3d_results(tmp_path):
    scan = scan_of(tmp_path / "a.nii.gz")
    nib.save(nib.Nifti1Image(np.asarray(nib.load(scan).dataobj)[..., None], OBLIQUE), scan)
    files, _ = written(scan, tmp_path)
    assert nib.load(files.labels).shape == (40, 30, 25)


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("sub-01_T1w.nii.gz", "sub-01"),
        ("sub-01_ses-2_T1w.nii", "sub-01_ses-2"),
        ("a.b.nii.gz", "a.b"),
        ("T1.mgz", "T1"),
    ],
)
def test_results_are_named_after_the_scan(tmp_path, name, stem):
    (files,) = name_derivatives([Path(name)], tmp_path)
    assert files.labels == tmp_path / f"{stem}_dseg.nii.gz"
    assert files.picture == tmp_path / f"{stem}_overlay.png"


def test_a_scan_is_found_without_its_extension(tmp_path):
    scan = scan_of(tmp_path / "sub-01_T1w.nii.gz")
    assert find_scan(tmp_path / "sub-01_T1w") == find_scan(scan) == scan
    with pytest.raises(InputError, match=r"sub-02: no such file, with or without \.nii\.gz"):
        find_scan(tmp_path / "sub-02")
    with pytest.raises(InputError, match="is a folder; give scans"):
        find_scan(tmp_path)


def test_scans_that_would_overwrite_each_other_are_refused_naming_both():
    with pytest.raises(InputError, match=r"a/T1.nii.gz, b/T1.nii: would all be written as out/T1_dseg.nii.gz"):
        name_derivatives([Path("a/T1.nii.gz"), Path("c/T2.nii"), Path("b/T1.nii")], Path("out"))


def test_a_segmentation_that_is_there_is_not_overwritten_unasked(tmp_path):
    (tmp_path / "sub-01_dseg.nii.gz").write_text("a week of manual work")
    with pytest.raises(InputError, match=r"sub-01_dseg.nii.gz: exists already; .*or `overwrite` to replace it"):
        name_derivatives([Path("sub-01_T1w.nii.gz")], tmp_path)
    assert name_derivatives([Path("sub-01_T1w.nii.gz")], tmp_path, overwrite=True)


def test_a_folder_that_takes_no_files_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/results")):
        with pytest.raises(InputError, match=r"cannot be written .*; give a writable folder"):
            open_folder(out)
    open_folder(tmp_path / "new" / "below")
    assert list((tmp_path / "new" / "below").iterdir()) == []


@pytest.mark.parametrize(("code", "factor"), [(1, 1e-3), (3, 1e3)])
def test_volumes_are_in_cubic_millimetres_whatever_the_headers_unit_and_the_results_keep_it(tmp_path, code, factor):
    scan = scan_of(tmp_path / "mm.nii")
    other = scan_of(tmp_path / "other.nii", affine=np.vstack([OBLIQUE[:3] * factor, OBLIQUE[3:]]))
    content = bytearray(other.read_bytes())
    content[123] = code  # xyzt_units
    other.write_bytes(content)
    np.testing.assert_allclose(written(other, tmp_path)[1], written(scan, tmp_path)[1], rtol=1e-4)
    result = nib.load(tmp_path / "other_dseg.nii.gz")
    assert result.header.get_xyzt_units()[0] == {1: "meter", 3: "micron"}[code]
    np.testing.assert_allclose(result.affine, nib.load(other).affine)


def test_results_of_a_scan_whose_quaternion_is_off_by_rounding_can_be_read(tmp_path):
    scan = scan_of(tmp_path / "a.nii", affine=np.diag([-2.0, -2, 2, 1]))
    header = nib.load(scan).header
    header["sform_code"], header["quatern_d"] = 0, np.float32(1 + 1e-5)
    content = bytearray(scan.read_bytes())
    content[:348] = header.binaryblock
    scan.write_bytes(content)
    with pytest.raises(ValueError, match="w2 should be positive"):
        nib.load(scan)
    written(scan, tmp_path)
    np.testing.assert_allclose(nib.load(tmp_path / "a_dseg.nii.gz").affine[:3, :3], np.diag([-2, -2, 2]), atol=1e-3)


def test_names_that_no_system_takes_and_links_to_nowhere_are_refused_in_one_line(tmp_path):
    (tmp_path / "link.nii.gz").symlink_to(".git/annex/objects/x")
    for path, message in (
        (tmp_path / ("x" * 5000), "too long"),
        (tmp_path / "link", "datalad get"),
        (tmp_path / "a\x1b[31m.nii", "control character"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            find_scan(path)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["SUB-01_T1w.NII.GZ", "SUB-01.Nii", "SUB-01.IMG.GZ", "SUB-01.MGZ"])
def test_results_are_named_after_the_scan_in_any_case(tmp_path, name):
    (files,) = name_derivatives([Path(name)], tmp_path)
    assert files.labels.name == "SUB-01_dseg.nii.gz"


def test_no_name_of_a_class_runs_in_a_spreadsheet():
    assert as_tsv(("index", "name"), [(1, "=cmd|x"), (2, "plain")]) == b"index\tname\n1\t'=cmd|x\n2\tplain\n"
