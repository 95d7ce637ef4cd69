"""Walk through a JSON value and replace an entry, for tests that replace every entry by something else."""

import copy
from collections.abc import Iterator
from typing import Any


def places(value: Any, place: tuple = ()) -> Iterator[tuple]:
    """To every entry within a JSON value, objects and lists too."""
    if place:
        yield place
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from places(part, (*place, key))


def with_entry(value: dict, place: tuple, entry: Any) -> dict:
    """A copy with another entry in this place."""
    value = copy.deepcopy(value)
    part = value
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = entry
    return value
