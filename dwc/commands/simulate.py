"""`dwc simulate`: a simulated site's scans, labels and manifest, to try the other commands on."""

from collections.abc import Sequence
from pathlib import Path

from dwc.base.errors import InputError
from dwc.commands.arguments import new_parser, parse

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    """Check arguments, then write the scans and, last, the manifest."""
    parser = new_parser(
        "simulate",
        "Simulate a site: T1 scans of procedural heads or given anatomies, with labels of 50 classes and a manifest.",
    )
    parser.add_argument("site", type=str, help="which scanner and population: H, N, B, W or A")
    parser.add_argument("--out", type=Path, required=True, help="folder for scans, labels and manifest.csv")
    parser.add_argument("--n_train", type=int, default=4, help="number of training scans, each of its own subject")
    parser.add_argument("--n_test", type=int, default=2, help="number of held-out scans")
    parser.add_argument("--grid_size", type=int, default=64, help="voxels along each edge")
    parser.add_argument("--voxel_size", type=float, default=3.0, help="millimetres")
    parser.add_argument("--seed", type=int, default=0, help="decides heads and scans")
    parser.add_argument(
        "--anatomies", type=Path | None, default=None,
        help="folder of label volumes (codes 0 to 60) to make scans of; by default heads are procedural",
    )  # fmt: skip
    parser.add_argument(
        "--random_contrasts", type=bool, default=False,
        help="give each scan its own T1 contrast and resolution, as varied as between real scans",
    )  # fmt: skip
    values = parse(parser, arguments)
    manifest = values.out / "manifest.csv"
    if manifest.exists():
        raise InputError(f"{manifest}: exists already; give another `out`")

    from dwc.data.grid import Grid  # here, so that help does not import numpy
    from dwc.simulation.scans import write_site

    write_site(
        values.out, values.site, values.n_train, values.n_test,
        grid=Grid(values.grid_size, values.voxel_size), seed=values.seed, anatomies=values.anatomies,
        random_contrasts=values.random_contrasts,
    )  # fmt: skip
    print(f"{manifest}  ({values.n_train} scans to train on, {values.n_test} held out)")
