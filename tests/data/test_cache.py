import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dwc.base.errors import InputError
from dwc.data import cache
from dwc.data.cache import prepare
from dwc.data.cubes import join_volume, split_volume
from dwc.data.dataset import SubVolumes
from dwc.data.grid import Grid
from dwc.data.intensity import scaling_of
from dwc.data.labels import LabelMap
from dwc.data.manifest import Scan

FIFTY = LabelMap.load("fifty")
GRID = Grid(64, 3.0)


@pytest.fixture
def scans(scan_pair) -> list[Scan]:
    return [Scan(*scan_pair(f"s{i}", i), f"s{i}", "H", "train") for i in range(3)]


def _prepare(scans, cache, *, label_map=FIFTY, grid=GRID, workers=0):
    return prepare(scans, label_map, grid, cache, workers=workers, progress=False)


def _files(folder: Path) -> dict[str, bytes]:
    """Content of the finished entries of a cache, by path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.glob("[!.]*/*"))}


def _entries(cache: Path) -> list[Path]:
    return list(cache.glob("[!.]*"))


@given(st.data(), st.tuples(*[st.integers(1, 3)] * 3), st.integers(1, 4))
def test_joining_is_the_inverse_of_splitting(data, blocks, side):
    shape = tuple(n * side for n in blocks)
    volume = data.draw(arrays(np.uint8, shape))
    cubes = split_volume(volume, side)
    assert cubes.shape == (np.prod(blocks), side, side, side)
    np.testing.assert_array_equal(join_volume(cubes, shape), volume)


def test_the_second_cube_is_the_neighbour_along_the_last_axis():
    volume = np.arange(64**3).reshape(64, 64, 64)
    np.testing.assert_array_equal(split_volume(volume)[1], volume[:32, :32, 32:])


def test_a_volume_that_does_not_split_is_refused():
    with pytest.raises(ValueError, match="does not split"):
        split_volume(np.zeros((64, 64, 63)))


def test_items_are_z_scored_cubes_with_their_classes(scans, tmp_path):
    data = _prepare(scans, tmp_path / "cache")
    assert (len(data), data.n_volumes, data.sub_volumes_per_volume) == (24, 3, 8)
    image, classes = data.volume(1)
    assert image.dtype == classes.dtype == np.uint8
    assert set(np.unique(classes)) == {0, 1, 15, 49}
    x, y = data[8 + 5]
    assert (x.dtype, x.shape, y.dtype, y.shape) == (torch.float32, (1, 32, 32, 32), torch.int64, (32, 32, 32))
    cube = np.s_[32:, :32, 32:]
    np.testing.assert_allclose(x[0], (image[cube] - image.mean()) / image.std(), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(y, classes[cube])
    with pytest.raises(IndexError):
        data[24]


def test_a_volume_of_z_scores_has_mean_zero_and_variance_one():
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 64), np.uint8)
    z = scaling_of(image, "z_score")(image)
    assert z.dtype == np.float32
    np.testing.assert_allclose([z.mean(dtype=np.float64), z.std(dtype=np.float64)], [0, 1], atol=1e-6)


def test_items_are_exactly_the_z_scores_of_the_volume(scans, tmp_path):
    data = _prepare(scans, tmp_path / "cache")
    image, _ = data.volume(2)
    np.testing.assert_array_equal(data[16][0][0], scaling_of(image, "z_score")(image[:32, :32, :32]))


def test_the_digest_follows_content_order_label_map_and_grid_and_not_names(scans, tmp_path):
    data = _prepare(scans, tmp_path / "cache")
    renamed = [replace(scan, image=scan.image.rename(tmp_path / f"{i}.nii.gz")) for i, scan in enumerate(scans)]
    assert _prepare(renamed, tmp_path / "elsewhere").digest == data.digest
    others = [
        _prepare(renamed[::-1], tmp_path / "cache"),
        _prepare(renamed[:2], tmp_path / "cache"),
        _prepare([*renamed[:2], replace(renamed[2], label=scans[0].label)], tmp_path / "cache"),
        _prepare(renamed, tmp_path / "cache", label_map=LabelMap.load("coarse")),
        _prepare(renamed, tmp_path / "cache", grid=Grid(32, 6.0)),
    ]
    assert len({data.digest, *(other.digest for other in others)}) == 6


def test_a_data_loader_reads_in_worker_processes(scans, tmp_path):
    data = _prepare(scans, tmp_path / "cache")
    loader = torch.utils.data.DataLoader(data, batch_size=8, num_workers=1)
    images = torch.cat([image for image, _ in loader])
    torch.testing.assert_close(images, torch.stack([data[i][0] for i in range(len(data))]))


def test_the_cache_does_not_depend_on_the_number_of_workers(scans, tmp_path):
    for workers in (0, 4):
        _prepare(scans, tmp_path / str(workers), workers=workers)
    assert _files(tmp_path / "0") == _files(tmp_path / "4")


def test_a_second_call_reads_the_cache_and_computes_nothing(scans, tmp_path, monkeypatch):
    first = _prepare(scans, tmp_path / "cache")
    monkeypatch.setattr(cache, "conform_image", None)
    second = _prepare(scans[::-1], tmp_path / "cache")
    np.testing.assert_array_equal(second.volume(0)[0], first.volume(2)[0])


def test_the_cache_follows_content_and_not_names(scans, tmp_path, scan_pair):
    _prepare(scans[:1], tmp_path / "cache")
    moved = scans[0].image.rename(tmp_path / "renamed.nii.gz")
    os.utime(moved, (0, 0))
    _prepare([replace(scans[0], image=moved)], tmp_path / "cache")
    assert len(_entries(tmp_path / "cache")) == 1
    other_image, _ = scan_pair("s0", 99)
    changed = _prepare([replace(scans[0], image=other_image)], tmp_path / "cache")
    assert len(_entries(tmp_path / "cache")) == 2
    assert changed.volume(0)[0].flat[0] == np.random.default_rng(99).integers(0, 256, (64, 64, 64), np.uint8).flat[0]


def test_a_settled_file_is_hashed_once_and_again_when_its_date_changes(scans, tmp_path, monkeypatch):
    hashed = []

    def open_(path, *args):
        hashed.append(Path(path).name)
        return open(path, *args)

    def read(date: float) -> list[str]:
        hashed.clear()
        os.utime(scans[0].image, (date, date))
        _prepare(scans[:1], tmp_path / "cache")
        return [name for name in hashed if name.endswith("T1w.nii.gz")]

    monkeypatch.setattr(cache, "open", open_, raising=False)
    assert read(1000) == ["s0_T1w.nii.gz"]
    assert read(1000) == []
    assert read(2000) == ["s0_T1w.nii.gz"]
    assert read(time.time()) == ["s0_T1w.nii.gz"]
    assert read(time.time()) == ["s0_T1w.nii.gz"]  # too young to be trusted
    (tmp_path / "cache" / ".digests.json").write_text("[broken")
    assert read(2000) == ["s0_T1w.nii.gz"]


def test_another_grid_or_label_map_is_another_entry(scans, tmp_path):
    for label_map, grid in ((FIFTY, GRID), (LabelMap.load("coarse"), GRID), (FIFTY, Grid(32, 6.0))):
        _prepare(scans[:1], tmp_path / "cache", label_map=label_map, grid=grid)
    assert len(_entries(tmp_path / "cache")) == 3


def test_a_scan_without_label_is_for_prediction_only(scans, tmp_path):
    data = _prepare([replace(scans[0], label=None)], tmp_path / "cache")
    image, classes = data.volume(0)
    assert image.shape == (64, 64, 64)
    assert classes is None
    with pytest.raises(InputError, match="has no label"):
        data[0]


_KILLED = """
import os, signal, sys
from pathlib import Path
from dwc.data import cache
from dwc.data.grid import Grid
from dwc.data.labels import LabelMap
from dwc.data.manifest import Scan

