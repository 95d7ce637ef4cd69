"""`dwc evaluate`: a manifest and networks in, Dice per class, volume and site out."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from dwc.base.errors import InputError
from dwc.commands.arguments import new_parser, parse
from dwc.commands.predict import add_prediction_arguments, check_prediction_arguments

__all__ = ["main"]

_RESULTS = ("per_class.csv", "per_volume.csv", "per_site.csv", "summary.json")


def main(arguments: Sequence[str]) -> None:
    """Score a network, or an ensemble, on the scans that it has not been trained on.

    Raises
    ------
    InputError
        If an argument or a file is wrong, or a result cannot be written.
    """
    parser = new_parser("evaluate", "Score a network or an ensemble on the held-out scans of a manifest.")
    parser.add_argument("--data", type=Path, required=True, help="manifest CSV or BIDS-derivatives folder, with labels")
    add_prediction_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help=f"folder for {', '.join(_RESULTS)}; made")
    parser.add_argument("--split", type=Literal["test", "train", "all"], default="test", help="which scans")
    parser.add_argument(
        "--split_seed", type=int | None, default=None,
        help="seed of the split, where the manifest has no split column; by default the networks' own",
    )  # fmt: skip
    parser.add_argument(
        "--test_fraction", type=float | None, default=None, help="part of the subjects held out; by default the same"
    )
    parser.add_argument("--cache_dir", type=Path | None, default=None, help="of conformed scans; default OUT/cache")
    parser.add_argument("--overwrite", type=bool, default=False, help="replace results that are there already")
    values = parse(parser, arguments)
    check_prediction_arguments(values)
    if values.split_seed is not None and values.split_seed < 0:
        raise InputError(f"--split_seed {values.split_seed}: give a number >= 0")
    for path in (values.out / name for name in _RESULTS):
        if path.exists() and not values.overwrite:
            raise InputError(f"{path}: exists already; give another --out, or --overwrite true to replace it")

    from dwc import evaluation  # after the arguments, so that help is quick
    from dwc.base.devices import choose_device
    from dwc.base.files import open_folder, write_whole
    from dwc.base.tables import as_csv
    from dwc.data.cache import prepare
    from dwc.prediction import load_networks

    device = choose_device(values.device)
    ensemble = load_networks(values.network, values.label_map)
    scans = evaluation.scans_to_score(
        values.data, ensemble.posteriors, split=values.split, split_seed=values.split_seed,
        test_fraction=values.test_fraction,
    )  # fmt: skip
    open_folder(values.out)
    data = prepare(scans, ensemble.label_map, ensemble.grid, values.cache_dir or values.out / "cache")
    scores = evaluation.score_volumes(
        ensemble.networks, data, n_samples=values.n_samples, seed=values.seed, device=device, precision=values.precision
    )
    tables = (
        evaluation.per_class(scores, ensemble.label_map, ensemble.grid),
        evaluation.per_volume(scores),
        evaluation.per_site(scores, ensemble.label_map, ensemble.grid),
    )
    summary = {
        "networks": [{"file": str(posterior.name), "sha256": posterior.sha256} for posterior in ensemble.posteriors],
        "data": str(values.data),
        "split": values.split,
        "n_samples": values.n_samples,
        "seed": values.seed,
        **evaluation.summary(scores),
    }
    contents = [as_csv(table) for table in tables] + [json.dumps(summary, indent=2)]
    for name, content in zip(_RESULTS, contents, strict=True):
        write_whole(values.out / name, content.encode())
    print(_lines(summary))
    print(values.out / "summary.json")


def _lines(summary: dict) -> str:
    """The means for people, a line per site."""
    rows = {**summary["sites"], "volume-weighted": {"n_volumes": summary["n_volumes"], **summary["volume_weighted"]}}
    width = max(map(len, rows))
    lines = [f"{'site':<{width}}{'volumes':>9}{'Dice':>7}{'with background':>17}"]
    for site, row in rows.items():
        means = ["-" if row[name] is None else f"{row[name]:.3f}" for name in ("dice", "dice_with_background")]
        lines.append(f"{site:<{width}}{row['n_volumes']:>9}{means[0]:>7}{means[1]:>17}")
    return "\n".join(lines)
