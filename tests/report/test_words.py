import math

import pytest

from dwc.report.words import DASH, count, number, p_value, points, printed


def test_names_of_rows_and_differences_have_arrows_and_minus():
    assert printed("H->N+B+W->H (DWC) - H->N") == "H → N+B+W → H (DWC) \N{MINUS SIGN} H → N"


@pytest.mark.parametrize(
    ("word", "value", "text"),
    [
        (points, 0.0123, "+1.23"),
        (points, -0.0123, "\N{MINUS SIGN}1.23"),
        (p_value, 0.04963, "0.050"),
        (p_value, 1.66e-15, "1.7e\N{MINUS SIGN}15"),
        (number, -2.618, "\N{MINUS SIGN}2.62"),
        (count, 400000.0, "400\N{NARROW NO-BREAK SPACE}000"),
    ],
)
def test_numbers_are_short_and_keep_their_sign(word, value, text):
    assert word(value) == text


@pytest.mark.parametrize("word", [points, p_value, number, count])
def test_a_number_that_does_not_exist_is_a_dash(word):
    assert word(math.nan) == DASH
