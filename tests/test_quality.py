import numpy as np
import pytest

from benchmarks.quality_flags import DEGRADATIONS
from dwc import quality
from dwc.data.grid import Grid
from dwc.data.intensity import to_uint8
from dwc.data.labels import LabelMap
from dwc.prediction import Prediction
from dwc.simulation.phantom import make_phantom
from dwc.simulation.scans import simulate

GRID, COARSE, FIFTY = Grid(64, 3.0), LabelMap.load("coarse"), LabelMap.load("fifty")


@pytest.fixture(scope="module")
def head() -> tuple[np.ndarray, np.ndarray]:
    """A simulated scan and its true classes."""
    image, codes = simulate(make_phantom(64, 3.0, seed=0), "H", voxel_size=3.0, seed=0)
    return image, COARSE.apply(FIFTY.to_ids(np.where(codes < 50, codes, 0)))


def predicted(labels: np.ndarray, entropy: float = 0.2) -> Prediction:
    values = np.full(labels.shape, entropy, np.float32)
    return Prediction(labels, values, values, np.zeros((1, 9), np.int64), np.zeros_like(values), np.zeros_like(values))


def flags(image: np.ndarray, labels: np.ndarray, entropy: float = 0.2, label_map: LabelMap = COARSE) -> set[str]:
    return set(quality.flagged(quality.measure(image, predicted(labels, entropy), label_map, GRID)))


def worse(head: tuple[np.ndarray, np.ndarray], kind: str, strength: float) -> np.ndarray:
    degrade, _ = DEGRADATIONS[kind]
    image = degrade(head[0].astype(np.float32), strength, np.random.default_rng(0))
    return to_uint8(np.ascontiguousarray(image, np.float32))


def test_a_good_segmentation_of_a_clean_scan_is_not_flagged(head):
    assert flags(*head) == set()


@pytest.mark.parametrize(
    ("kind", "strength", "flag"),
    [
        ("noise", 0.2, "noise"),
        ("cut at the top", 0.2, "cut_cm2"),
        ("contrast", 0.5, "contrast"),
    ],
)
def test_a_degraded_scan_is_flagged_for_what_is_wrong_with_it(head, kind, strength, flag):
    assert flag in flags(worse(head, kind, strength), head[1])


def test_a_ghost_beside_the_head_is_flagged(head):
    image, labels = head
    ghost = np.maximum(image, np.roll(image, 32, axis=2) // 4)
    assert flags(ghost, labels) == {"ghosts"}


@pytest.mark.parametrize(("axis", "flag"), [(1, "hind_below_mm"), (2, "hind_behind_mm")])
def test_a_head_upside_down_or_front_to_back_is_flagged_by_where_the_cerebellum_lies(head, axis, flag):
    image, labels = (np.flip(volume, axis).copy() for volume in head)
    assert flag in flags(image, labels)
    assert flags(*(np.flip(volume, 0).copy() for volume in head)) == set()  # left to right is not seen


def test_a_brain_that_is_too_small_in_pieces_or_uncertain_is_flagged(head):
    image, labels = head
    assert flags(image, np.where(labels > 3, labels, 0)) >= {"brain_ml"}
    pieces = labels.copy()
    pieces[2:12, 2:12, 2:32] = 1
    assert "loose" in flags(image, pieces)
    assert flags(image, labels, entropy=1.0) == {"entropy"}
    assert "brain_ml" in flags(image, np.zeros_like(labels))


def test_a_brain_that_ends_with_the_field_of_view_is_flagged(head):
    image, labels = (volume.copy() for volume in head)
    end = int(np.flatnonzero((labels > 0).any(axis=(0, 2)))[-1]) - 15
    image[:, end:], labels[:, end - 1 :] = 0, 0
    assert "cut_below_cm2" in flags(image, labels)


def test_reasons_are_sentences_with_the_measured_value(head):
    measures = quality.measure(worse(head, "noise", 0.2), predicted(head[1]), COARSE, GRID)
    reason = next(line for line in quality.reasons(measures) if line.startswith("noise"))
    assert f"{measures['noise']:.2f}" in reason
    assert quality.score(measures) > 1


def test_a_label_map_without_a_whole_brain_is_not_judged_by_the_brains_size(head, tmp_path):
    (tmp_path / "mine.tsv").write_text("index\tclass\tname\n17\t1\tLeft-Hippocampus\n53\t1\tRight-Hippocampus\n")
    labels = (head[1] == COARSE.names.index("Hippocampus-Amygdala")).astype(np.uint8)
    assert "brain_ml" not in flags(head[0], labels, label_map=LabelMap.load(tmp_path / "mine.tsv"))
