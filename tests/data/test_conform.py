import gzip
import shutil
import subprocess
import sysconfig
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.processing import resample_from_to
from scipy.spatial.transform import Rotation

from dwc.base.errors import InputError
from dwc.data.conform import conform_image, conform_labels, load_image, load_labels, place, to_native
from dwc.data.grid import Grid
from dwc.data.intensity import to_uint8
from dwc.data.labels import LabelMap

FIFTY = LabelMap.load("fifty")
RNG = np.random.default_rng(0)
VOXELS = RNG.integers(1, 1000, (12, 14, 16), np.int16)
OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = Rotation.from_euler("xyz", [9, -6, 14], degrees=True).as_matrix() @ np.diag([1.9, 2.6, 2.2])


def test_the_grid_is_lia_about_the_centre():
    affine = Grid(64, 3.0).affine(np.array([1.0, 2, 3]))
    assert nib.aff2axcodes(affine) == ("L", "I", "A")
    np.testing.assert_allclose(nib.affines.voxel_sizes(affine), 3)
    np.testing.assert_allclose(affine @ [32, 32, 32, 1], [1, 2, 3, 1])
    with pytest.raises(InputError, match="size 0"):
        Grid(0)


@pytest.mark.parametrize("grid", [Grid(32, 2.0), Grid(16, 1.0)])
def test_a_conformed_volume_passes_byte_for_byte(save, grid):
    voxels = RNG.integers(0, 200, grid.shape, np.uint8)
    path = save("x.nii.gz", voxels, grid.affine(np.array([5.0, -7, 11])))
    np.testing.assert_array_equal(conform_image(path, grid), voxels)
    ids = RNG.choice(np.array(FIFTY.ids, np.int16), grid.shape)
    labels = save("l.nii.gz", ids, grid.affine(np.array([5.0, -7, 11])))
    np.testing.assert_array_equal(conform_labels(labels, grid, FIFTY, path), FIFTY.apply(ids))
    np.testing.assert_array_equal(to_native(voxels, path, grid, order=0), voxels)


def test_another_orientation_of_the_same_lattice_is_only_reordered(save):
    grid = Grid(16, 2.0)
    voxels = np.zeros(grid.shape, np.uint8)
    voxels[4:12, 5:9, 3:10] = RNG.integers(0, 200, (8, 4, 7), np.uint8)
    lia = nib.Nifti1Image(voxels, grid.affine(np.zeros(3)))
    ras = nib.as_closest_canonical(lia)
    path = save("ras.nii.gz", np.asanyarray(ras.dataobj), ras.affine)
    conformed = conform_image(path, grid)
    np.testing.assert_array_equal(conformed, voxels)
    np.testing.assert_array_equal(to_native(conformed, path, grid, order=0), ras.dataobj)


def test_intensities_become_uint8_with_the_brightest_clipped_and_the_darkest_kept(save):
    voxels = np.linspace(-50, 950, 40**3).reshape(40, 40, 40).astype(np.float32)
    voxels[0, 0, :5] = 1e4  # brighter than all, fewer than one in a thousand
    scaled = to_uint8(voxels)
    assert scaled.dtype == np.uint8
    assert scaled.min() == 0
    assert scaled.max() == 255
    expected = np.clip((voxels + 50) / 1000 * 255, 0, 255)
    assert np.abs(scaled - expected).max() < 6  # the bins are 10 wide
    np.testing.assert_array_equal(to_uint8(scaled), scaled)


def test_one_extreme_voxel_does_not_divide_by_zero(save):
    voxels = np.ones((4, 4, 4), np.float32)
    voxels[0, 0, 0] = 1e9
    assert set(np.unique(to_uint8(voxels))) == {0, 255}


def test_an_oblique_anisotropic_scan_comes_back_to_its_own_grid(save):
    x, y, z = np.indices((30, 24, 28))
    voxels = (100 + 80 * np.sin(x / 6) * np.cos(y / 5) * np.sin(z / 7)).astype(np.float32)
    path = save("oblique.nii.gz", voxels, OBLIQUE)
    grid = Grid(96, 1.0)
    conformed = conform_image(path, grid)
    native = to_native(conformed.astype(np.float32), path, grid, order=1)
    assert native.shape == voxels.shape
    assert native.dtype == np.float32
    inside = np.s_[3:-3, 3:-3, 3:-3]
    assert np.corrcoef(native[inside].ravel(), voxels[inside].ravel())[0, 1] > 0.995


