"""What is read and what is refused, by the bytes of a file and the entries of its header."""

import bz2
import gzip
import resource
import shutil
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dwc.base.errors import InputError
from dwc.data import cache, conform, reading
from dwc.data.conform import conform_image, conform_labels, to_native
from dwc.data.grid import Grid
from dwc.data.labels import LabelMap
from dwc.data.reading import load_image, load_labels, open_scan
from dwc.data.scan import Scan

FIFTY = LabelMap.load("fifty")
RNG = np.random.default_rng(0)
VOXELS = RNG.integers(1, 1000, (12, 14, 16), np.int16)
ONE_FILE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def written(path: Path, voxels=VOXELS, kind=nib.Nifti1Image, affine=None, **fields) -> Path:
    """A volume whose header fields have then been overwritten."""
    image = kind(voxels, np.diag([2.0, 2, 2, 1]) if affine is None else affine, dtype=voxels.dtype)
    content = bytearray(image.to_bytes())
    header = type(image.header)(bytes(content[: image.header.sizeof_hdr]), check=False)
    for name, value in fields.items():
        header[name] = value
    content[: len(header.binaryblock)] = header.binaryblock
    path.write_bytes(gzip.compress(bytes(content)) if path.name.lower().endswith(".gz") else bytes(content))
    return path


def refusal(function, *arguments) -> str:
    """The one line of a refusal."""
    with pytest.raises(InputError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("code", "factor"), [(0, 1), (1, 1e-3), (2, 1), (3, 1e3)])
def test_metres_and_micrometres_are_converted_to_mm(tmp_path, code, factor):
    affine = np.diag([2.0, 2, 2, 1]) * factor
    path = written(tmp_path / "x.nii.gz", affine=affine, xyzt_units=code)
    np.testing.assert_allclose(load_image(path).affine, np.diag([2.0, 2, 2, 1]), atol=1e-6)
    grid = Grid(32, 1.0)
    plain = written(tmp_path / "plain.nii.gz")
    np.testing.assert_array_equal(conform_image(path, grid), conform_image(plain, grid))
    assert to_native(conform_image(path, grid), path, grid, order=1).shape == VOXELS.shape


def test_an_unknown_unit_is_refused(tmp_path):
    assert "xyzt_units 5" in refusal(load_image, written(tmp_path / "x.nii", xyzt_units=5))


@pytest.mark.parametrize("size", [1e-5, 0.01, 0.5, 50.0, 1e6])
def test_a_volume_that_cannot_be_a_head_is_refused_with_the_fields_to_look_at(tmp_path, size):
    line = refusal(load_image, written(tmp_path / "x.nii", affine=np.diag([size, size, size, 1])))
    assert all(field in line for field in ("x.nii", "pixdim", "srow_x", "xyzt_units"))


@pytest.mark.parametrize("shape", [(40000, 2, 2), (32768, 1, 1), (1, 1, 70000)])
def test_a_nifti_2_volume_longer_than_nifti_1_can_say_is_read_or_refused_in_one_line(tmp_path, shape):
    voxels = RNG.integers(0, 100, shape).astype(np.int16)
    assert "no head" in refusal(load_image, written(tmp_path / "x.nii", voxels, nib.Nifti2Image, np.eye(4)))


