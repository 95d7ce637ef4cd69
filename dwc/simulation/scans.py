"""Simulated T1 scans of sites whose scanners and people differ (`sites.tsv`), made from label volumes of heads."""

import csv
import gzip
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.processing import resample_from_to
from scipy import ndimage
from scipy.spatial.transform import Rotation

from dwc.base.errors import InputError
from dwc.base.files import write_whole
from dwc.data.conform import load_labels
from dwc.data.grid import Grid
from dwc.data.labels import LabelMap, read_tsv
from dwc.simulation.phantom import make_phantom

__all__ = ["Site", "load_sites", "mixed_site", "random_contrast", "simulate", "write_site"]

_N_CODES = 61  # classes 0..49 and 50..60 outside the brain
_N_CLASSES = 50
_VENTRICLE = 2
_REGION_SD = 3.0  # sd of the intensity offset of a region from its tissue, drawn for each scan
_ELASTIC_SPACING = 40.0  # mm between the nodes of the elastic field
_BIAS_NODES = 3  # along each axis
_FWHM_TO_SD = 0.4247
_VENTRICLE_REACH = 12.0  # mm, decay length of the displacement around grown ventricles
_MIXED = ("N", "B", "W")  # sources of mixed sites
_OUTSIDE_SPREAD = 2.5  # factor on the spread of means outside the brain in random contrasts
_LEAST_CONTRAST = 25.0  # between white and grey matter, of random contrasts
_TEXTURE = 1.5  # voxels, sd of the filter on the texture outside the brain in random contrasts


@dataclass(frozen=True)
class Site:
    """A simulated scanner and population: a row of `sites.tsv`, or a mixture of rows."""

    name: str
    tissue_means: dict[str, float]  # intensity, 0..255
    sd: float  # of intensity within a region, 0..255
    noise: float  # Rician, as a fraction of white matter
    bias: float  # amplitude of the log of the bias field
    resolution: tuple[float, float, float]  # scanner voxels along the axes of the volume, mm
    scale: float  # of heads
    ventricle: float  # growth, mm
    elastic: float  # amplitude of the deformation, mm
    log_gamma: float  # log of the exponent of the intensities
    codes: tuple[tuple[float, float], ...] = ()  # mean and sd of each code, in place of the tissues' means and `sd`


@lru_cache(maxsize=1)
def load_sites() -> dict[str, Site]:
    """The five simulated sites that stand for the paper's cohorts, by name."""
    tissues = set(_tissue_of_code())
    sites = {}
    for row in read_tsv(str(files(__package__) / "sites.tsv")):
        name = row.pop("site")
        value: dict[str, Any] = {column: float(cell) for column, cell in row.items()}
        means = {column: value.pop(column) for column in list(value) if column in tissues}
        x, y, z = (value.pop(f"res_{axis}") for axis in "xyz")
        sites[name] = Site(name=name, tissue_means=means, resolution=(x, y, z), **value)
    return sites


def mixed_site(name: str, rng: np.random.Generator) -> Site:
    """A site with a random mixture of the scanners and people of N, B and W."""
    parts = [load_sites()[site] for site in _MIXED]
    shares = rng.dirichlet(np.ones(len(parts)))

    def mixed(values: Iterable[float]) -> float:
        return float(np.dot(shares, list(values)))

    tissues = {tissue: mixed(part.tissue_means[tissue] for part in parts) for tissue in parts[0].tissue_means}
    x, y, z = (mixed(part.resolution[axis] for part in parts) for axis in range(3))
    numbers = ("sd", "noise", "bias", "scale", "ventricle", "elastic", "log_gamma")
    values: dict[str, Any] = {field: mixed(getattr(part, field) for part in parts) for field in numbers}
    return replace(parts[0], name=name, tissue_means=tissues, resolution=(x, y, z), **values)


def random_contrast(site: Site, rng: np.random.Generator) -> Site:
    """A site with another T1 contrast and resolution for one scan.

    Means of labels vary as between the real scans of `t1_priors.tsv`, those outside the brain more widely. White matter
    stays brighter than grey. Half of the axes have voxels of up to 2 mm.
    """
    rows = [{key: float(row[key]) for key in ("mean", "mean_sd", "sd", "sd_sd")} for row in _t1_priors()]
    while True:
        deviates: dict[float, float] = {}  # labels of one tissue, which have one prior, vary together
        codes = []
        for code, row in enumerate(rows):
            outside = code >= _N_CLASSES
            z = rng.normal() if outside else deviates.setdefault(row["mean"], rng.normal())
            mean = row["mean"] + z * row["mean_sd"] * (_OUTSIDE_SPREAD if outside else 1)
            # The spread within a label includes noise and partial volumes, which are simulated.
            codes.append((max(mean, 0.0), abs(row["sd"] + row["sd_sd"] * rng.normal()) / 2))
        if codes[1][0] - codes[16][0] > _LEAST_CONTRAST:
            break
    x, y, z = np.where(rng.uniform(size=3) < 0.5, rng.uniform(1, 2, 3), site.resolution)
    return replace(
        site, codes=tuple(codes), resolution=(float(x), float(y), float(z)), noise=rng.uniform(0.005, 0.05),
        bias=rng.uniform(0, 0.4), log_gamma=rng.normal(0, 0.1),
    )  # fmt: skip