def test_labels_and_image_stay_aligned_and_labels_are_never_mixed(save):
    ids = np.zeros((30, 24, 28), np.int16)
    ids[8:20, 6:18, 9:21] = 1035
    ids[12:16, 9:14, 13:17] = 11
    ids[2, 2, 2] = 31
    grid = Grid(64, 1.5)
    image = save("i.nii.gz", (ids > 0).astype(np.float32) * 100, OBLIQUE)
    labels = save("l.nii.gz", ids.astype(np.float32), OBLIQUE)
    classes = conform_labels(labels, grid, FIFTY, image)
    assert classes.dtype == np.uint8
    assert set(np.unique(classes)) == {0, 6, 49}
    assert np.mean((classes > 0) == (conform_image(image, grid) > 127)) > 0.999


def test_a_trailing_dimension_of_one_volume_is_dropped(save):
    flat, four = save("3.nii.gz", VOXELS), save("4.nii.gz", VOXELS[..., None])
    grid = Grid(32, 1.0)
    assert load_image(four).shape == VOXELS.shape
    np.testing.assert_array_equal(conform_image(four, grid), conform_image(flat, grid))
    assert to_native(np.zeros(grid.shape), four, grid, order=1).shape == VOXELS.shape


def test_scaling_in_the_header_and_mgz_files_are_read(tmp_path, save):
    image = nib.Nifti1Image(VOXELS.astype(np.float32) / 7, np.eye(4))
    image.set_data_dtype(np.uint8)
    nib.save(image, tmp_path / "scaled.nii.gz")
    np.testing.assert_allclose(load_image(tmp_path / "scaled.nii.gz").get_fdata(), VOXELS / 7, atol=0.5)
    nib.save(nib.MGHImage(VOXELS, np.eye(4)), tmp_path / "x.mgz")
    np.testing.assert_array_equal(load_image(tmp_path / "x.mgz").dataobj, VOXELS)


def _with(value) -> np.ndarray:
    voxels = VOXELS.astype(np.float32)
    voxels[1, 2, 3] = value
    return voxels


@pytest.mark.parametrize(
    ("voxels", "message"),
    [
        (np.stack([VOXELS] * 2, -1), "4-D"),
        (VOXELS[0], "2-D"),
        (_with(np.nan), "1 voxels are NaN or infinite"),
        (_with(np.inf), "1 voxels are NaN or infinite"),
        (np.full((8, 8, 8), 7, np.int16), "every voxel is 7"),
        (VOXELS.astype(np.complex64), "complex64"),
    ],
)
def test_a_bad_image_is_refused_in_one_line_that_names_it(save, voxels, message):
    path = save("bad.nii.gz", voxels)
    with pytest.raises(InputError, match=message) as caught:
        load_image(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.nii\.gz: no such file"):
        load_image(tmp_path / "none.nii.gz")


@pytest.mark.parametrize("name", ["text.nii.gz", "text.nii", "text.txt", "text.mgz"])
def test_a_file_that_is_no_volume_is_named(tmp_path, name):
    (tmp_path / name).write_text("this is not a scan\n" * 100)
    with pytest.raises(InputError, match=f"{name}: not a NIfTI"):
        load_image(tmp_path / name)


def test_a_gzipped_text_and_an_empty_file_are_no_volumes(tmp_path):
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(b"this is not a scan\n" * 100))
    (tmp_path / "b.nii.gz").touch()
    for name in ("a.nii.gz", "b.nii.gz"):
        with pytest.raises(InputError, match=f"{name}: not a NIfTI"):
            load_image(tmp_path / name)


