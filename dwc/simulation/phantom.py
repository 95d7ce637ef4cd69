"""A procedural head of ellipsoids and tubes, for tests and demos without data; its anatomy is only approximate."""

from collections.abc import Sequence
from importlib.resources import files
from itertools import pairwise

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from dwc.data.labels import read_tsv

__all__ = ["make_phantom"]

_CENTRE = np.array([0.0, -19.0, 5.0])  # mm, atlas coordinates of the middle of the volume
_HEAD_SCALE = 0.93  # the atlas is larger than a median head
_CORTEX = 3.2  # mm
_SULCUS_DEPTH = 18.0  # mm

_WHITE, _VENTRICLE, _CEREBELLAR_WHITE, _CEREBELLAR_CORTEX, _CSF, _CALLOSUM = 1, 2, 3, 4, 12, 15
_SOFT_TISSUE, _EYE, _SKIN, _SKULL = 52, 53, 55, 58  # codes outside the brain, as in label maps of whole heads

_Chain = tuple[tuple[float, float, float], ...]  # mm

# Deep structures: (class, radius, points (|x|, y, z)) and (class, centre, radii), mm; later ones overwrite earlier.
_TUBES: tuple[tuple[int, float, _Chain], ...] = (
    (9, 13.0, ((0, -20, -14), (0, -24, -26))),
    (9, 10.0, ((0, -26, -30), (0, -36, -52), (0, -46, -78))),
    (14, 5.5, ((7, -20, -11), (12, -8, -9))),
    (10, 5.2, ((24, -10, -20), (30, -22, -16), (27, -35, -6))),
    (6, 4.5, ((13, 6, 14), (17, -10, 21), (20, -24, 20))),
    (
        15,
        4.2,
        ((2, 22, -4), (2, 31, 4), (2, 24, 15), (2, 5, 23), (2, -15, 26), (2, -32, 21), (2, -37, 13), (2, -30, 9)),
    ),
)
_ELLIPSOIDS = (
    (5, (11.5, -19, 7), (9.5, 14, 9)),
    (7, (26, 2, 1), (6.5, 17, 10)),
    (8, (19.5, -4, 0), (5, 9, 6.5)),
    (6, (13, 15, 7), (6.5, 10, 9)),
    (13, (10, 11, -7), (5, 5, 4.5)),
    (11, (24, -3, -19), (7.5, 7, 7)),
)
_VENTRICLES: tuple[tuple[float, _Chain], ...] = (  # radii, to be multiplied by the size of the ventricles
    (3.4, ((9, 34, 4), (9, 22, 12), (9, 2, 19), (11, -18, 20), (18, -38, 13))),
    (4.2, ((18, -38, 13), (24, -44, 4), (20, -62, 4))),
    (2.2, ((24, -44, 4), (33, -30, -10), (33, -14, -18))),
    (2.2, ((0, 4, -8), (0, -8, -4), (0, -22, 4))),
    (1.8, ((0, -28, -8), (0, -34, -20))),
    (4.0, ((0, -40, -28), (0, -42, -36))),
)


def make_phantom(size: int = 64, voxel_size: float = 3.0, seed: int = 0) -> np.ndarray:
    """Label volume of a head, uint8 [size, size, size]; it has all 50 classes at 64^3 voxels of 3 mm and finer.

    Codes: classes 0..49 (12: CSF around the brain); outside the brain 52 soft tissue, 53 eyes, 55 skin, 58 skull.

    Parameters
    ----------
    size, voxel_size : int, float
        The cube, in voxels and mm per voxel, in LIA orientation and centred on the brain. The head measures about
        150 x 185 x 200 mm; the cube cuts off the rest.
    seed : int
        The person: proportions of the head, size of the ventricles, course of the sulci.
    """
    rng = np.random.default_rng(seed)
    point = _coordinates(size, voxel_size, rng)
    mirrored = np.stack([np.abs(point[0]), point[1], point[2]])
    ventricles = rng.uniform(0.9, 1.7)
    folds = _folds(point, voxel_size, rng)

    codes = _outside(point, mirrored)
    inner = codes == _CSF
    cerebrum, sylvian = _cerebrum(mirrored, folds, voxel_size)
    cerebrum &= inner
    depth_from_pial = ndimage.distance_transform_edt(cerebrum, sampling=voxel_size) - voxel_size / 2
    codes[cerebrum] = _WHITE
    _place_cerebellum(codes, mirrored, folds, inner & ~cerebrum & ~sylvian)
    cortex = cerebrum & (depth_from_pial < max(_CORTEX, 0.6 * voxel_size)) & ~_near_core(mirrored)
    codes[cortex] = _parcel(mirrored, cortex)
    _place_deep(codes, mirrored, ventricles, voxel_size)
    return codes


