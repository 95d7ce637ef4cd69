"""The checks of a run's scans before they are prepared."""

import os
from collections.abc import Sequence

from dwc.base import ranks
from dwc.data.cache import prepared_contents
from dwc.data.checks import axes_of, check_each
from dwc.data.comparison import compare
from dwc.data.findings import CheckedScan, tell
from dwc.data.grid import Grid
from dwc.data.labels import LabelMap
from dwc.data.reading import open_scan
from dwc.data.scan import Scan

__all__ = ["admit"]


def admit(
    scans: Sequence[Scan], label_map: LabelMap, grid: Grid, cache_dir: str | os.PathLike, *, progress: bool = True
) -> None:
    """Refuse scans that cannot be used, and one scan that is both trained and tested on; print what is odd.

    The voxels of scans that the cache holds have been checked before and are not read again, but these scans are
    compared with the others. Ranks share the work, and all of them refuse.
    """
    contents = ranks.gather(prepared_contents(scans, label_map, grid, cache_dir) if ranks.is_main() else None)[0]
    unprepared = [scan for scan, content in zip(scans, contents, strict=True) if content is None]
    new = iter(check_each(unprepared, grid, label_map, progress=progress))
    checked = [
        next(new) if content is None else CheckedScan(scan, facts=axes_of(open_scan(scan.image)), content=content)
        for scan, content in zip(scans, contents, strict=True)
    ]
    tell(compare(checked))
