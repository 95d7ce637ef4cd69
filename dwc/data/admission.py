"""The checks of a run's scans before they are prepared for training."""

import os
from collections.abc import Sequence

from dwc.base import ranks
from dwc.base.errors import InputError
from dwc.data.cache import image_digests, unprepared
from dwc.data.checks import check_scans, leak, tell
from dwc.data.grid import Grid
from dwc.data.labels import LabelMap
from dwc.data.scan import Scan

__all__ = ["check_before_training"]


def check_before_training(scans: Sequence[Scan], label_map: LabelMap, grid: Grid, cache_dir: str | os.PathLike) -> None:
    """Refuse scans that cannot be trained on, and files that are both trained and tested on; print what is odd.

    Scans that the cache holds have been checked before and are not read again. Ranks share the work.
    """
    first: dict[str, Scan] = {}
    for scan, digest in zip(scans, image_digests(scans, cache_dir), strict=True):
        twin = first.setdefault(digest, scan)
        if twin.split != scan.split:
            raise InputError(leak(scan, twin))
    new = ranks.share(unprepared(scans, label_map, grid, cache_dir))
    tell(check_scans(new, grid, label_map, progress=ranks.is_main()))
