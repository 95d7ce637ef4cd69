from dataclasses import replace
from typing import get_args

import nibabel
import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.utils.data import DataLoader

from dwc.base.errors import InputError
from dwc.data.augmentation import Augmentation, augment, reach_of
from dwc.data.cache import prepare
from dwc.data.dataset import SubVolumes
from dwc.data.grid import Grid
from dwc.data.head import head_box
from dwc.data.intensity import Scheme, scaling_of
from dwc.data.labels import LabelMap
from dwc.data.manifest import Scan
from dwc.data.sampling import PaperCubes, RandomCubes, SurroundedCubes

NONE = Augmentation()
ALL = Augmentation(mirror=0.5, rotation=5, scale=0.05, elastic=1, bias=0.2, gamma=0.2, blur=0.5, noise=0.02)
COARSE = LabelMap.load("coarse")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> SubVolumes:
    """Three 64^3 volumes, bright in one octant, whose labels say whether a voxel is bright."""
    folder = tmp_path_factory.mktemp("scans")
    scans = []
    for subject in range(3):
        rng = np.random.default_rng(subject)
        image = rng.integers(0, 20, (64, 64, 64)).astype(np.uint8)
        image[30:60, 20:40, 10:50] = rng.integers(100, 250, (30, 20, 40))
        for name, voxels in (("T1w", image), ("dseg", (image > 127).astype(np.int16) * 2)):
            nibabel.save(
                nibabel.Nifti1Image(voxels, Grid(64, 3.0).affine(np.zeros(3))), folder / f"{subject}_{name}.nii.gz"
            )
        scans.append(
            Scan(folder / f"{subject}_T1w.nii.gz", folder / f"{subject}_dseg.nii.gz", f"{subject}", "H", "train")
        )
    return prepare(scans, COARSE, Grid(64, 3.0), folder / "cache", progress=False)


def place_of(data: SubVolumes, image: np.ndarray) -> list[tuple[int, tuple[int, ...]]]:
    """Where a cube without margin comes from: volumes and corners whose z-scores it equals."""
    found = []
    for v in range(data.n_volumes):
        volume = data.scaling(v)(data.volume(v)[0])
        for corner in np.argwhere(volume[:33, :33, :33] == image[0, 0, 0]):
            cut = tuple(slice(c, c + 32) for c in corner)
            if np.array_equal(volume[cut], image):
                found.append((v, tuple(corner.tolist())))
    return found


def test_a_random_cube_is_a_piece_of_a_volume_with_its_labels(data):
    cubes = RandomCubes(data, 0, 0, 0.05, NONE)
    places = set()
    for position in range(6):
        image, labels = cubes[position]
        assert (image.shape, labels.shape, labels.dtype) == ((1, 32, 32, 32), (32, 32, 32), torch.int64)
        ((volume, corner),) = place_of(data, image[0].numpy())
        truth = data.volume(volume)[1][tuple(slice(c, c + 32) for c in corner)]
        np.testing.assert_array_equal(labels, truth)
        places.add((volume, corner))
    assert len(places) == 6
    assert {volume for volume, _ in places} == {0, 1, 2}


def test_the_margin_holds_the_cubes_real_neighbours_and_zeros_beyond_the_volume(data):
    bare, wide = (RandomCubes(data, 0, margin, 0.05, NONE) for margin in (0, 9))
    for position in range(4):
        image, labels = bare[position]
        surrounded, same_labels = wide[position]
        assert surrounded.shape == (1, 50, 50, 50)
        assert torch.equal(surrounded[:, 9:-9, 9:-9, 9:-9], image)
        assert torch.equal(labels, same_labels)
        ((volume, corner),) = place_of(data, image[0].numpy())
        padded = np.pad(data.scaling(volume)(data.volume(volume)[0]), 9)
        np.testing.assert_array_equal(surrounded[0], padded[tuple(slice(c, c + 50) for c in corner)])


def test_cubes_lie_in_the_heads_box_and_seldom_outside(data):
    boxes = [head_box(data.volume(v)[0]) for v in range(3)]
    for share, least, most in ((0.0, 0, 0), (1.0, 20, 60), (0.3, 4, 30)):
        cubes = RandomCubes(data, 0, 0, share, NONE)
        outside = 0
        for position in range(60):
            starts = cubes._start(0, np.random.default_rng([9, position]))
            nearest = [min(max(start + 16, b.start), b.stop - 1) for start, b in zip(starts, boxes[0], strict=True)]
            outside += any(abs(n - start - 16) > 0 for n, start in zip(nearest, starts, strict=True))
        assert least <= outside <= most


def test_a_brain_share_of_one_centres_cubes_in_the_box_of_the_labels_and_of_none_changes_nothing(data):
    image, labels = data.volume(0)
    assert ndimage.find_objects(labels)[0] != head_box(image)
    brain, head, before = (RandomCubes(data, 0, 0, 0.0, NONE, *share) for share in ((1.0,), (0.0,), ()))
    for position in range(20):
        starts = [cubes._start(0, np.random.default_rng([9, position])) for cubes in (brain, head, before)]
        centre = np.clip(starts[0] + 16, 16, 48)
        low, high = ([getattr(side, end) for side in ndimage.find_objects(labels)[0]] for end in ("start", "stop"))
        assert np.all((centre >= np.clip(low, 16, 48)) & (centre <= np.clip(high, 16, 48)))
        np.testing.assert_array_equal(starts[1], starts[2])


def test_cubes_do_not_pile_up_at_the_edges_of_the_volume(data):
    cubes = RandomCubes(data, 0, 0, 0.5, NONE)
    starts = np.array([cubes._start(0, np.random.default_rng([9, position])) for position in range(400)])
    assert np.isin(starts, (0, 32)).mean() < 0.1
    assert starts.min() == 0
    assert starts.max() == 32


