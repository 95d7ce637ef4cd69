from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from dwc.base.errors import InputError
from dwc.data.conform import conform_image
from dwc.data.grid import Grid
from dwc.data.labels import LabelMap
from dwc.data.manifest import read_manifest
from dwc.simulation import scans
from dwc.simulation.phantom import make_phantom
from dwc.simulation.scans import load_sites, random_contrast, simulate, write_site

SITES = load_sites()
GRID = Grid(32, 6.0)


@pytest.fixture(scope="module")
def head() -> np.ndarray:
    return make_phantom(64, 3.0, seed=0)


def test_there_are_five_sites_that_give_every_code_a_tissue():
    assert list(SITES) == ["H", "N", "B", "W", "A"]
    tissues = scans._tissue_of_code()
    assert len(tissues) == 61
    for site in SITES.values():
        assert set(tissues) == set(site.tissue_means)
        assert len(site.resolution) == 3


@pytest.mark.parametrize("site", SITES)
def test_a_scan_is_a_pure_function_of_its_arguments(head, site):
    before = head.copy()
    image, labels = simulate(head, site, voxel_size=3.0, seed=7)
    again, labels_again = simulate(head, SITES[site], voxel_size=3.0, seed=7)
    np.testing.assert_array_equal(head, before)
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(labels, labels_again)
    other, _ = simulate(head, site, voxel_size=3.0, seed=8)
    assert np.mean(image != other) > 0.5


@pytest.mark.parametrize("site", SITES)
def test_a_scan_looks_like_a_t1(head, site):
    image, labels = simulate(head, site, voxel_size=3.0, seed=1)
    assert (image.dtype, image.shape, labels.dtype) == (np.uint8, head.shape, np.uint8)
    assert set(np.unique(labels)) <= set(np.unique(head))
    assert image.max() == 255
    white, grey, csf, air = (np.median(image[part]) for part in (labels == 1, labels > 15, labels == 2, labels == 0))
    assert white > np.median(image[(labels > 15) & (labels < 50)]) > csf > air
    assert grey > air


def test_sites_differ_more_in_contrast_than_scans_of_one_site(head):
    def contrast(site, seed):
        image, labels = simulate(head, site, voxel_size=3.0, seed=seed)
        return np.median(image[labels == 55]) / np.median(image[labels == 1])  # skin against white matter

    h = [contrast("H", seed) for seed in range(3)]
    n = [contrast("N", seed) for seed in range(3)]
    assert min(n) > max(h)


def test_ventricles_grow_where_the_population_has_larger_ones(head):
    still = replace(SITES["H"], elastic=0.0)
    volumes = [
        np.sum(simulate(head, replace(still, ventricle=growth), voxel_size=3.0, seed=0)[1] == 2)
        for growth in (0.0, 1.0, 2.5)
    ]
    assert volumes[0] < volumes[1] < volumes[2]


def test_heads_shrink_with_the_scale_of_the_site(head):
    sizes = [
        np.sum(simulate(head, replace(SITES["H"], scale=scale), voxel_size=3.0, seed=0)[1] > 0) for scale in (1.0, 0.9)
    ]
    assert sizes[1] == pytest.approx(sizes[0] * 0.9**3, rel=0.05)


def test_noise_is_as_strong_as_the_site_says():
    quiet = replace(SITES["H"], bias=0.0, sd=0.0, noise=0.05)
    white = np.ones((32, 32, 32), np.uint8)
    image, labels = simulate(white, quiet, voxel_size=3.0, seed=0)
    inside = image[8:-8, 8:-8, 8:-8].astype(float)
    assert (labels[8:-8, 8:-8, 8:-8] == 1).all()
    assert inside.std() / inside.mean() == pytest.approx(0.05, rel=0.15)


def test_voxels_coarser_than_the_grid_blur_along_their_axis():
    line = np.zeros((32, 32, 32), np.float32)
    line[16, 16, :] = 1
    assert scans._sample(line, (1.0, 1.0, 1.0), 3.0) is line
    blurred = scans._sample(line, (6.0, 3.0, 3.0), 3.0)
    assert blurred.shape == line.shape
    assert blurred[13:20, 16, 16].max() < 0.7
    assert not blurred[:, [15, 17]].any()


def test_an_unknown_site_is_bad_input(head):
    with pytest.raises(InputError, match="'Q' is not simulated; choose one of H, N, B, W, A"):
        simulate(head, "Q", voxel_size=3.0, seed=0)


def test_a_written_site_is_a_manifest_of_conformed_scans_with_freesurfer_labels(tmp_path):
    manifest = write_site(tmp_path / "H", "H", 2, 1, grid=GRID, seed=3)
    scans = read_manifest(manifest)
    assert [(scan.split, scan.site) for scan in scans] == [("train", "H"), ("train", "H"), ("test", "H")]
    assert len({scan.subject for scan in scans}) == 3
    image, labels = nib.load(scans[0].image), nib.load(scans[0].label)
    assert nib.aff2axcodes(image.affine) == nib.aff2axcodes(labels.affine) == ("L", "I", "A")
    np.testing.assert_array_equal(conform_image(scans[0].image, GRID), image.dataobj)
    ids = np.asanyarray(labels.dataobj)
    label_map = LabelMap.load("fifty")
    assert set(np.unique(ids)) <= set(label_map.ids)
    assert len(np.unique(label_map.apply(ids))) > 40
    assert not list(manifest.parent.glob(".*"))