def _coordinates(size: int, voxel_size: float, rng: np.random.Generator) -> np.ndarray:
    """Atlas coordinates (x right, y anterior, z superior) of every voxel in mm, float32 [3, size, size, size]."""
    mm = (np.arange(size, dtype=np.float32) - size / 2) * np.float32(voxel_size)
    left, inferior, anterior = np.meshgrid(mm, mm, mm, indexing="ij", sparse=True)
    scale = _HEAD_SCALE * rng.normal(1, 0.02) * rng.normal(1, 0.02, 3)
    shape = (size,) * 3
    axes = (-left, anterior, -inferior)
    point = np.stack([np.broadcast_to(a / np.float32(s), shape) for a, s in zip(axes, scale, strict=True)])
    point += _CENTRE.astype(np.float32)[:, None, None, None]
    x, y, z = point
    for axis, others in enumerate(((y, z), (x, z), (x, y))):  # a slight, slowly varying bend for each person
        phase = rng.uniform(0, 2 * np.pi, 2)
        bend = sum(np.sin(o / np.float32(30) + np.float32(p)) for o, p in zip(others, phase, strict=True))
        point[axis] += np.float32(0.8) * bend
    return point


def _folds(point: np.ndarray, voxel_size: float, rng: np.random.Generator) -> np.ndarray:
    """A field that crosses zero along the sulci: interfering waves of 20 to 30 mm, bent by slower ones.

    Above 2 mm voxels the waves are proportionally longer, so that gyri stay several voxels wide.
    """
    field = np.zeros(point.shape[1:], np.float32)
    for _ in range(5):
        direction = rng.normal(size=3)
        direction *= 2 * np.pi / (rng.uniform(20, 30) * max(1, voxel_size / 2)) / np.linalg.norm(direction)
        k, phase, bend = direction.astype(np.float32), rng.uniform(0, 2 * np.pi), rng.uniform(0.02, 0.05, 3)
        wave = sum(k[a] * (point[a] + 6 * np.sin(np.float32(bend[a]) * point[a - 1])) for a in range(3))
        field += np.sin(wave + np.float32(phase))
    return field


def _ellipsoid(mirrored: np.ndarray, centre: Sequence[float], radii: Sequence[float] | np.ndarray) -> np.ndarray:
    """Squared distance from the centre in units of the radii; below 1 inside."""
    terms = ((m - np.float32(c)) / np.float32(r) for m, c, r in zip(mirrored, centre, radii, strict=True))
    return sum(np.square(term) for term in terms)


def _tube(mirrored: np.ndarray, points: Sequence[Sequence[float]]) -> np.ndarray:
    """Squared distance in mm from a chain of line segments."""
    chain = np.asarray(points, np.float32)
    nearest = np.full(mirrored.shape[1:], np.inf, np.float32)
    for start, end in pairwise(chain):
        along = end - start
        offset = [mirrored[a] - start[a] for a in range(3)]
        t = np.clip(sum(o * a for o, a in zip(offset, along, strict=True)) / (along @ along), 0, 1)
        distance = sum(np.square(o - t * a) for o, a in zip(offset, along, strict=True))
        np.minimum(nearest, distance, out=nearest)
    return nearest


