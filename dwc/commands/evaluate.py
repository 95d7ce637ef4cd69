"""`dwc evaluate`: score networks on a manifest; writes Dice per class, volume and site."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from dwc.base.errors import InputError, printable
from dwc.commands.arguments import add_settings, new_parser, parse
from dwc.commands.predict import add_networks, prediction_settings
from dwc.prediction_settings import RESULTS, PredictionSettings

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    """Score networks on the scans that they have not been trained on."""
    parser = new_parser("evaluate", "Score a network or an ensemble on the held-out scans of a manifest.")
    parser.add_argument("--data", type=Path, required=True, help="manifest CSV or BIDS-derivatives folder, with labels")
    add_networks(parser)
    parser.add_argument("--out", type=Path, required=True, help=f"folder for {', '.join(RESULTS)}; created")
    parser.add_argument("--split", type=Literal["test", "train", "all"], default="test", help="which scans")
    parser.add_argument(
        "--split_seed", type=int | None, default=None,
        help="seed of the split, if the manifest has no split column; default: the networks' own",
    )  # fmt: skip
    parser.add_argument(
        "--test_fraction", type=float | None, default=None, help="held-out share of the subjects; default as above"
    )
    parser.add_argument("--cache_dir", type=Path | None, default=None, help="for conformed scans; default OUT/cache")
    parser.add_argument("--overwrite", type=bool, default=False, help="replace existing results")
    add_settings(parser, PredictionSettings)
    values = parse(parser, arguments)
    settings = prediction_settings(values)
    if values.split_seed is not None and values.split_seed < 0:
        raise InputError(f"`split_seed` {values.split_seed}: give a number >= 0")
    for path in (values.out / name for name in RESULTS):
        if path.exists() and not values.overwrite:
            raise InputError(f"{path}: exists already; give another `out`, or `overwrite` to replace it")

    from dwc.base.files import open_folder  # here, so that help does not import PyTorch
    from dwc.evaluation import evaluate, scans_to_score
    from dwc.prediction import load_networks

    ensemble = load_networks(values.network, settings.label_map)
    which = {"split": values.split, "split_seed": values.split_seed, "test_fraction": values.test_fraction}
    scans_to_score(values.data, ensemble.posteriors, **which)  # before the folder is created
    open_folder(values.out)
    cache = values.cache_dir or values.out / "cache"
    evaluation = evaluate(ensemble, values.data, settings, **which, cache_dir=cache, progress=True)
    evaluation.write(values.out)
    print("\n".join(map(printable, _lines(evaluation.summary))))
    print(values.out / "summary.json")


def _lines(summary: dict[str, Any]) -> list[str]:
    """The means as a text table, a line per site."""
    rows = {**summary["sites"], "volume-weighted": {"n_volumes": summary["n_volumes"], **summary["volume_weighted"]}}
    width = max(map(len, rows))
    lines = [f"{'site':<{width}}{'volumes':>9}{'Dice':>7}{'with background':>17}"]
    for site, row in rows.items():
        means = ["-" if row[name] is None else f"{row[name]:.3f}" for name in ("dice", "dice_with_background")]
        lines.append(f"{site:<{width}}{row['n_volumes']:>9}{means[0]:>7}{means[1]:>17}")
    return lines