def test_sites_are_reproducible_and_share_no_subject(tmp_path):
    files = {}
    for name, site, seed in (("a", "H", 0), ("b", "H", 0), ("c", "N", 0), ("d", "H", 1)):
        manifest = write_site(tmp_path / name, site, 1, 1, grid=GRID, seed=seed)
        files[name] = [scan.label.read_bytes() + scan.image.read_bytes() for scan in read_manifest(manifest)]
    assert files["a"] == files["b"]
    assert len({content for name in "acd" for content in files[name]}) == 6
    subjects = [{scan.subject for scan in read_manifest(tmp_path / name / "manifest.csv")} for name in "ac"]
    assert not subjects[0] & subjects[1]


@pytest.fixture(scope="module")
def anatomies(tmp_path_factory):
    """Ten heads as label volumes, RAS and off the centre."""
    folder = tmp_path_factory.mktemp("anatomies")
    for n in range(10):
        codes = np.roll(make_phantom(48, 4.0, seed=n), 4, axis=2)
        volume = nib.as_closest_canonical(nib.Nifti1Image(codes, Grid(48, 4.0).affine(np.zeros(3))))
        nib.save(volume, folder / f"sub-{n:02d}.nii.gz")
    return folder


def test_real_anatomies_are_divided_among_sites_and_splits(anatomies, tmp_path):
    owners = {}
    for site in SITES:
        for scan in read_manifest(write_site(tmp_path / site, site, 2, 1, grid=GRID, anatomies=anatomies)):
            owners.setdefault(scan.subject.split("-", 1)[1], set()).add((site, scan.split))
    assert len(owners) == 10
    assert all(len(owner) == 1 for owner in owners.values())


def test_another_seed_divides_the_anatomies_anew(anatomies, tmp_path):
    """Otherwise all seeds of a study would test on the same heads."""
    tested = set()
    for seed in range(8):
        manifest = write_site(tmp_path / str(seed), "H", 1, 1, grid=GRID, seed=seed, anatomies=anatomies)
        tested |= {scan.subject for scan in read_manifest(manifest) if scan.split == "test"}
    assert len(tested) > 3


def test_an_anatomy_is_centred_on_its_brain(anatomies):
    codes = scans._load_anatomy(anatomies / "sub-00.nii.gz", Grid(64, 3.0))
    where = np.argwhere((codes > 0) & (codes < 50) & (codes != 12))
    np.testing.assert_allclose((where.min(0) + where.max(0) + 1) / 2, 32, atol=1.5)


def test_bad_anatomies_are_refused(tmp_path, anatomies, save):
    with pytest.raises(InputError, match="0 label volumes for site H"):
        write_site(tmp_path / "out", "H", 1, 1, grid=GRID, anatomies=tmp_path / "none")
    folder = save("few/only.nii.gz", np.full((8, 8, 8), 200, np.uint8)).parent
    with pytest.raises(InputError, match="1 label volumes for site H"):
        write_site(tmp_path / "out", "H", 1, 1, grid=GRID, anatomies=folder)
    with pytest.raises(InputError, match=r"only\.nii\.gz: codes 200\.\.200"):
        write_site(tmp_path / "out", "H", 1, 0, grid=GRID, anatomies=folder)
    assert not (tmp_path / "out" / "manifest.csv").exists()


def test_nothing_to_write_and_nowhere_to_write_are_bad_input(tmp_path):
    with pytest.raises(InputError, match="at least one scan"):
        write_site(tmp_path / "out", "H", 0, 0, grid=GRID)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: cannot write"):
        write_site(tmp_path / "file", "H", 1, 0, grid=GRID)


def test_a_site_from_the_anatomies_of_real_people_has_their_variety(shared_data):
    first, second = (
        scans._load_anatomy(shared_data / "anatomies" / f"sub-{n:02d}.nii.gz", Grid(64, 3.0)) for n in (2, 3)
    )
    assert np.sum(first == 2) > 2 * np.sum(second == 2)
    image, labels = simulate(first, "B", voxel_size=3.0, seed=0)
    assert np.median(image[labels == 1]) > np.median(image[labels == 2])


@pytest.mark.parametrize("seed", range(10))
def test_a_random_contrast_is_a_t1_drawn_from_the_generator(seed):
    site = random_contrast(SITES["B"], np.random.default_rng(seed))
    means = [mean for mean, _ in site.codes]
    assert len(means) == 61
    assert means[1] > means[16] + 20
    assert min(means) >= 0
    assert len(set(means[16:50])) == 1  # the cortex is one tissue
    assert len(set(means[50:])) > 5  # tissues outside the brain are drawn one by one
    assert site == random_contrast(SITES["B"], np.random.default_rng(seed))
    assert (site.name, site.ventricle, site.elastic) == ("B", SITES["B"].ventricle, SITES["B"].elastic)


def test_random_contrasts_differ_from_scan_to_scan_and_leave_the_subjects_as_they_are(tmp_path):
    plain = write_site(tmp_path / "plain", "H", 2, 1, grid=GRID, seed=1)
    random = write_site(tmp_path / "random", "H", 2, 1, grid=GRID, seed=1, random_contrasts=True)
    assert plain.read_text() == random.read_text()
    ratios = []
    for name in ("H-000", "H-001"):
        image, ids = (nib.load(random.parent / f"{name}_{part}.nii.gz").get_fdata() for part in ("T1w", "dseg"))
        ratios.append(np.median(image[ids >= 1000]) / np.median(image[ids == 2]))
    assert abs(ratios[0] - ratios[1]) > 0.02


def test_a_site_named_twice_gets_two_shares_of_the_anatomies(anatomies, tmp_path):
    owners = {}
    for site, n_train in (("H", 8), ("N", 4)):
        manifest = write_site(
            tmp_path / site, site, n_train, 1, grid=GRID, anatomies=anatomies, shared_by=("H", "H", "N")
        )
        owners[site] = {scan.subject.split("-", 1)[1] for scan in read_manifest(manifest)}
    assert not owners["H"] & owners["N"]
    assert len(owners["H"]) > len(owners["N"])