@pytest.mark.parametrize(
    ("kind", "dims"),
    [
        (nib.Nifti1Image, (32767, 32767, 32767)),
        (nib.Nifti2Image, (10**5, 10**5, 10**5)),
        (nib.Nifti2Image, (2**40, 2**40, 2**40)),
        (nib.Nifti1Image, (600, 600, 600)),
    ],
)
@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz"])
def test_a_header_that_claims_more_than_the_file_holds_is_refused_before_anything_is_allocated(
    tmp_path, kind, dims, name
):
    path = written(tmp_path / name, kind=kind, dim=[3, *dims, 1, 1, 1, 1], datatype=64, bitpix=64)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    begin = time.process_time()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), limits[1]))
    try:
        line = refusal(load_image, path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert "x.nii" in line
    assert time.process_time() - begin < 5


def test_a_stream_that_goes_on_behind_its_volume_is_not_read_to_its_end(tmp_path):
    path = written(tmp_path / "x.nii.gz")
    more = gzip.compress(bytes(1 << 26), compresslevel=1)
    with path.open("ab") as file:
        for _ in range(64):  # 4 GiB of zeros
            file.write(more)
    begin = time.process_time()
    assert "behind the volume" in refusal(load_image, path)
    assert time.process_time() - begin < 2


def test_a_little_behind_a_volume_is_let_be(tmp_path):
    path = written(tmp_path / "x.nii")
    path.write_bytes(gzip.compress(path.read_bytes() + bytes(1000)))
    np.testing.assert_array_equal(load_image(path).dataobj, VOXELS)


@pytest.mark.parametrize("name", ["scan.nii.gz", "SCAN.NII.GZ", "Scan.Nii.Gz", "scan.img.gz", "scan.mgz", "SCAN.MGZ"])
@pytest.mark.parametrize("place", [-8, -6, -2])
def test_a_broken_checksum_is_noticed_whatever_the_name(tmp_path, name, place):
    path = tmp_path / name
    if ".img" in name:
        nib.save(nib.Nifti1Pair(VOXELS, np.diag([2.0, 2, 2, 1])), tmp_path / "scan.img")
        path.write_bytes(gzip.compress((tmp_path / "scan.img").read_bytes()))
        (tmp_path / "scan.img").unlink()
        scan = tmp_path / "scan.hdr"
    elif name.lower().endswith("mgz"):
        path.write_bytes(gzip.compress(nib.MGHImage(VOXELS, np.diag([2.0, 2, 2, 1])).to_bytes()))
        scan = path
    else:
        scan = written(path)
    np.testing.assert_array_equal(load_image(scan).dataobj, VOXELS)
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert "truncated or damaged" in refusal(load_image, scan)


def test_the_bytes_decide_and_not_the_name_whether_a_file_is_compressed(tmp_path):
    plain = written(tmp_path / "plain.nii")
    shutil.copy(plain, tmp_path / "named.nii.gz")
    (tmp_path / "packed.nii").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "packed.nii.bz2").write_bytes(bz2.compress(plain.read_bytes()))
    for name in ("named.nii.gz", "packed.nii", "packed.nii.bz2"):
        np.testing.assert_array_equal(load_image(tmp_path / name).dataobj, VOXELS)


@pytest.mark.parametrize("given", ["scan.hdr", "scan.img", "SCAN.HDR", "SCAN.IMG"])
def test_a_pair_is_read_by_either_of_its_names_in_either_case(tmp_path, given):
    nib.save(nib.Nifti1Pair(VOXELS, np.diag([2.0, 2, 2, 1])), tmp_path / "scan.img")
    if given.isupper():
        for extension in ("hdr", "img"):
            (tmp_path / f"scan.{extension}").rename(tmp_path / f"SCAN.{extension.upper()}")
    np.testing.assert_array_equal(load_image(tmp_path / given).dataobj, VOXELS)
    (tmp_path / given).with_suffix(".img" if given.islower() else ".IMG").unlink()
    refusal(load_image, tmp_path / given)


def test_pointers_and_dangling_links_are_named_with_what_fetches_them(tmp_path):
    lfs = tmp_path / "lfs.nii.gz"
    lfs.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    annex = tmp_path / "annex.nii.gz"
    annex.symlink_to("../.git/annex/objects/xx/yy/MD5E-s1--0.nii.gz/MD5E-s1--0.nii.gz")
    unlocked = tmp_path / "unlocked.nii.gz"
    unlocked.write_text("/annex/objects/MD5E-s1--0.nii.gz\n")
    gone = tmp_path / "gone.nii.gz"
    gone.symlink_to("nowhere.nii.gz")
    for path, word in ((lfs, "git lfs pull"), (annex, "datalad get"), (unlocked, "datalad get"), (gone, "nowhere")):
        line = refusal(load_image, path)
        assert word in line
        assert "convert" not in line


def test_a_name_too_long_for_the_system_is_refused_in_one_short_line(tmp_path):
    for path in (tmp_path / ("x" * 5000), tmp_path / "a\0b.nii"):
        assert len(refusal(load_image, path)) < 500


