"""Times of tiles on an H200, as `docs/results/kernels/h200` has them."""

import csv
from pathlib import Path

from dwc_kernels.kernels.tiles import Problem, Tile, problem_of

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "kernels" / "h200"
# As the kernels are now: in bf16 the forward awaits no products within a step, and a step has one block of channels.
FILES = {
    ("forward", "bf16"): ("tiles_unsettled", "tiles_unsettled_96"),
    ("grad_input", "bf16"): ("tiles",),
    ("grad_weight", "bf16"): ("tiles",),
    ("forward", "tf32"): ("tiles_tf32",),
    ("grad_input", "tf32"): ("tiles_tf32",),
    ("grad_weight", "tf32"): ("tiles_tf32",),
}


def timed() -> dict[Problem, dict[Tile, float]]:
    """Milliseconds of tiles by problem; the least where a tile was timed twice."""
    found: dict[Problem, dict[Tile, float]] = {}
    for asked, names in FILES.items():
        rows = [row for name in names for row in csv.DictReader((RESULTS / f"{name}.csv").open())]
        for row in rows:
            if (row["kind"], row["dtype"]) != asked or row["unroll"] != "1":
                continue
            channels, filters, kernel = (int(row[name]) for name in ("channels", "filters", "kernel"))
            problem = problem_of(*asked, 10, (32,) * 3, channels, filters, (kernel,) * 3)
            box = tuple(map(int, row["box"].split("x")))
            tile = Tile(box, *(int(row[name]) for name in ("summed", "wide", "tail", "chunk", "warps", "stages")))
            times = found.setdefault(problem, {})
            times[tile] = min(float(row["median_ms"]), times.get(tile, float("inf")))
    return found


def mostly_sums(problem: Problem) -> bool:
    """Whether most of the time was that of the last sums of a weight gradient, which are made otherwise now."""
    return problem.kind == "grad_weight" and problem.kernel == (1, 1, 1)
