"""Where scans of any size, spacing and storage order go on the grid, and back."""

from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nibabel.affines import from_matvec
from nibabel.orientations import inv_ornt_aff
from scipy.spatial.transform import Rotation

from dwc.base.errors import InputError
from dwc.data.conform import conform_image, conform_labels, place, to_native
from dwc.data.grid import Grid
from dwc.data.intensity import SIGNAL, to_uint8
from dwc.data.labels import LabelMap
from dwc.data.resampling import resample_image, resample_labels

FIFTY = LabelMap.load("fifty")
RAS = nib.orientations.axcodes2ornt("RAS")
ONE_FILE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
SIZES = st.tuples(*[st.integers(9, 31)] * 3)
ORDERS = st.permutations([0, 1, 2]).flatmap(
    lambda axes: st.tuples(*[st.sampled_from([-1, 1])] * 3).map(lambda flips: np.column_stack([axes, flips]))
)


def blob(shape, seed: int = 0) -> np.ndarray:
    """Label ids in an ellipsoid of several classes, with air around."""
    axes = np.meshgrid(*[np.linspace(-1, 1, size) for size in shape], indexing="ij")
    radius = np.sqrt(sum(axis**2 for axis in axes))
    ids = np.where(radius < 0.8, np.where(axes[0] > 0.1 * seed, 1035, 2), 0)
    return np.where(radius < 0.35, 10, ids).astype(np.int16)


def saved(path, voxels, spacing, order=None, dtype=np.int16):
    """A volume centred about (3, -7, 11) mm, in RAS or another storage order."""
    affine = np.diag([*np.broadcast_to(spacing, 3), 1.0])
    affine[:3, 3] = np.array([3, -7, 11]) - np.floor(np.array(voxels.shape) / 2) * spacing
    voxels = voxels.astype(dtype)
    if order is not None:
        affine = affine @ inv_ornt_aff(order, voxels.shape)
        voxels = nib.apply_orientation(voxels, order)
    nib.save(nib.Nifti1Image(voxels, affine, dtype=dtype), path)
    return path


@ONE_FILE
@given(shape=SIZES, order=ORDERS, spacing=st.sampled_from([1.0, 2.0, 0.5]))
def test_a_scan_at_the_grids_spacing_comes_back_as_it_was_at_any_size_and_storage_order(
    tmp_path, shape, order, spacing
):
    ids = blob(shape)
    shape = np.array(shape)
    if (shape * spacing).max() < 10:
        return
    path = saved(tmp_path / "l.nii", ids, spacing, order)
    grid = Grid(32, spacing)
    classes = conform_labels(path, grid, FIFTY, path)
    assert np.count_nonzero(classes) == np.count_nonzero(ids)
    native = to_native(classes, path, grid, order=0)
    np.testing.assert_array_equal(native, FIFTY.apply(np.asanyarray(nib.load(path).dataobj)))
    image = conform_image(saved(tmp_path / "i.nii", ids % 200, spacing, order, np.uint8), grid)
    np.testing.assert_array_equal(np.unique(image), np.unique(ids % 200))


@ONE_FILE
@given(
    shape=SIZES, order=ORDERS,
    spacing=st.sampled_from([1.0, 0.5, 1.5, 0.75, (1.0, 1.0, 1.25), (2.0, 0.5, 1.0)]),
)  # fmt: skip
def test_results_do_not_depend_on_the_order_in_which_a_file_stores_its_voxels(tmp_path, shape, order, spacing):
    if (np.array(shape) * spacing).max() < 10:
        return
    ids, image = blob(shape), np.random.default_rng(0).integers(0, 200, shape)
    plain, turned = (saved(tmp_path / f"{n}.nii", ids, spacing, o) for n, o in (("a", None), ("b", order)))
    i_plain, i_turned = (saved(tmp_path / f"i{n}.nii", image, spacing, o) for n, o in (("a", None), ("b", order)))
    grid = Grid(64, 1.0)
    classes = conform_labels(plain, grid, FIFTY, i_plain)
    np.testing.assert_array_equal(conform_labels(turned, grid, FIFTY, i_turned), classes)
    np.testing.assert_array_equal(conform_image(i_turned, grid), conform_image(i_plain, grid))
    back, turned_back = (to_native(classes, path, grid, order=0) for path in (i_plain, i_turned))
    np.testing.assert_array_equal(turned_back, nib.apply_orientation(back, order))