@pytest.mark.parametrize("name", ["cut.nii.gz", "cut.nii"])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.999])
@pytest.mark.parametrize("voxels", [VOXELS, VOXELS[..., None]], ids=["3-D", "4-D of one volume"])
def test_a_truncated_file_is_named(save, name, kept, voxels):
    path = save(name, voxels)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(InputError, match=rf"{name}: (truncated or damaged|not a NIfTI)") as caught:
        load_image(path)
    assert "\n" not in str(caught.value)


def test_an_affine_without_volume_is_refused(save):
    affine = np.diag([1.0, 1, 0, 1])
    path = save("flat.nii.gz", VOXELS)
    header = bytearray(gzip.decompress(path.read_bytes()))
    image = nib.load(path)
    image.header.set_sform(affine, 1)
    header[:348] = image.header.binaryblock
    path.write_bytes(gzip.compress(bytes(header)))
    with pytest.raises(InputError, match="has no volume"):
        load_image(path)


def test_labels_that_are_not_whole_numbers_are_refused(save):
    with pytest.raises(InputError, match=r"not whole numbers \(2\.5\)"):
        load_labels(save("l.nii.gz", np.where(VOXELS > 500, 2.5, 2.0)))


def test_labels_off_the_images_grid_are_refused_naming_both(save):
    image = save("image.nii.gz", VOXELS)
    other_shape = save("shape.nii.gz", VOXELS[:-1])
    other_place = save("place.nii.gz", VOXELS, np.array([[2, 0, 0, 1.0], [0, 2, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]]))
    for path, message in ((other_shape, "shape"), (other_place, "by up to 1 mm")):
        with pytest.raises(InputError, match=message) as caught:
            conform_labels(path, Grid(32), FIFTY, image)
        assert str(path) in str(caught.value)
        assert str(image) in str(caught.value)


@pytest.mark.parametrize("ids", [[0], [3, 42], [0, 30, 5000]])
def test_labels_without_any_listed_id_are_refused(save, ids):
    path = save("l.nii.gz", RNG.choice(np.array(ids, np.int16), (8, 8, 8)))
    with pytest.raises(InputError, match=r"l\.nii\.gz: holds none of the ids of label map 'coarse'; give `label_map`"):
        conform_labels(path, Grid(32), LabelMap.load("coarse"))


def test_labels_of_which_more_than_a_quarter_has_unlisted_ids_are_refused(save, tmp_path):
    ids = np.zeros((10, 10, 10), np.int16)
    ids[:4] = 2
    ids[0, :10, :10] = 42
    conform_labels(save("quarter.nii.gz", ids), Grid(32), FIFTY)
    ids[1, 0, 0] = 3
    path = save("more.nii.gz", ids)
    with pytest.raises(InputError, match=r"more\.nii\.gz: 25% .* label map 'fifty' does not list \(42, 3\)"):
        conform_labels(path, Grid(32), FIFTY)
    (tmp_path / "mine.tsv").write_text("index\tclass\tname\n2\t1\twhite\n3\t0\tcortex\n42\t0\tcortex\n")
    conform_labels(path, Grid(32), LabelMap.load(tmp_path / "mine.tsv"))


def test_an_image_of_which_the_grid_keeps_only_air_is_refused(save):
    voxels = np.zeros((40, 40, 40), np.int16)
    voxels[0, 0, 0] = 5
    with pytest.raises(InputError, match="only the value 0 is left"):
        conform_image(save("corner.nii.gz", voxels), Grid(16, 1.0))


@pytest.fixture(scope="session")
def niimath() -> str:
    found = shutil.which("niimath") or shutil.which("niimath", path=sysconfig.get_path("scripts"))
    if found is None:
        pytest.skip("niimath is not installed (pip install niimath)")
    return found


