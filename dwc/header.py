"""The header of a posterior file: which entries it may have, of which types and sizes.

Files come from other sites, so everything is bounded before it is used: depth, lengths, counts and their sums.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dwc.base.errors import InputError
from dwc.base.files import canonical_json

__all__ = ["MAX_VOLUMES", "check_header"]

MAX_VOLUMES = 10**9  # of one site; with `_MAX_SITES` of them, sums stay below 2^53, exact in every JSON reader
_MAX_SITES = 10**6
_MAX_DEPTH = 8
_MAX_TEXT = 1000  # characters of one string
_MAX_BYTES = 64 * 1024  # of all entries but the list of sites
_OBJECTS = ("architecture", "label_map", "preprocessing", "training")
_TEXTS = ("package_version", "prior_sha256")
_MAX_GRID = 1024  # voxels of each edge


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300


# What else dwc reads, and what it may be where it is given.
_READ: dict[tuple[str, str], Callable[[Any], bool]] = {
    ("label_map", "name"): lambda value: isinstance(value, str),
    ("label_map", "sha256"): lambda value: isinstance(value, str),
    ("preprocessing", "grid_size"): lambda value: type(value) is int and 0 < value <= _MAX_GRID,
    ("preprocessing", "voxel_size"): lambda value: _is_number(value) and 0 < value < 1000,
    ("training", "seed"): lambda value: type(value) is int and 0 <= value < 2**63,
    ("training", "test_fraction"): lambda value: _is_number(value) and 0 <= value < 1,
}


def check_header(name: str, header: Mapping[str, Any]) -> None:
    """Refuse a header whose entries are of wrong types or sizes; entries that dwc does not know are only bounded."""
    rest = {key: value for key, value in header.items() if key != "sites"}
    _check_bounds(name, rest)
    for key in _OBJECTS:
        if not isinstance(header.get(key) or {}, dict):
            raise InputError(f"{name}: its header's {key} is not a JSON object; write the file again with dwc train")
    for key in _TEXTS:
        if not isinstance(header.get(key) or "", str):
            raise InputError(f"{name}: its header's {key} is not text; write the file again with dwc train")
    for (key, part), may_be in _READ.items():
        entry = header.get(key) or {}
        if part in entry and not may_be(entry[part]):
            raise InputError(
                f"{name}: its header's {key}.{part} is {str(entry[part])[:20]!r}; write the file again with dwc train"
            )
    sites = _checked_sites(name, header.get("sites"))
    n_volumes = header.get("n_volumes")
    if n_volumes is None:
        return
    if not _is_count(n_volumes, MAX_VOLUMES * max(1, len(sites))):
        raise InputError(
            f"{name}: its header's n_volumes {str(n_volumes)[:20]!r} is not a count; write it again with dwc train"
        )
    if sites and n_volumes != sum(site["n_volumes"] for site in sites):
        raise InputError(
            f"{name}: its header's n_volumes {n_volumes} is not the sum over its sites; "
            "write it again with dwc consolidate"
        )


def _checked_sites(name: str, sites: Any) -> list[dict[str, Any]]:
    """The list of sites in a consolidated posterior; empty for a site's own."""
    if sites is None:
        return []
    whole = isinstance(sites, list) and len(sites) <= _MAX_SITES and all(map(_is_site, sites))
    if not whole or len({site["sha256"] for site in sites}) < len(sites):
        raise InputError(f"{name}: its header's list of sites cannot be read; write it again with dwc consolidate")
    for site in sites:
        if not _is_power(site.get("temper", 1.0)):
            raise InputError(
                f"{name}: its header gives a site power {str(site['temper'])[:20]}; write it again with dwc consolidate"
            )
    return sites


def _is_site(site: Any) -> bool:
    return (
        isinstance(site, dict)
        and {"sha256", "n_volumes"} <= site.keys() <= {"sha256", "n_volumes", "temper"}
        and isinstance(site["sha256"], str)
        and len(site["sha256"]) <= 64
        and _is_count(site["n_volumes"], MAX_VOLUMES)
    )


def _is_count(value: Any, at_most: int) -> bool:
    return type(value) is int and 0 <= value <= at_most


def _is_power(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= 1e9 and math.isfinite(value)


def _check_bounds(name: str, header: Mapping[str, Any]) -> None:
    for depth, value in _walk(header):
        if depth > _MAX_DEPTH:
            raise InputError(f"{name}: its header is nested more than {_MAX_DEPTH} deep; write it again with dwc train")
        if isinstance(value, str) and len(value) > _MAX_TEXT:
            raise InputError(
                f"{name}: its header has a text of {len(value)} characters, more than {_MAX_TEXT}; "
                "write it again with dwc train"
            )
    if (size := len(canonical_json(header))) > _MAX_BYTES:
        raise InputError(f"{name}: its header has {size} bytes, more than {_MAX_BYTES}; write it again with dwc train")


def _walk(value: Any) -> Iterator[tuple[int, Any]]:
    """Every value within a JSON value, keys included, with its depth; without recursion."""
    stack = [(0, value)]
    while stack:
        depth, value = stack.pop()
        yield depth, value
        if depth > _MAX_DEPTH:
            continue
        if isinstance(value, Mapping):
            stack += [(depth + 1, part) for item in value.items() for part in item]
        elif isinstance(value, list):
            stack += [(depth + 1, part) for part in value]