@ONE_FILE
@given(shape=SIZES, spacing=st.sampled_from([0.5, 0.8, 1.2, 1.5]), seed=st.integers(0, 3))
def test_labels_and_image_move_alike_at_any_size(tmp_path, shape, spacing, seed):
    """The centre of a structure is the centre of its bright image, there and back."""
    if (np.array(shape) * spacing).max() < 10:
        return
    inside = blob(shape, seed) > 0
    if inside.sum() * np.prod(spacing) < 500:
        return
    labels = saved(tmp_path / "l.nii", np.where(inside, 2, 0), spacing)
    image = saved(tmp_path / "i.nii", inside * 200, spacing, dtype=np.uint8)
    grid = Grid(64, 1.0)
    classes, grey = conform_labels(labels, grid, FIFTY, image), conform_image(image, grid)
    where = np.indices(classes.shape).reshape(3, -1)
    by_labels = where @ (classes.ravel() > 0) / np.count_nonzero(classes)
    by_image = where @ grey.ravel().astype(float) / grey.sum(dtype=float)
    assert np.abs(by_labels - by_image).max() < 0.3  # of a structure a few voxels wide
    np.testing.assert_array_equal(classes[grey > 140] > 0, True)
    np.testing.assert_array_equal(classes[grey < 60] > 0, False)


@pytest.mark.parametrize("odd", [0, 1])
def test_half_millimetre_labels_keep_their_volumes_and_their_places_there_and_back(tmp_path, odd):
    ids = blob((80 + odd, 90 + odd, 84 + odd))
    ids[ids == 1035] = 2  # a shell around a core
    path = saved(tmp_path / "l.nii", ids, 0.5)
    grid = Grid(64, 1.0)
    native = to_native(conform_labels(path, grid, FIFTY, path), path, grid, order=0)
    truth = FIFTY.apply(ids)
    for klass in np.unique(truth)[1:]:
        ours, theirs = native == klass, truth == klass
        assert 2 * np.count_nonzero(ours & theirs) / (ours.sum() + theirs.sum()) > 0.94
        assert ours.sum() / theirs.sum() == pytest.approx(1, abs=0.06)
        centres = [np.argwhere(part).mean(axis=0) for part in (ours, theirs)]
        np.testing.assert_allclose(*centres, atol=0.25)


def _by_classes(classes, positions, shape):
    """The vote as it is defined: each class interpolated like an image, the largest wins."""
    shares = [resample_image((classes == k).astype(np.float64), positions, shape) for k in range(classes.max() + 1)]
    return np.sort(shares, axis=0), np.argmax(shares, axis=0)


