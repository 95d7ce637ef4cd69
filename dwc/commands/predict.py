"""`dwc predict`: networks and scans in, segmentations, uncertainty, volumes and pictures out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jsonargparse import Namespace

from dwc.base.errors import InputError
from dwc.commands.arguments import new_parser, parse

__all__ = ["add_prediction_arguments", "check_prediction_arguments", "main"]


def main(arguments: Sequence[str]) -> None:
    """Segment scans, one at a time; arguments, networks and the readability of each scan are checked before the first.

    Ranks share the scans.

    Raises
    ------
    InputError
        If an argument or a file is wrong, or a result cannot be written.
    """
    parser = new_parser("predict", "Segment T1 scans: labels, entropy and volumes on each scan's own grid, a picture.")
    parser.add_argument("scans", type=Path, nargs="*", help="NIfTI or mgz files; .nii.gz may be left out")
    add_prediction_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder for <stem>_dseg.nii.gz and the rest; made")
    parser.add_argument("--picture", type=bool, default=True, help="also write <stem>_overlay.png, for a look")
    parser.add_argument("--overwrite", type=bool, default=False, help="replace results that are there already")
    values = parse(parser, arguments)
    # `--network n.safetensors scan.nii.gz`: what the flag has taken too many of are scans.
    networks = [path for path in values.network if path.suffix == ".safetensors"]
    scans = [*values.scans, *(path for path in values.network if path.suffix != ".safetensors")]
    check_prediction_arguments(values)
    if not networks:
        raise InputError(f"--network {values.network[0]}: does not end in .safetensors; give posterior.safetensors")
    if not scans:
        raise InputError("no scan: give one or more NIfTI files after the networks")

    from dwc.base import ranks  # after the arguments, so that help is quick

    with ranks.joined():
        _predict(networks, scans, values)


def _predict(networks: Sequence[Path], scans: Sequence[Path], values: Namespace) -> None:
    from dwc.base import ranks
    from dwc.base.devices import choose_device
    from dwc.base.files import open_folder
    from dwc.data.checks import check_scans, tell
    from dwc.data.conform import conform_image
    from dwc.data.scan import Scan
    from dwc.derivatives import find_scan, name_derivatives, write_derivatives
    from dwc.prediction import load_networks, predict_volume
    from dwc.report.figures import overlay

    device = choose_device(values.device)
    ensemble = load_networks(networks, values.label_map)
    scans = [find_scan(scan) for scan in scans]
    derivatives = name_derivatives(scans, values.out, overwrite=values.overwrite)
    scans, derivatives = ranks.share(scans), ranks.share(derivatives)
    tell(check_scans([Scan(scan, None, "", "", "test") for scan in scans], ensemble.grid, progress=ranks.is_main()))
    ranks.barrier()  # before any rank writes where another still looks
    open_folder(values.out)
    for scan, files in zip(scans, derivatives, strict=True):
        image = conform_image(scan, ensemble.grid)
        prediction = predict_volume(
            ensemble.networks, image, n_samples=values.n_samples, seed=values.seed, device=device,
            precision=values.precision, progress=scan.name if ranks.is_main() else None,
        )  # fmt: skip
        mm3 = write_derivatives(files, prediction, scan, label_map=ensemble.label_map, grid=ensemble.grid)
        if values.picture:
            names = ensemble.label_map.names
            overlay(image, None, {"predicted": prediction.labels}, files.picture, names=names, title=scan.name)
        print(f"{files.labels}  ({mm3[1:].sum() / 1000:.1f} ml in {int((mm3[1:] > 0).sum())} classes)", flush=True)


def add_prediction_arguments(parser) -> None:
    """The flags of every command that predicts."""
    parser.add_argument(
        "--network", type=Path, nargs="+", required=True, help="posterior.safetensors; several are an ensemble"
    )
    parser.add_argument("--label_map", type=str | None, default=None, help="TSV, where the networks had one of its own")
    parser.add_argument("--n_samples", type=int, default=10, help="Monte Carlo samples per Bayesian network")
    parser.add_argument("--seed", type=int, default=0, help="of the samples' noise")
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if any")
    parser.add_argument("--precision", type=Literal["fp32", "bf16"], default="fp32", help="bf16 for autocast")


def check_prediction_arguments(values) -> None:
    """Refuse numbers that cannot be meant.

    Raises
    ------
    InputError
        Naming the flag and the remedy.
    """
    if values.n_samples < 1:
        raise InputError(f"--n_samples {values.n_samples}: give 1 or more")
    if values.seed < 0:
        raise InputError(f"--seed {values.seed}: give a number >= 0")
