"""Settings refuse bad types and values when they are made, for every caller."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from dwc.base.errors import InputError
from dwc.base.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Part(Settings):
    steps: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("steps")


@dataclass(frozen=True, kw_only=True)
class Whole(Settings):
    mode: Literal["map", "vi"] = "map"
    data: Path
    n: int = 3
    rate: float | None = None
    on: bool = False
    dilations: tuple[int, ...] | None = None
    counts: dict[str, int] = field(default_factory=dict)
    temper: float | Literal["auto"] = 1.0
    part: Part = Part()
    other: Part | None = None


def test_values_of_other_libraries_and_of_yaml_become_the_declared_types():
    made = Whole(
        data="~/x", n=np.int64(4), rate=np.float32(0.5), dilations=[1, 2], temper=2, other={"steps": 2}, counts={"a": 1}
    )
    assert made.data == Path("~/x").expanduser()
    assert (made.n, type(made.n)) == (4, int)
    assert (made.rate, type(made.rate)) == (0.5, float)
    assert made.dilations == (1, 2)
    assert made.temper == 2.0
    assert made.other == Part(steps=2)
    assert Whole(**made.to_json()) == made


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"mode": "bogus"}, "`mode` 'bogus': give 'map' or 'vi'"),
        ({"data": None}, "`data` None: give a path"),
        ({"data": 3}, "`data` 3: give a path"),
        ({"n": "3"}, "`n` '3': give a whole number"),
        ({"n": True}, "`n` True: give a whole number"),
        ({"n": 2.5}, "`n` 2.5: give a whole number"),
        ({"rate": "3"}, "`rate` '3': give a number"),
        ({"rate": float("nan")}, "`rate` nan: give a finite number"),
        ({"rate": float("inf")}, "`rate` inf: give a finite number"),
        ({"on": 1}, "`on` 1: give True or False"),
        ({"on": "yes"}, "`on` 'yes': give True or False"),
        ({"dilations": 3}, "`dilations` 3: give a list"),
        ({"dilations": [1, "x"]}, "`dilations` .*: give a whole number"),
        ({"counts": {"a": "b"}}, "`counts` .*: give a whole number"),
        ({"temper": "x"}, "`temper` 'x': give a number"),
        ({"part": 3}, "`part` 3: give its settings, as a mapping"),
        ({"other": {"steps": 0}}, "`other.steps` 0: give a positive number"),
        ({"other": {"stepz": 1}}, "`other.stepz`: there is no such setting; the settings are steps"),
    ],
)
def test_wrong_types_and_values_are_refused_by_name_in_one_line(values, line):
    with pytest.raises(InputError, match=line) as caught:
        Whole(**{"data": "x", **values})
    assert "\n" not in str(caught.value)


def test_a_required_setting_is_required():
    with pytest.raises(TypeError, match="data"):
        Whole()