@given(seed=st.integers(0, 1000), shift=st.tuples(*[st.floats(-1, 1)] * 3), turn=st.floats(-0.3, 0.3))
def test_a_vote_is_the_class_that_interpolation_gives_the_most(seed, shift, turn):
    classes = np.random.default_rng(seed).integers(0, 4, (9, 8, 7), np.uint8)
    positions = np.eye(4)
    positions[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    positions[:3, 3] = shift
    shares, expected = _by_classes(classes, positions.round(4), (8, 8, 8))
    ours = resample_labels(classes, positions.round(4), (8, 8, 8))
    is_clear = (shares[-1] - shares[-2] > 2e-3) & (shares.sum(axis=0) > 0.999)
    np.testing.assert_array_equal(ours[is_clear], expected[is_clear])


def test_equal_votes_favour_no_side_and_no_class():
    classes = np.zeros((1, 1, 400), np.uint8)
    classes[..., ::4], classes[..., 1::4] = 1, 1  # 1 1 0 0 1 1 0 0
    positions = np.eye(4)
    positions[2, 2] = 0.5
    finer = resample_labels(classes, positions, (1, 1, 799))[0, 0]
    assert np.mean(finer) == pytest.approx(0.5, abs=0.01)
    edges = np.flatnonzero(np.diff(finer.astype(int)))
    assert set(np.diff(edges)) <= {3, 4, 5}


def head(shape, low, high) -> np.ndarray:
    image = np.random.default_rng(0).integers(0, 8, shape).astype(np.int16)
    image[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = 500
    image[tuple(slice(a + 5, b - 5) for a, b in zip(low, high, strict=True))] = 400
    return image


@ONE_FILE
@given(order=ORDERS, top=st.integers(0, 30), length=st.integers(90, 120))
def test_a_head_at_the_end_of_a_long_scan_is_not_cut(tmp_path, order, top, length):
    """Of a scan longer than the grid, the head is kept wherever it lies."""
    low, high = (10, 10, length - top - 40), (50, 50, length - top)
    image = head((60, 60, length), low, high)
    labels = np.where(image >= 400, 2, 0)
    i_path, l_path = saved(tmp_path / "i.nii", image, 2.0, order), saved(tmp_path / "l.nii", labels, 2.0, order)
    grid = Grid(64, 2.0)
    classes = conform_labels(l_path, grid, FIFTY, i_path)
    assert np.count_nonzero(classes) == np.count_nonzero(labels)
    native = to_native(classes, i_path, grid, order=0)
    np.testing.assert_array_equal(native, FIFTY.apply(np.asanyarray(nib.load(l_path).dataobj)))
    grey = conform_image(i_path, grid)
    assert np.count_nonzero(grey > 150) == np.count_nonzero(image >= 400)


def test_of_more_signal_than_the_grid_holds_the_top_is_kept_and_labels_below_are_refused(tmp_path):
    image = head((60, 60, 120), (10, 10, 5), (50, 50, 118))
    path = saved(tmp_path / "i.nii", image, 2.0)
    grid = Grid(64, 2.0)
    placement = place(path, grid)
    assert placement.cut_mm == pytest.approx((113 - 64) * 2, abs=3)
    labels = np.zeros(image.shape)
    labels[20:30, 20:30, 100:118] = 2
    assert np.count_nonzero(conform_labels(saved(tmp_path / "l.nii", labels, 2.0), grid, FIFTY, path)) == 1800
    labels[20:30, 20:30, 5:14] = 2
    with pytest.raises(InputError, match=r"l\.nii: 33% of the labelled voxels lie outside"):
        conform_labels(saved(tmp_path / "l.nii", labels, 2.0), grid, FIFTY, path)


def test_a_scan_without_signal_beyond_the_grid_stays_on_freesurfers_centre(tmp_path):
    image = head((60, 60, 120), (10, 10, 40), (50, 50, 80))
    placement = place(saved(tmp_path / "i.nii", image, 2.0), Grid(64, 2.0))
    assert (placement.moved_mm, placement.cut_mm) == (0, 0)
    np.testing.assert_allclose(placement.affine @ [32, 32, 32, 1], [3, -7, 11, 1])


def test_a_conformed_volume_keeps_its_place_on_a_coarser_grid(tmp_path):
    """A cube in LIA order, as FreeSurfer writes it: grid voxel 16 is its voxel 32."""
    grid = Grid(64, 1.0)
    voxels = np.zeros(grid.shape, np.uint8)
    voxels[20:44, 22:40, 18:50] = np.random.default_rng(0).integers(50, 200, (24, 18, 32))
    nib.save(nib.Nifti1Image(voxels, grid.affine(np.zeros(3))), tmp_path / "x.nii")
    np.testing.assert_array_equal(conform_image(tmp_path / "x.nii", Grid(32, 2.0)), voxels[::2, ::2, ::2])


@given(st.integers(0, 1000))
def test_one_dark_voxel_leaves_air_dark(seed):
    rng = np.random.default_rng(seed)
    image = np.where(rng.random((20, 20, 20)) < 0.5, 0, rng.uniform(100, 300, (20, 20, 20))).astype(np.float32)
    expected = to_uint8(image)
    image[3, 4, 5] = rng.choice([-50, -1e4, -3e38])
    scaled = to_uint8(image)
    assert scaled[image == 0].max() == 0
    different = np.abs(scaled.astype(int) - expected) > 2
    assert different.sum() <= 1


def _head_in_air(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A ball of tissue in faint noise, and where it is."""
    rng = np.random.default_rng(seed)
    ball = (np.mgrid[-1:1:24j, -1:1:24j, -1:1:24j] ** 2).sum(axis=0) < 0.5
    return np.where(ball, rng.normal(600, 80, ball.shape), abs(rng.normal(0, 10, ball.shape))), ball


@given(st.integers(0, 1000), st.sampled_from([-100, -1000, -32768, -1e6]), st.integers(1, 12))
def test_padding_leaves_air_dark_whatever_its_value_and_share(seed, value, planes):
    image, ball = _head_in_air(seed)
    image[:planes], ball[:planes] = value, True
    assert to_uint8(image.astype(np.float32))[~ball].max() <= SIGNAL


@given(st.integers(0, 1000), st.sampled_from([0, -500]))
def test_tissue_in_an_empty_background_keeps_its_distance_from_it(seed, background):
    image, ball = _head_in_air(seed)
    image[~ball] = background
    assert to_uint8(image.astype(np.float32))[ball].mean() > 140


@pytest.mark.parametrize("values", [(0, 255), (0, 500, 800), (-1000, 0), (-32768, 0, 32767)])
def test_images_of_few_values_are_scaled_as_they_are(values):
    image = np.random.default_rng(0).choice(np.array(values, np.int16), (20, 20, 20))
    expected = 255 * (np.array(values, float) - values[0]) / (values[-1] - values[0])
    np.testing.assert_allclose(np.unique(to_uint8(image)), expected, atol=1)


@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.float64])
def test_two_outliers_leave_a_head_its_grey_levels(dtype):
    rng = np.random.default_rng(0)
    image = np.where(rng.random((30, 30, 30)) < 0.5, 0, rng.integers(100, 300, (30, 30, 30))).astype(dtype)
    limits = np.iinfo(dtype) if np.dtype(dtype).kind == "i" else np.finfo(dtype)
    image[0, 0, 0], image[1, 1, 1] = limits.min, limits.max
    scaled = to_uint8(image)
    assert len(np.unique(scaled[(image >= 100) & (image < 300)])) > 64
    assert scaled[image == 0].max() == 0


@pytest.mark.parametrize("scale", [1e-45, 1e-40, 1e-20, 1e20, 1e35, 3e38])
def test_the_scale_of_the_values_does_not_matter(scale):
    levels = np.random.default_rng(0).integers(0, 2 if scale < 1e-44 else 200, (12, 12, 12))
    with np.errstate(all="ignore"):
        image = (levels * np.float64(scale)).astype(np.float64 if scale > 1e30 else np.float32)
    expected = to_uint8(levels.astype(np.float32))
    assert np.abs(to_uint8(image).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("angles", [(45, 0, 0), (0, 0, 45), (45, 0, 45), (54, 45, 45), (45, 45, 45), (44.999, 0, 0)])
def test_axes_half_way_between_two_of_the_scanners_are_taken_alike_in_any_storage_order(tmp_path, angles):
    turn = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    voxels = np.random.default_rng(0).integers(0, 900, (12, 15, 17)).astype(np.int16)
    scan = nib.Nifti1Image(voxels, from_matvec(4 * turn, [-20, -30, -10]))
    results = []
    for axes in permutations(range(3)):
        for flips in product((1, -1), repeat=3):
            nib.save(scan.as_reoriented(np.array(list(zip(axes, flips, strict=True)))), tmp_path / "x.nii")
            results.append(place(tmp_path / "x.nii", Grid(32, 4.0)).affine)
    np.testing.assert_allclose(results, np.broadcast_to(results[0], (48, 4, 4)), atol=1e-3)
