import numpy as np

from dwc.components import largest_components
from dwc.data.labels import LabelMap

FIFTY = LabelMap.load("fifty")
WHITE, VENTRICLE, THALAMUS, STEM = (FIFTY.names.index(name) for name in (
    "Cerebral-White-Matter", "Lateral-Ventricle", "Thalamus-Proper", "Brain-Stem",
))  # fmt: skip


def brain() -> np.ndarray:
    """White matter around two thalami and a brain stem."""
    labels = np.zeros((32, 32, 32), np.uint8)
    labels[4:28, 4:28, 4:28] = WHITE
    labels[8:12, 12:16, 12:16] = labels[18:22, 12:16, 12:16] = THALAMUS
    labels[12:16, 20:28, 12:16] = STEM
    return labels


def test_a_segmentation_without_islands_stays_as_it_is():
    labels = brain()
    np.testing.assert_array_equal(largest_components(labels, FIFTY), labels)
    empty = np.zeros((8, 8, 8), np.uint8)
    np.testing.assert_array_equal(largest_components(empty, FIFTY), empty)


def test_both_sides_of_a_structure_stay_and_its_islands_take_the_class_around_them():
    labels = brain()
    labels[24:26, 6:8, 6:8] = THALAMUS  # a third part of a structure with two ids
    labels[5, 25, 25] = STEM  # a second part of one with one id
    np.testing.assert_array_equal(largest_components(labels, FIFTY), brain())


def test_islands_outside_the_brain_become_background():
    labels = brain()
    labels[1, 1, 1:3] = STEM
    labels[30, 30, 30] = WHITE
    np.testing.assert_array_equal(largest_components(labels, FIFTY), brain())


def test_a_class_of_many_structures_keeps_its_parts():
    labels = brain()
    for x in (6, 14, 24):
        labels[x : x + 2, 22:24, 20:24] = VENTRICLE  # the lateral ventricles and the fourth
    np.testing.assert_array_equal(largest_components(labels, FIFTY), labels)


def test_specks_of_a_class_of_many_structures_go():
    labels = brain()
    labels[6:14, 6:10, 20:26] = VENTRICLE
    expected = labels.copy()
    labels[20, 20, 20] = VENTRICLE
    np.testing.assert_array_equal(largest_components(labels, FIFTY), expected)
