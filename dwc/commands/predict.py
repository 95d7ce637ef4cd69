"""`dwc predict`: segment scans; writes segmentations, uncertainty, one table, label tables and pictures."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from jsonargparse import Namespace

from dwc.base.errors import InputError
from dwc.commands.arguments import Parser, add_settings, in_flags, new_parser, parse
from dwc.data.paths import is_network, network_file
from dwc.prediction_settings import MAPS, Map, OutputSettings, PredictionSettings

__all__ = ["add_networks", "main", "prediction_settings"]


def main(arguments: Sequence[str]) -> None:
    """Check arguments, networks and names, then segment the scans one at a time; ranks share them."""
    parser = new_parser(
        "predict", "Segment T1 scans: labels, uncertainty, volumes and a picture, and one table of all."
    )
    parser.add_argument(
        "scans", type=Path, nargs="*",
        help="NIfTI or mgz files (.nii.gz may be left out), folders, BIDS data sets, quoted patterns, lists in files",
    )  # fmt: skip
    add_networks(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder for results, <stem>_dseg.nii.gz and so on")
    parser.add_argument(
        "--picture", type=bool | None, default=None,
        help="also write <stem>_overlay.png; by default if the extra `study` is installed",
    )  # fmt: skip
    parser.add_argument(
        "--skip_existing", type=bool, default=False,
        help="keep results that are whole and made with the same networks and settings; for going on after a stop",
    )  # fmt: skip
    parser.add_argument("--overwrite", type=bool, default=False, help="replace existing results")
    parser.add_argument("--maps", type=str, nargs="+", default=["entropy"], help=f"any of {' '.join(MAPS)}, or none")
    parser.add_class_arguments(OutputSettings, skip={"maps", "picture"})
    add_settings(parser, PredictionSettings)
    values = parse(parser, arguments)
    maps, after_maps = _maps(values.maps)
    settings, outputs = prediction_settings(values), _output_settings(values, maps)
    if values.skip_existing and values.overwrite:
        raise InputError("`skip_existing` keeps results and `overwrite` replaces them; give one of the two")
    # In `--network n.safetensors scan.nii.gz` the flag takes the scans too, as `--maps` does.
    first, *others = values.network
    networks = [first, *(path for path in others if is_network(path))]
    scans = [*values.scans, *(path for path in others if not is_network(path)), *after_maps]
    if not is_network(first) and not first.is_dir():
        raise InputError(
            f"`network` {first}: does not end in .safetensors; give posterior.safetensors or its run folder"
        )
    if not scans:
        raise InputError("no scan: give one or more NIfTI files, or folders of them, after the networks")
    for network in networks:
        network_file(network)

    from dwc.base import ranks  # here, so that help does not import PyTorch
    from dwc.base.signals import interrupted_by_signals
    from dwc.batch import Batch
    from dwc.inputs import given_scans
    from dwc.prediction import load_networks

    with ranks.joined(), interrupted_by_signals("go on with --skip-existing"):
        batch = Batch(load_networks(networks, settings.label_map), values.out, settings, outputs, wording=in_flags)
        batch.run(given_scans(scans, values.out), skip_existing=values.skip_existing, overwrite=values.overwrite)


def add_networks(parser: Parser) -> None:
    """Add the flag `--network`."""
    parser.add_argument(
        "--network", type=Path, nargs="+", required=True,
        help="posterior.safetensors or the folder of its run; several form an ensemble",
    )  # fmt: skip


def prediction_settings(values: Namespace) -> PredictionSettings:
    """The prediction settings among a command's values."""
    names = PredictionSettings.__dataclass_fields__
    return PredictionSettings(**{name: values[name] for name in names})


def _maps(words: Sequence[str]) -> tuple[tuple[Map, ...], list[Path]]:
    """The maps among the words of `--maps`, and the scans that follow them."""
    known: dict[str, Map] = {name: name for name in MAPS}
    maps: list[Map] = []
    scans = []
    for position, word in enumerate(words):
        names = [name.strip().replace("-", "_") for name in word.strip("[]").split(",") if name.strip()]
        if word != "none" and not all(name in known for name in names):
            if not position:
                raise InputError(f"`maps` {word}: choose of {', '.join(MAPS)}, or none")
            scans.append(Path(word))
        elif word != "none":
            maps += [known[name] for name in names]
    return tuple(maps), scans


def _output_settings(values: Namespace, maps: tuple[Map, ...]) -> OutputSettings:
    picture = find_spec("matplotlib") is not None if values.picture is None else values.picture
    return OutputSettings(
        maps=maps, conformed=values.conformed, largest_component=values.largest_component, picture=picture
    )