def test_running_out_of_file_handles_is_not_blamed_on_the_scan(tmp_path):
    path = written(tmp_path / "x.nii.gz")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
    try:
        while True:
            held.append(open(path, "rb"))  # noqa: SIM115
    except OSError:
        line = refusal(load_image, path)
    finally:
        for file in held:
            file.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert "too many open files" in line
    assert "ulimit -n" in line


@ONE_FILE
@given(
    angle=st.floats(0, 2 * np.pi),
    axis=arrays(np.float64, 3, elements=st.floats(-1, 1)).filter(lambda axis: np.linalg.norm(axis) > 0.1),
    error=st.floats(0, 2e-4),
)
def test_a_quaternion_off_by_rounding_is_read_as_the_rotation_next_to_it(tmp_path, angle, axis, error):
    axis = axis / np.linalg.norm(axis)
    b_c_d = axis * np.sin(angle / 2) if angle < np.pi else axis
    b_c_d = b_c_d * (1 + error)
    fields = dict(zip(("quatern_b", "quatern_c", "quatern_d"), b_c_d, strict=True))
    path = written(tmp_path / "x.nii", sform_code=0, qform_code=1, **fields)
    linear = open_scan(path).affine[:3, :3] / 2
    np.testing.assert_allclose(linear @ linear.T, np.eye(3), atol=1e-3)


def test_a_quaternion_that_is_no_rotation_is_refused_by_its_fields(tmp_path):
    path = written(tmp_path / "x.nii", sform_code=0, qform_code=1, quatern_b=0.9, quatern_c=0.9)
    assert "quatern_b 0.9, quatern_c 0.9, quatern_d 0" in refusal(load_image, path)


@ONE_FILE
@given(
    ids=arrays(np.int32, (4, 4, 4), elements=st.integers(0, 2035)),
    noise=st.floats(-0.0199, 0.0199),
)
def test_labels_near_whole_numbers_are_those_numbers(tmp_path, ids, noise):
    path = written(tmp_path / "l.nii", np.repeat(ids, 2, 0) + noise)
    np.testing.assert_array_equal(load_labels(path).dataobj, np.repeat(ids, 2, 0))


def test_labels_stored_with_a_slope_are_read(tmp_path):
    ids = RNG.choice(np.array([0, 2, 41, 1035, 2035]), (8, 8, 8))
    slope = np.float32(2035 / 32767)
    stored = np.rint(ids / slope).astype(np.int16)
    assert np.abs(stored * np.float64(slope) - ids).max() > 1e-3
    ids = np.where(np.abs(stored * np.float64(slope) - ids) < 0.02, ids, 0)
    path = written(tmp_path / "l.nii", np.where(ids, stored, 0).astype(np.int16), scl_slope=slope, scl_inter=0)
    np.testing.assert_array_equal(load_labels(path).dataobj, ids)


def test_labels_between_whole_numbers_are_refused_with_the_value_and_the_slope(tmp_path):
    path = written(tmp_path / "l.nii", np.full((8, 8, 8), 5, np.int16), scl_slope=0.394, scl_inter=0)
    line = refusal(load_labels, path)
    assert "1.97" in line
    assert "scl_slope 0.394" in line


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.int32, np.uint32, np.int64, np.uint64])
def test_every_integer_type_gives_the_classes_of_int64(dtype):
    everything = np.arange(np.iinfo(dtype).min, 256) if np.iinfo(dtype).min > -200 else np.arange(-200, 3000)
    ids = everything[(everything >= np.iinfo(dtype).min) & (everything <= np.iinfo(dtype).max)]
    np.testing.assert_array_equal(FIFTY.apply(ids.astype(dtype)), FIFTY.apply(ids.astype(np.int64)))
    if np.iinfo(dtype).max > 3000:
        assert FIFTY.apply(np.array([np.iinfo(dtype).max], dtype)) == [0]


def test_ids_below_zero_are_no_class_in_narrow_types():
    np.testing.assert_array_equal(FIFTY.apply(np.array([-1, -5, 2], np.int8)), [0, 0, 1])


