import numpy as np
import pandas as pd
import pytest

from benchmarks.quality_flags import DEGRADATIONS, area, degraded, table_of
from dwc.quality import LIMITS


def test_a_scan_is_yielded_clean_and_in_every_way_at_every_strength_in_uint8():
    image = np.random.default_rng(0).integers(0, 255, (16, 16, 16), np.uint8)
    kinds = [(kind, strength) for kind, strength, _ in degraded(image, 0)]
    assert kinds[0] == ("clean", 0.0)
    assert len(kinds) == 1 + sum(len(strengths) for _, strengths in DEGRADATIONS.values())
    again = [scan for *_, scan in degraded(image, 0)]
    for (kind, _, scan), other in zip(degraded(image, 0), again, strict=True):
        assert scan.dtype == np.uint8, kind
        np.testing.assert_array_equal(scan, other)
        assert kind == "clean" or (scan != image).any()


def test_the_area_counts_pairs_and_ties_by_half():
    assert area(np.array([0.0, 1.0]), np.array([2.0, 3.0])) == 1
    assert area(np.array([0.0, 1.0]), np.array([0.0, 1.0])) == 0.5


def test_the_table_counts_flagged_scans_and_what_flagged_them():
    noise = next(limit for limit in LIMITS if limit.measure == "noise")
    good, bad = {"noise": noise.typical}, {"noise": 2 * noise.limit}
    measured = pd.DataFrame([
        {"scan": "a", "kind": "clean", "strength": 0.0, **good},
        {"scan": "b", "kind": "clean", "strength": 0.0, **good},
        {"scan": "a", "kind": "noise", "strength": 0.1, **bad}, {"scan": "b", "kind": "noise", "strength": 0.1, **good},
    ])  # fmt: skip
    measured["score"] = [0.0, 0.0, 5.0, 0.0]
    clean, noisy = table_of(measured).to_dict("records")
    assert (clean["flagged"], clean["scans"]) == (0, 2)
    assert (noisy["flagged"], noisy["scans"], noisy["by"]) == (1, 2, "noise 1")
    assert noisy["auc"] == pytest.approx(0.75)
