"""`dwc export`: write a network at its means for other programs, as an ONNX model or a MONAI bundle."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from dwc.base.errors import InputError, printable
from dwc.commands.arguments import new_parser, parse
from dwc.data.paths import network_file

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    """Check arguments and network, then write it."""
    parser = new_parser(
        "export",
        "Write a network at its means for programs without dwc: an ONNX model, or a bundle for MONAI's runner.",
    )
    parser.add_argument("network", type=Path, help="posterior.safetensors or the folder of its run")
    parser.add_argument("--format", type=Literal["bundle", "onnx"], required=True, help="what to write")
    parser.add_argument("--out", type=Path, required=True, help="the bundle's folder, new or empty, or a file .onnx")
    parser.add_argument("--label_map", type=str | None, default=None, help="TSV, if the network has its own")
    parser.add_argument("--overwrite", type=bool, default=False, help="replace an existing .onnx file")
    values = parse(parser, arguments)
    out, network = values.out, network_file(values.network)
    if values.format == "onnx":
        if out.suffix != ".onnx":
            raise InputError(f"`out` {out}: name it {out.name}.onnx")
        if not out.parent.is_dir():
            raise InputError(f"{out.parent}: no such folder; create it or give another `out`")
        if out.exists() and not values.overwrite:
            raise InputError(f"{out}: exists already; give another `out`, or `overwrite` to replace it")
    elif values.overwrite:
        raise InputError("`overwrite` is for .onnx files; give the bundle an empty or new folder")

    from dwc.posterior import Posterior  # here, so that help does not import PyTorch

    posterior = Posterior.load(network)
    if values.format == "onnx":
        from dwc.export.onnx_model import write_onnx

        write_onnx(posterior, out, values.label_map)
        print(printable(f"{out}  (image [N, 1, D, H, W] to logits; its metadata say how to scale a scan)"))
    else:
        from dwc.export.bundle import write_bundle

        write_bundle(posterior, out, values.label_map)
        print(printable(f"{out}  ({out / 'docs' / 'README.md'} says how to run it)"))
