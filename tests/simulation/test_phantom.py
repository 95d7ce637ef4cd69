import numpy as np
import pytest
from scipy import ndimage

from dwc.data.labels import LabelMap
from dwc.simulation.phantom import make_phantom

COARSE = dict(zip(LabelMap.load("fifty").classes, LabelMap.load("coarse").classes, strict=True))


@pytest.fixture(scope="module")
def head() -> np.ndarray:
    return make_phantom(64, 3.0, seed=0)


@pytest.mark.parametrize("seed", range(5))
def test_every_head_has_all_fifty_classes_and_tissue_outside_the_brain(seed):
    codes = make_phantom(64, 3.0, seed)
    assert (codes.dtype, codes.shape) == (np.uint8, (64, 64, 64))
    assert set(range(50)) | {52, 53, 55, 58} == set(np.unique(codes).tolist())


def test_a_head_is_a_function_of_its_seed(head):
    np.testing.assert_array_equal(head, make_phantom(64, 3.0, seed=0))
    assert np.mean(head != make_phantom(64, 3.0, seed=1)) > 0.03


def test_finer_voxels_show_the_same_head(head):
    fine = make_phantom(128, 1.5, seed=0)
    for klass in (1, 2, 5, 7, 9, 4):
        volume = [np.sum(codes == klass) * voxel**3 for codes, voxel in ((head, 3.0), (fine, 1.5))]
        assert volume[0] == pytest.approx(volume[1], rel=0.25)


def test_tissues_have_about_the_volumes_of_a_person(head):
    litres = np.bincount(np.array([COARSE.get(k, 0) for k in range(256)])[head].ravel()) * 27e-6
    white, cortex, _csf, _basal, _thalamus, stem, cerebellum, _hippocampus = litres[1:]
    assert 0.3 < white < 0.7
    assert 0.3 < cortex < 0.8
    assert 0.01 < stem < 0.06
    assert 0.08 < cerebellum < 0.2


def test_the_anatomy_is_oriented_as_lia(head):
    left, inferior, anterior = np.indices(head.shape)
    assert anterior[head == 46].mean() > anterior[head == 16].mean() > anterior[head == 25].mean()  # frontal, occipital
    assert (
        inferior[head == 9].mean() > inferior[head == 5].mean() > inferior[head == 15].mean()
    )  # stem, thalamus, callosum
    for klass in (7, 5, 10):  # on both sides of the midline
        assert ndimage.label(head == klass)[1] >= 2
        assert left[head == klass].mean() == pytest.approx(32, abs=1.5)


def test_ventricles_differ_between_people():
    volumes = [np.sum(make_phantom(64, 3.0, seed) == 2) for seed in range(8)]
    assert max(volumes) > 1.3 * min(volumes)


def test_the_brain_lies_inside_the_skull(head):
    brain = (head > 0) & (head < 50) & (head != 12)
    air = ndimage.binary_dilation(head == 0)
    assert not (brain & air).any()