def test_an_aparc_aseg_cut_to_8_bits_is_refused(tmp_path):
    ids = RNG.choice(np.array([0, 2, 11, 1029, 2035, 1020]), (8, 8, 8))
    path = written(tmp_path / "l.nii", ids.astype(np.int8))
    assert "8 bits" in refusal(load_labels, path)


@pytest.mark.parametrize(("moved", "fits"), [(0.0005, True), (0.002, True), (0.019, True), (0.05, False), (1.0, False)])
def test_labels_may_be_off_the_image_by_a_hundredth_of_a_voxel(tmp_path, moved, fits):
    affine = np.diag([2.0, 2, 2, 1])
    image = written(tmp_path / "i.nii", affine=affine)
    affine[0, 3] = moved
    labels = written(tmp_path / "l.nii", affine=affine)
    if fits:
        load_labels(labels, image)
    else:
        assert f"by up to {moved:g} mm" in refusal(load_labels, labels, image)


def test_labels_in_another_storage_order_than_the_image_go_where_it_goes(tmp_path):
    ids = RNG.choice(np.array([0, 2, 10, 1035], np.int16), (20, 24, 22))
    image = written(tmp_path / "i.nii", ids * 50 + 1)
    labels = written(tmp_path / "l.nii", ids)
    turned = nib.load(labels).as_reoriented(np.array([[2, -1], [0, 1], [1, -1]]))
    nib.save(turned, tmp_path / "t.nii")
    grid = Grid(64, 1.0)
    expected = conform_labels(labels, grid, FIFTY, image)
    np.testing.assert_array_equal(conform_labels(tmp_path / "t.nii", grid, FIFTY, image), expected)


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz", "x.mgz", "x"])
@pytest.mark.parametrize("magic", [b"ni1", b"ni2", b"n+2"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_the_magic_of_another_kind_of_file_is_refused_in_one_line(tmp_path, name, magic, kind):
    if kind is nib.Nifti2Image and magic == b"n+2":
        magic = b"n+1"
    assert name in refusal(load_image, written(tmp_path / name, kind=kind, magic=magic))


@pytest.mark.parametrize("names", [("P.Hdr", "P.Img"), ("\u0130.hdr", "\u0130.img"), ("u.HDR", "u.Img.gZ")])
def test_a_pair_is_found_in_any_case_of_its_extensions(tmp_path, names):
    nib.Nifti1Pair(VOXELS, np.diag([2.0, 2, 2, 1])).to_filename(tmp_path / "x.hdr")
    for source, name in zip(("x.hdr", "x.img"), names, strict=True):
        content = (tmp_path / source).read_bytes()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.lower().endswith(".gz") else content)
    for name in names:
        np.testing.assert_array_equal(open_scan(tmp_path / name).read(), VOXELS)


def test_labels_that_take_more_memory_than_there_is_are_refused_in_one_line(tmp_path, monkeypatch):
    def fail(*_) -> None:
        raise MemoryError

    path = written(tmp_path / "x.nii.gz")
    for owner, name in ((reading, "_whole_numbers"), (conform, "load_labels"), (LabelMap, "apply")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            assert "does not fit into memory" in refusal(conform_labels, path, Grid(32), FIFTY)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "split_volume", fail)
        scan = Scan(path, None, "s", "H", "train")
        assert "x.nii.gz: does not fit" in refusal(cache.prepare, [scan], FIFTY, Grid(32), tmp_path / "cache")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (gzip.compress(b"", mtime=0), "is empty"),
        (b"<!DOCTYPE html><html>404", "web page"),
        (bytes(200), "truncated"),
    ],
)
def test_files_that_are_no_scan_get_advice_that_fits(tmp_path, content, words):
    (tmp_path / "x.nii.gz").write_bytes(content)
    assert words in refusal(load_image, tmp_path / "x.nii.gz")


def test_large_label_ids_are_named_as_such(tmp_path):
    labels = written(tmp_path / "l.nii", np.where(VOXELS > 500, 3e9, 2.0))
    assert "too large (3e+09)" in refusal(load_labels, labels)
    assert "below 2^31" in refusal(load_labels, labels)
    assert "nearest" not in refusal(load_labels, labels)