@pytest.mark.parametrize("augmentation", [NONE, ALL], ids=["plain", "augmented"])
def test_a_cube_is_a_function_of_seed_and_position_whatever_process_loads_it(data, augmentation):
    def batches(seed: int, positions: range, workers: int) -> list[torch.Tensor]:
        cubes = RandomCubes(data, seed, 4, 0.05, augmentation)
        steps = [[p, p + 1] for p in positions]
        return [image for image, _ in DataLoader(cubes, batch_sampler=steps, num_workers=workers)]

    alone, two = batches(1, range(0, 8, 2), 0), batches(1, range(0, 8, 2), 2)
    assert all(map(torch.equal, alone, two))
    assert torch.equal(batches(1, range(6, 8, 2), 0)[0], alone[3])
    assert not torch.equal(batches(2, range(0, 2, 2), 0)[0], alone[0])


def test_the_papers_cubes_go_pass_after_pass_each_in_its_own_order(data):
    cubes = PaperCubes(data, 4)
    order = [next(i for i in range(24) if torch.equal(cubes[p][0], data[i][0])) for p in range(48)]
    assert sorted(order[:24]) == sorted(order[24:]) == list(range(24))
    assert order[:24] != order[24:]


def test_surrounded_cubes_are_the_sub_volumes_with_their_neighbours(data):
    cubes = SurroundedCubes(data, 5)
    assert len(cubes) == len(data)
    for i in (0, 3, 7, 12, 23):
        image, labels = data[i]
        surrounded, same = cubes[i]
        assert torch.equal(surrounded[:, 5:-5, 5:-5, 5:-5], image)
        assert torch.equal(labels, same)
    np.testing.assert_array_equal(
        cubes[0][0][0, :37, :37, :37][5:, 5:, 5:], data.scaling(0)(data.volume(0)[0])[:32, :32, :32]
    )
    assert not cubes[0][0][0, :5].any()


def smooth_ball(n: int = 40) -> tuple[np.ndarray, np.ndarray]:
    axis = np.arange(n) - (n - 1) / 2
    x, y, z = np.meshgrid(axis, axis, axis, indexing="ij")
    image = 200 * np.exp(-((x - 4) ** 2 + y**2 + z**2) / 60)
    return image.astype(np.float32), (image > 100).astype(np.uint8)


def varied(seed: int = 0, **strengths: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The middle of a ball and its labels, then varied."""
    settings = replace(NONE, **strengths)
    margin = reach_of(settings, 40)
    image, labels = smooth_ball(40 + 2 * margin)
    inner = (slice(margin, margin + 40),) * 3
    out = augment(image, labels, 40, settings, np.random.default_rng(seed))
    return image[inner], labels[inner], *out


@pytest.mark.parametrize("kind", ["bias", "gamma", "blur", "noise"])
def test_intensity_changes_images_and_leaves_labels(kind):
    image, labels, new_image, new_labels = varied(**{kind: 2 if kind == "blur" else 0.3})
    np.testing.assert_array_equal(new_labels, labels)
    assert np.abs(new_image - image).max() > 1
    assert np.isfinite(new_image).all()


@pytest.mark.parametrize(("kind", "strength"), [("rotation", 10), ("scale", 0.1), ("elastic", 1.5)])
def test_geometry_moves_image_and_labels_together(kind, strength):
    _, labels, new_image, new_labels = varied(1, **{kind: strength})
    assert (new_labels != labels).any()
    agreement = ((new_image > 100) == (new_labels > 0)).mean()
    assert agreement > 0.995


def test_scaling_and_rotation_are_what_their_names_say():
    sizes = [varied(seed, scale=0.1)[3].sum() for seed in range(30)]
    assert np.std(np.log(sizes)) == pytest.approx(0.3, rel=0.4)  # three axes
    image, _, turned, _ = varied(3, rotation=20)
    assert turned.sum() == pytest.approx(image.sum(), rel=0.02)


def test_mirroring_flips_the_first_axis_in_its_share_of_the_cubes():
    flipped = 0
    for seed in range(100):
        image, labels, new_image, new_labels = varied(seed, mirror=0.3)
        if not np.array_equal(new_labels, labels):
            np.testing.assert_allclose(new_image, image[::-1], atol=1e-3)
            np.testing.assert_array_equal(new_labels, labels[::-1])
            flipped += 1
    assert 15 <= flipped <= 45


@pytest.mark.parametrize(("name", "value"), [("mirror", 1.5), ("gamma", -0.1), ("rotation", float("nan"))])
def test_strengths_that_cannot_be_meant_are_refused_by_name(name, value):
    with pytest.raises(InputError, match=f"`{name}`"):
        replace(NONE, **{name: value})


@pytest.mark.parametrize("scheme", get_args(Scheme))
def test_cubes_and_their_margins_are_scaled_as_the_whole_volume_is(data, scheme):
    scaled = SubVolumes(data.scans, data._folders, data.label_map, data.grid, scheme)
    whole = scaling_of(data.volume(1)[0], scheme)(data.volume(1)[0])
    first = scaled.sub_volumes_per_volume
    np.testing.assert_array_equal(scaled[first][0][0], whole[:32, :32, :32])
    surrounded, _ = SurroundedCubes(scaled, 3)[first]
    np.testing.assert_array_equal(surrounded[0], np.pad(whole[:35, :35, :35], ((3, 0),) * 3))
    drawn, _ = RandomCubes(scaled, 0, 0, 0.0, Augmentation())[0]
    assert scheme == "z_score" or 0 <= drawn.min() < drawn.max() <= 1