def simulate(labels: np.ndarray, site: Site | str, *, voxel_size: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Deform a head and scan it at a site; a pure function of its arguments.

    The labels are warped, nearest neighbour, by scale, a small rotation, a coarse random elastic field and growth of
    the ventricles. The image is the tissue's mean at the site + an offset per region + noise per voxel, blurred by one
    voxel (FWHM), sampled at the site's resolution if that is coarser, multiplied by exp(a smooth bias field), with
    Rician noise, clipped at the 99.9th percentile and raised to gamma.

    `labels` has codes 0..60, uint8 [D, H, W] (classes 0..49, then tissues outside the brain), with voxels of
    `voxel_size` mm. Returns the scan and the warped labels, both like `labels`.
    """
    site = site if isinstance(site, Site) else _known(site)
    rng = np.random.default_rng(seed)
    labels = _warp(labels, site, voxel_size, rng)
    return _scan(labels, site, voxel_size, rng), labels


def write_site(
    out_dir: str | os.PathLike[str],
    site: Site | str,
    n_train: int,
    n_test: int,
    *,
    grid: Grid,
    seed: int = 0,
    anatomies: str | os.PathLike[str] | None = None,
    shared_by: Sequence[str] = (),
    random_contrasts: bool = False,
    unlabelled: Sequence[int] = (),
) -> Path:
    """Write a simulated site's scans, labels and, last, the manifest, whose path is returned.

    Parameters
    ----------
    out_dir : path
        Gets `<site>-<number>_T1w.nii.gz` (uint8, conformed, LIA), `..._dseg.nii.gz` (FreeSurfer ids), `manifest.csv`.
    n_train, n_test : int
        Numbers of training and test scans, of different subjects; no two sites share a subject.
    seed : int
        Determines scans and heads, which anatomies a site gets, and their split.
    anatomies : path
        A folder of label volumes (`*.nii.gz`, codes as in `simulate`) to use instead of the phantom, each centred on
        its brain. If a site needs more scans than it has anatomies, some subjects are scanned and deformed repeatedly.
    shared_by : sequence of str
        Names of all sites that share the anatomies, including this one; by default those of `load_sites`. A site that
        is named twice gets two shares.
    random_contrasts : bool
        Make each scan with a `random_contrast` of the site's scanner.
    unlabelled : sequence of int
        Label ids that are 0, background, in the labels of training scans.
    """
    site, out_dir = site if isinstance(site, Site) else _known(site), Path(out_dir)
    if min(n_train, n_test, seed) < 0 or n_train + n_test < 1:
        raise InputError(
            f"site {site.name}: {n_train} + {n_test} scans, seed {seed}; ask for at least one scan, seed >= 0"
        )
    heads = _phantoms(site, n_train, n_test, grid, seed)
    if anatomies is not None:
        sites = list(shared_by or load_sites())
        heads = _anatomies(site.name, sites, n_train, n_test, grid, Path(anatomies), seed)
    label_map = LabelMap.load("fifty")
    affine = grid.affine(np.zeros(3))
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out_dir}: cannot write ({error.strerror}); choose another folder") from error
    rows = []
    for number, (subject, split, codes) in enumerate(heads):
        scanner = site
        if random_contrasts:
            scanner = random_contrast(site, np.random.default_rng(_seed(seed, site, number, 2)))
        image, codes = simulate(codes, scanner, voxel_size=grid.voxel_size, seed=_seed(seed, site, number, 0))
        ids = label_map.to_ids(np.where(codes < _N_CLASSES, codes, 0))
        if split == "train":
            ids[np.isin(ids, unlabelled)] = 0
        names = [f"{site.name}-{number:03d}_{suffix}.nii.gz" for suffix in ("T1w", "dseg")]
        for name, voxels in zip(names, (image, ids.astype(np.int16)), strict=True):
            volume = nib.Nifti1Image(voxels, affine).to_bytes()
            write_whole(out_dir / name, gzip.compress(volume, compresslevel=4, mtime=0))
        rows.append((*names, subject, site.name, split))
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([("image", "label", "subject", "site", "split"), *rows])
    write_whole(out_dir / "manifest.csv", table.getvalue().encode())
    return out_dir / "manifest.csv"


def _known(name: str) -> Site:
    if name not in load_sites():
        raise InputError(f"site {name!r} is not simulated; choose one of {', '.join(load_sites())}")
    return load_sites()[name]


def _seed(seed: int, site: Site, number: int, purpose: int) -> int:
    """A seed for each scan (purpose 0), head (1) and contrast (2) of each site."""
    words = [seed, int.from_bytes(site.name.encode(), "little"), number, purpose]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


def _phantoms(site: Site, n_train: int, n_test: int, grid: Grid, seed: int) -> Iterator[tuple[str, str, np.ndarray]]:
    for number in range(n_train + n_test):
        codes = make_phantom(grid.size, grid.voxel_size, seed=_seed(seed, site, number, 1))
        yield f"{site.name}{number:03d}", "train" if number < n_train else "test", codes


def _anatomies(
    site: str, sites: Sequence[str], n_train: int, n_test: int, grid: Grid, folder: Path, seed: int
) -> Iterator[tuple[str, str, np.ndarray]]:
    paths = sorted(folder.glob("*.nii.gz"))
    order = np.random.default_rng(seed).permutation(len(paths))  # the same at all sites, so no two share an anatomy
    mine = [paths[i] for place, i in enumerate(order) if sites[place % len(sites)] == site]
    n_for_test = min(n_test, max(1, len(mine) // 3)) if n_test else 0
    if not mine or (n_train and len(mine) <= n_for_test):
        raise InputError(f"{folder}: {len(mine)} label volumes for site {site}; put at least {2 * len(sites)} there")
    parts = {"train": (mine[n_for_test:], n_train), "test": (mine[:n_for_test], n_test)}
    chosen = ((split, anatomies[k % len(anatomies)]) for split, (anatomies, n) in parts.items() for k in range(n))
    return ((f"{site}-{path.name.split('.')[0]}", split, _load_anatomy(path, grid)) for split, path in chosen)


@lru_cache(maxsize=8)
def _load_anatomy(path: Path, grid: Grid) -> np.ndarray:
    image = load_labels(path)
    codes = np.asanyarray(image.dataobj)
    brain = (codes > 0) & (codes < _N_CLASSES) & (codes != 12)
    if codes.min() < 0 or codes.max() >= _N_CODES or not brain.any():
        raise InputError(f"{path}: codes {codes.min()}..{codes.max()}; an anatomy holds classes 1..49 and codes to 60")
    box = ndimage.find_objects(brain.view(np.uint8))[0]
    middle = [(edge.start + edge.stop) / 2 for edge in box]
    affine = grid.affine((image.affine @ [*middle, 1])[:3])
    volume = nib.Nifti1Image(codes.astype(np.uint8), image.affine)
    return np.asanyarray(resample_from_to(volume, (grid.shape, affine), order=0).dataobj)


@lru_cache(maxsize=1)
def _t1_priors() -> list[dict[str, str]]:
    return list(read_tsv(str(files(__package__) / "t1_priors.tsv")))


@lru_cache(maxsize=1)
def _tissue_of_code() -> tuple[str, ...]:
    return tuple(row["tissue"] for row in read_tsv(str(files(__package__) / "tissues.tsv")))


def _warp(labels: np.ndarray, site: Site, voxel_size: float, rng: np.random.Generator) -> np.ndarray:
    """Labels pulled back through affine, elastic and ventricle displacement, nearest neighbour."""
    shape = labels.shape
    angles = rng.normal(0, 3, 3)
    scale = site.scale * rng.normal(1, 0.02)
    inverse = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() / scale
    middle = (np.array(shape, np.float32) - 1) / 2
    places: tuple[np.ndarray, ...] = np.indices(shape, dtype=np.float32, sparse=True)
    centred = [axis - m for axis, m in zip(places, middle, strict=True)]
    source = np.empty((3, *shape), np.float32)
    for a in range(3):
        linear = sum(np.float32(inverse[a, b]) * centred[b] for b in range(3))
        elastic = _smooth_field(shape, _nodes(shape, voxel_size), rng) * np.float32(site.elastic / voxel_size)
        source[a] = linear + middle[a] + elastic
    if site.ventricle > 0 and (labels == _VENTRICLE).any():
        _push(source, labels, site.ventricle, voxel_size)
    return ndimage.map_coordinates(labels, source, order=0, mode="constant", cval=0)


def _nodes(shape: tuple[int, ...], voxel_size: float) -> tuple[int, ...]:
    return tuple(max(4, round(size * voxel_size / _ELASTIC_SPACING)) for size in shape)


def _push(source: np.ndarray, labels: np.ndarray, growth: float, voxel_size: float) -> None:
    """Shift the lookup positions `source` towards the ventricles, which thus grow by `growth` mm."""
    reach = int(3 * _VENTRICLE_REACH / voxel_size)
    found = ndimage.find_objects((labels == _VENTRICLE).view(np.uint8))[0]
    box = tuple(
        slice(max(0, f.start - reach), min(n, f.stop + reach)) for f, n in zip(found, labels.shape, strict=True)
    )
    ventricles = labels[box] == _VENTRICLE
    distance = ndimage.distance_transform_edt(~ventricles, sampling=voxel_size).astype(np.float32)
    distance = np.maximum(distance - np.float32(voxel_size / 2), 0)  # from the surface, not from a voxel's centre
    amount = np.minimum(growth * np.exp(-distance / _VENTRICLE_REACH), distance + voxel_size / 2)
    direction = np.stack(np.gradient(ndimage.gaussian_filter(distance, 1)))
    length = np.sqrt(np.square(direction).sum(0)) + np.float32(1e-6)
    push = (-direction * (amount * ~ventricles / length / voxel_size)).astype(np.float32)

    near = np.logical_and.reduce([(s >= b.start) & (s <= b.stop - 1) for s, b in zip(source, box, strict=True)])
    places = np.stack([s[near] - b.start for s, b in zip(source, box, strict=True)])
    for axis, component in zip(source, push, strict=True):
        axis[near] += ndimage.map_coordinates(component, places, order=1, mode="nearest")


def _smooth_field(shape: tuple[int, ...], nodes: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Uniform values in -1..1 on a coarse lattice, interpolated to `shape` by cubic splines; float32."""
    field = rng.uniform(-1, 1, nodes).astype(np.float32)
    for size, n in zip(shape, nodes, strict=True):  # separable: one small matrix per axis; each step rotates the axes
        spline = _zoom(np.eye(n, dtype=np.float32), (size, n), order=3)
        field = np.tensordot(field, spline, axes=(0, 1))
    return field


def _scan(labels: np.ndarray, site: Site, voxel_size: float, rng: np.random.Generator) -> np.ndarray:
    tissues = _tissue_of_code()
    mean = np.array([site.tissue_means[tissue] for tissue in tissues], np.float32)
    mean[1:] += rng.normal(0, _REGION_SD, len(mean) - 1).astype(np.float32)
    sd = np.full(len(mean), site.sd, np.float32)
    if site.codes:
        mean, sd = np.array(site.codes, np.float32).T
    sd[0] = 1  # air has no texture

    def normal() -> np.ndarray:
        return rng.standard_normal(labels.shape, dtype=np.float32)

    texture = normal()
    if site.codes:  # fat and muscle vary over some millimetres, not from voxel to voxel
        smooth = ndimage.gaussian_filter(normal(), _TEXTURE)
        texture = np.where(labels < _N_CLASSES, texture, smooth / smooth.std())
    image = mean[labels] + sd[labels] * texture
    image = ndimage.gaussian_filter(image, _FWHM_TO_SD)
    image = _sample(image, site.resolution, voxel_size)
    nodes = (_BIAS_NODES,) * 3
    image *= np.exp(np.float32(site.bias) * _smooth_field(labels.shape, nodes, rng))
    noise_sd = np.float32(site.noise * site.tissue_means["white_matter"])
    image = np.hypot(image + noise_sd * normal(), noise_sd * normal())
    top = np.percentile(image, 99.9)
    image = np.clip(image / top, 0, 1) ** np.float32(np.exp(site.log_gamma))
    return (255 * image).round().astype(np.uint8)


def _sample(image: np.ndarray, resolution: tuple[float, float, float], voxel_size: float) -> np.ndarray:
    """An image as scanned with voxels of this size (mm), on its own grid; finer voxels leave it unchanged."""
    coarser = [max(r / voxel_size, 1.0) for r in resolution]
    if max(coarser) == 1.0:
        return image
    blurred = ndimage.gaussian_filter(image, [_FWHM_TO_SD * c if c > 1 else 0 for c in coarser])
    shape = [max(1, round(size / c)) for size, c in zip(image.shape, coarser, strict=True)]
    scanned = _zoom(blurred, shape, order=1)
    return _zoom(scanned, image.shape, order=1)


def _zoom(array: np.ndarray, shape: Sequence[int], order: int) -> np.ndarray:
    factors = [to / size for to, size in zip(shape, array.shape, strict=True)]
    return ndimage.zoom(array, factors, order=order, mode="nearest", grid_mode=True)
