"""`dwc import`: turn a network that others published into a posterior file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from dwc.base.errors import InputError, printable
from dwc.commands.arguments import new_parser, parse

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    """Check arguments and model, then write the posterior."""
    parser = new_parser(
        "import",
        "Import a MeshNet published as a TensorFlow.js layers-model, such as brainchop's, as a MAP network: for dwc "
        "predict, and as the initial network of dwc train --mode vi.",
    )
    parser.add_argument("model", type=Path, help="the model's folder: model.json and the weight files it names")
    parser.add_argument(
        "--label_map", type=str, required=True,
        help="what its classes are: fifty, coarse, or a TSV (index, class, name) in the network's order of classes",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="file to write, .safetensors")
    parser.add_argument(
        "--intensity", type=Literal["z_score", "min_max", "quantile"] | None, default=None,
        help="how scans are scaled for it; by default quantile if model.json asks for quantiles, else min_max, as "
        "brainchop does",
    )  # fmt: skip
    parser.add_argument("--overwrite", type=bool, default=False, help="replace an existing file")
    values = parse(parser, arguments)

    from dwc.base.files import check_suffix
    from dwc.data.labels import LabelMap
    from dwc.layers_model import import_network

    out = check_suffix(values.out)
    if out.exists() and not values.overwrite:
        raise InputError(f"{out}: exists already; give another `out`, or `overwrite` to replace it")
    network = import_network(values.model, LabelMap.load(values.label_map), values.intensity)
    network.save(out)
    header = network.metadata
    network_is = header["architecture"]
    print(
        printable(
            f"{out}  ({network_is['n_classes']} classes, {network_is['width']} filters, dilations "
            f"{' '.join(map(str, network_is['dilations']))}, {network_is['activation']}; intensity "
            f"{header['preprocessing']['intensity']}: {header['provenance']['intensity_from']})"
        )
    )