calls = []
def fsync(file, fsync=os.fsync):
    fsync(file)
    calls.append(file)
    if len(calls) == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
os.fsync = fsync
scan = Scan(Path(sys.argv[1]), Path(sys.argv[2]), "s", "H", "train")
cache.prepare([scan], LabelMap.load("fifty"), Grid(64, 3.0), sys.argv[3], progress=False)
"""


def test_a_killed_build_leaves_nothing_that_looks_whole(scans, tmp_path):
    arguments = [scans[0].image, scans[0].label, tmp_path / "cache", "3"]  # 3: all files written, not yet renamed
    killed = subprocess.run([sys.executable, "-c", _KILLED, *arguments], timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name[:12] for path in (tmp_path / "cache").iterdir()] == [".unfinished-"]
    _prepare(scans[:1], tmp_path / "cache")
    _prepare(scans[:1], tmp_path / "fresh")
    assert _files(tmp_path / "cache") == _files(tmp_path / "fresh")


@pytest.mark.parametrize("damage", ["cut", "missing", "moments"])
def test_a_damaged_entry_is_built_again(scans, tmp_path, damage):
    _prepare(scans[:1], tmp_path / "cache")
    whole = _files(tmp_path / "cache")
    (entry,) = _entries(tmp_path / "cache")
    if damage == "cut":
        os.truncate(entry / "image.npy", 1000)
    elif damage == "missing":
        (entry / "label.npy").unlink()
    else:
        (entry / "moments.json").write_text("{")
    _prepare(scans[:1], tmp_path / "cache")
    assert _files(tmp_path / "cache") == whole


def test_concurrent_builders_of_one_entry_agree(scans, tmp_path, monkeypatch):
    started = threading.Barrier(4, timeout=60)
    conform_image = cache.conform_image

    def together(*args):
        started.wait()
        return conform_image(*args)

    monkeypatch.setattr(cache, "conform_image", together)
    _prepare([scans[0]] * 4, tmp_path / "cache", workers=4)
    assert len(_entries(tmp_path / "cache")) == 1
    assert not list((tmp_path / "cache").glob(".unfinished*"))


def test_remains_of_builds_killed_long_ago_are_removed_and_young_ones_kept(scans, tmp_path):
    old, young = (tmp_path / "cache" / f".unfinished-{age}" for age in ("old", "young"))
    for folder in (old, young):
        folder.mkdir(parents=True)
        (folder / "image.npy").touch()
    digests = tmp_path / "cache" / "..digests.json.x.part"
    digests.touch()
    for path in (old, digests):
        os.utime(path, (time.time() - 200_000,) * 2)
    _prepare(scans[:1], tmp_path / "cache")
    assert not old.exists()
    assert not digests.exists()
    assert young.exists()


def test_a_full_disk_is_bad_input_and_leaves_nothing(scans, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(InputError, match="No space left on device") as caught:
        _prepare(scans, tmp_path / "cache", workers=2)
    assert str(tmp_path / "cache") in str(caught.value)
    assert not list((tmp_path / "cache").iterdir())


def test_a_write_cut_short_is_told_by_its_reason_and_not_in_bytes(scans, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # an array takes 262144 bytes
    try:
        with pytest.raises(InputError, match=r"cannot write the cache \(File too large\); free space"):
            _prepare(scans[:1], tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "cache").iterdir())


def test_an_unwritable_cache_is_bad_input(scans, tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(InputError, match="cannot write the cache"):
            _prepare(scans, folder)


def test_a_grid_that_does_not_split_is_bad_input(scans, tmp_path):
    with pytest.raises(InputError, match="multiple of 32"):
        _prepare(scans, tmp_path / "cache", grid=Grid(100, 2.0))


@pytest.mark.parametrize("workers", [0, 2])
def test_one_bad_scan_stops_the_preparation_and_is_named(scans, tmp_path, workers):
    scans[1].image.write_bytes(scans[1].image.read_bytes()[:5000])
    with pytest.raises(InputError, match=r"s1_T1w\.nii\.gz"):
        _prepare(scans, tmp_path / "cache", workers=workers)
    with pytest.raises(InputError, match=r"gone\.nii\.gz"):
        _prepare([replace(scans[0], image=tmp_path / "gone.nii.gz")], tmp_path / "cache")


def test_many_volumes_do_not_hold_many_open_files(scans, tmp_path):
    data = _prepare(scans * 100, tmp_path / "cache")
    open_files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for v in range(data.n_volumes):
        data[v * 8]
    assert len(data) == 2400
    if open_files:
        assert len(os.listdir("/proc/self/fd")) < open_files + 140


def test_few_file_handles_are_enough_for_many_volumes(scans, tmp_path):
    prepared = _prepare(scans, tmp_path / "cache")
    order = sorted(range(3), key=lambda v: prepared._folders[v])
    data = SubVolumes([scans[0]] * 200, _copies(tmp_path, 200), FIFTY, GRID)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, limits[1]))
    try:
        for v in range(data.n_volumes):
            np.testing.assert_array_equal(data.volume(v)[0], prepared.volume(order[0])[0])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def _copies(folder: Path, count: int) -> list[Path]:
    """Links to one entry of the cache under many names, each of which is opened for itself."""
    (entry, *_) = sorted(_entries(folder / "cache"))
    names = [folder / f"copy-{number}" for number in range(count)]
    for name in names:
        name.symlink_to(entry)
    return names