def _outside(point: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
    """Air, skin, soft tissue, eyes, skull, and CSF in the whole space of the brain."""
    _, y, z = point
    vault = _ellipsoid(mirrored, (0, -17, 8), (72, 91, 74))
    base = _ellipsoid(mirrored, (0, -54, -36), (55, 46, 32))  # the space for the cerebellum
    neck = _ellipsoid(mirrored, (0, -38, -110), (58, 62, 110))
    face = _ellipsoid(mirrored, (0, 42, -58), (56, 54, 62))
    jaw = np.where(z < -8, np.minimum(face, neck), np.inf)
    codes = np.zeros(point.shape[1:], np.uint8)
    skull_radius, skin_radius = 1.17, 1.32  # squared: 6 and 11 mm outside the brain
    codes[(vault < skin_radius) & (z > -50)] = _SKIN
    codes[jaw < 1] = _SKIN
    codes[jaw < 0.88] = _SOFT_TISSUE
    codes[_ellipsoid(mirrored, (0, 98, -42), (9, 12, 16)) < 1] = _SKIN
    codes[(np.minimum(vault, base) < skull_radius) & (codes > 0) | (base < skull_radius)] = _SKULL
    codes[_ellipsoid(mirrored, (0, 62, -56), (14, 34, 20)) < 1] = 0  # nose and mouth hold air
    codes[_ellipsoid(mirrored, (32, 66, -34), (13, 13, 13)) < 1] = _EYE
    inside = (vault < 1) & (z > np.where(y > 10, -27 - 0.8 * np.maximum(30 - y, 0), -50)) | (base < 1)
    codes[inside] = _CSF
    codes[(_tube(mirrored, ((0, -40, -60), (0, -48, -140))) < 13**2) & (z < -50)] = _CSF
    return codes


def _cerebrum(mirrored: np.ndarray, folds: np.ndarray, voxel_size: float) -> tuple[np.ndarray, np.ndarray]:
    """Masks of both hemispheres with sulci, and of the Sylvian fissure."""
    x, y, z = mirrored
    hull = np.maximum(_ellipsoid(mirrored, (0, -17, 10), (68, 87, 68)), 0)
    floor = np.where(y > 10, np.float32(-22), np.float32(-14) + np.float32(0.12) * np.clip(y + 60, -40, 60))
    upper = (hull < 1) & (z > floor)
    temporal = np.minimum(
        _ellipsoid(mirrored, (43, -12, -22), (23, 40, 23)), _ellipsoid(mirrored, (40, -38, -14), (25, 40, 16))
    )
    lobe = (temporal < 1) & (hull < 1.12)
    half_width = np.float32(max(1.2, 0.4 * voxel_size))
    fissure = (x < half_width) & ~_near_core(mirrored)
    sylvian_z = np.float32(4) - np.float32(0.4) * (y + 5)
    sylvian = (np.abs(z - sylvian_z) < half_width) & (x > 37) & (y > -32) & (y < 26)
    depth = (1 - np.sqrt(hull)) * 72
    depth = np.minimum(depth, np.where(_near_core(mirrored), np.float32(99), x))  # the medial wall folds too
    temporal_depth = (1 - np.sqrt(np.maximum(temporal, 0))) * 24
    depth = np.where(lobe & ~(upper & (z > -8)), np.minimum(temporal_depth, 30), depth)
    width = np.float32(0.17) * np.float32(max(1.0, voxel_size / 2.4))
    sulcus = (np.abs(folds) < width) & (depth < _SULCUS_DEPTH)
    return (upper | lobe) & ~fissure & ~sylvian & ~sulcus, sylvian


def _near_core(mirrored: np.ndarray) -> np.ndarray:
    """The middle of the brain, where the surface of the cerebrum is not cortex."""
    return _ellipsoid(mirrored, (0, -8, 2), (17, 42, 25)) < 1


def _place_cerebellum(codes: np.ndarray, mirrored: np.ndarray, folds: np.ndarray, free: np.ndarray) -> None:
    hemisphere = _ellipsoid(mirrored, (25, -62, -37), (30, 29, 23))
    vermis = _ellipsoid(mirrored, (0, -62, -34), (14, 25, 23))
    body = np.minimum(hemisphere, vermis)
    codes[free & (body < 1)] = _CEREBELLAR_CORTEX
    core = np.minimum(
        _ellipsoid(mirrored, (20, -58, -38), (20, 17, 10)), _ellipsoid(mirrored, (8, -52, -36), (12, 10, 8))
    )
    codes[free & (core + 0.12 * folds < 1) & (body < 1)] = _CEREBELLAR_WHITE


def _parcel(mirrored: np.ndarray, cortex: np.ndarray) -> np.ndarray:
    """Class of each cortical voxel: the Desikan-Killiany parcel with the nearest mean position."""
    rows = read_tsv(str(files(__package__) / "dk_centroids.tsv"))
    centroids = np.array([[float(row[c]) for c in ("abs_x", "y", "z")] for row in rows])
    classes = np.array([int(row["class"]) for row in rows], np.uint8)
    return classes[cKDTree(centroids).query(mirrored[:, cortex].T)[1]]


def _place_deep(codes: np.ndarray, mirrored: np.ndarray, ventricles: float, voxel_size: float) -> None:
    x, y, z = mirrored
    near = (x < 50) & (y > -95) & (y < 45) & (z > -95) & (z < 40)  # all deep structures; saves most of the time
    box = ndimage.find_objects(near.view(np.uint8))[0]
    codes, mirrored = codes[box], mirrored[(slice(None), *box)]  # views, so writing changes the whole volume
    at_least = 0.55 * voxel_size  # thinner tubes would miss the voxel centres
    for code, radius, points in _TUBES:
        inside = _tube(mirrored, points) < max(radius, at_least) ** 2
        codes[inside & (codes != _CEREBELLAR_CORTEX)] = code
    for code, centre, radii in _ELLIPSOIDS:
        codes[_ellipsoid(mirrored, centre, np.maximum(radii, at_least)) < 1] = code
    for radius, chain in _VENTRICLES:
        codes[_tube(mirrored, chain) < max(radius * ventricles, at_least) ** 2] = _VENTRICLE