@pytest.fixture(scope="session")
def oblique_scan(shared_data, tmp_path_factory) -> Path:
    """The real scan as another scanner would give it: oblique, anisotropic, 16 bit, of odd shape."""
    real = nib.load(shared_data / "real" / "S1_T1w.nii.gz")
    linear = Rotation.from_euler("xyz", [8, -5, 12], degrees=True).as_matrix() @ np.diag([1.4, 2.1, 1.7])
    shape = (131, 100, 120)
    affine = np.eye(4)
    affine[:3, :3] = linear
    middle = (real.affine @ [128, 128, 128, 1])[:3]
    affine[:3, 3] = middle - linear @ (np.array(shape) / 2)
    voxels = np.asanyarray(real.dataobj).astype(np.float32) * 3.7
    scan = resample_from_to(nib.Nifti1Image(voxels, real.affine), (shape, affine), order=1)
    path = tmp_path_factory.mktemp("oblique") / "scan.nii.gz"
    nib.save(nib.Nifti1Image(np.asanyarray(scan.dataobj).astype(np.int16), affine), path)
    return path


def test_a_real_oblique_scan_conforms_as_niimath_conforms_it(oblique_scan, niimath, tmp_path, monkeypatch):
    subprocess.run([niimath, oblique_scan, "-conform", tmp_path / "out", "-odt", "char"], check=True, timeout=120)
    theirs = nib.load(tmp_path / "out.nii.gz")
    np.testing.assert_allclose(place(oblique_scan, Grid()).affine, theirs.affine, atol=1e-3)
    # niimath -conform clips the brightest 2 %, mri_convert 0.1 %
    monkeypatch.setattr(to_uint8, "__defaults__", (1000, 0.02))
    difference = np.abs(conform_image(oblique_scan, Grid()).astype(int) - np.asanyarray(theirs.dataobj))
    assert np.mean(difference > 1) < 1e-5


def test_intensities_of_a_real_scan_are_clipped_as_niimath_clips_them(oblique_scan, niimath, tmp_path):
    settings = ["256", "256", "256", "1", "1", "1", "0.999", "1"]
    command = [niimath, oblique_scan, "-comply", *settings, tmp_path / "out", "-odt", "char"]
    subprocess.run(command, check=True, timeout=120)
    theirs = nib.load(tmp_path / "out.nii.gz")
    ours = nib.Nifti1Image(conform_image(oblique_scan, Grid()), place(oblique_scan, Grid()).affine)
    ours = resample_from_to(ours, theirs, order=0)  # the same lattice in another order
    inside = np.s_[1:-1, 1:-1, 1:-1]
    difference = np.abs(np.asanyarray(ours.dataobj).astype(int) - np.asanyarray(theirs.dataobj))[inside]
    assert np.mean(difference > 1) < 1e-5


def test_a_real_scan_and_an_aseg_are_no_labels(shared_data, save):
    real = nib.load(shared_data / "real" / "S1_aparc+aseg.nii.gz")
    ids = np.asanyarray(real.dataobj).astype(np.int16)
    ids[ids >= 1000] = np.where(ids[ids >= 1000] < 2000, 3, 42)
    for path, grid in (
        (shared_data / "real" / "S1_T1w.nii.gz", Grid(32, 8.0)),
        (save("aseg.nii.gz", ids), Grid(32, 8.0)),
    ):
        with pytest.raises(InputError, match=f"{path.name}: .* does not list"):
            conform_labels(path, grid, FIFTY)


def test_the_real_scan_is_conformed_already_and_its_labels_fit(shared_data):
    folder = shared_data / "real"
    voxels = np.asanyarray(nib.load(folder / "S1_T1w.nii.gz").dataobj)
    np.testing.assert_array_equal(conform_image(folder / "S1_T1w.nii.gz", Grid()), voxels)
    classes = conform_labels(folder / "S1_aparc+aseg.nii.gz", Grid(), FIFTY, folder / "S1_T1w.nii.gz")
    assert len(np.unique(classes)) > 45
    assert voxels[classes == 1].mean() > voxels[classes > 15].mean() > voxels[classes == 2].mean()


@pytest.mark.parametrize(
    ("size", "voxel_size"), [(32.5, 1.0), (True, 1.0), (0, 1.0), ("32", 1.0), (32, 0.0), (32, "1")]
)
def test_a_grid_of_no_size_is_refused(size, voxel_size):
    with pytest.raises(InputError, match=r"a grid of size .* give a positive whole number of voxels"):
        Grid(size, voxel_size)
