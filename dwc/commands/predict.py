"""`dwc predict`: segment scans; writes segmentations, uncertainty, volumes and pictures."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from jsonargparse import Namespace

from dwc.base.errors import InputError, printable
from dwc.commands.arguments import Parser, add_settings, new_parser, parse
from dwc.prediction_settings import PredictionSettings

__all__ = ["add_networks", "main", "prediction_settings"]


def main(arguments: Sequence[str]) -> None:
    """Check arguments, networks and all scans, then segment the scans one at a time; ranks share them."""
    parser = new_parser("predict", "Segment T1 scans: labels, entropy, volumes and a picture, on each scan's own grid.")
    parser.add_argument("scans", type=Path, nargs="*", help="NIfTI or mgz files; .nii.gz may be left out")
    add_networks(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder for results, <stem>_dseg.nii.gz and so on")
    parser.add_argument(
        "--picture", type=bool | None, default=None,
        help="also write <stem>_overlay.png; by default if the extra `study` is installed",
    )  # fmt: skip
    parser.add_argument("--overwrite", type=bool, default=False, help="replace existing results")
    add_settings(parser, PredictionSettings)
    values = parse(parser, arguments)
    settings = prediction_settings(values)
    # In `--network n.safetensors scan.nii.gz` the flag takes the scans too.
    networks = [path for path in values.network if path.suffix == ".safetensors"]
    scans = [*values.scans, *(path for path in values.network if path.suffix != ".safetensors")]
    if not networks:
        raise InputError(f"`network` {values.network[0]}: does not end in .safetensors; give posterior.safetensors")
    if not scans:
        raise InputError("no scan: give one or more NIfTI files after the networks")

    from dwc.base import ranks  # here, so that help does not import PyTorch

    with ranks.joined():
        _predict(networks, scans, values, settings)


def _predict(networks: Sequence[Path], scans: Sequence[Path], values: Namespace, settings: PredictionSettings) -> None:
    from dwc.base import ranks
    from dwc.base.files import open_folder
    from dwc.data.checks import check_scans
    from dwc.data.findings import tell
    from dwc.data.scan import Scan
    from dwc.derivatives import find_scan, name_derivatives
    from dwc.prediction import load_networks
    from dwc.segmentation import predict

    picture = find_spec("matplotlib") is not None if values.picture is None else values.picture
    if picture:
        from dwc.report.figures import overlay

    ensemble = load_networks(networks, settings.label_map)
    found = [find_scan(scan) for scan in scans]
    names = name_derivatives(found, values.out, overwrite=values.overwrite)
    ours, derivatives = ranks.share(found), ranks.share(names)
    tell(check_scans([Scan(scan, None, "", "", "test") for scan in found], ensemble.grid))
    ranks.barrier()  # before any rank writes to the folder that others are checking
    open_folder(values.out)
    for scan, files in zip(ours, derivatives, strict=True):
        segmentation = predict(ensemble, scan, settings, progress=ranks.is_main())
        mm3 = segmentation.write(files)
        if picture:
            shown = {"predicted": segmentation.prediction.labels}
            classes = ensemble.label_map.names
            overlay(segmentation.image, None, shown, files.picture, names=classes, title=scan.name)
        print(
            f"{printable(str(files.labels))}  ({mm3[1:].sum() / 1000:.1f} ml in {int((mm3[1:] > 0).sum())} classes)",
            flush=True,
        )


def add_networks(parser: Parser) -> None:
    """Add the flag `--network`."""
    parser.add_argument(
        "--network", type=Path, nargs="+", required=True, help="posterior.safetensors; several form an ensemble"
    )


def prediction_settings(values: Namespace) -> PredictionSettings:
    """The prediction settings among a command's values."""
    names = PredictionSettings.__dataclass_fields__
    return PredictionSettings(**{name: values[name] for name in names})
