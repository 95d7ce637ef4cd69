"""`dwc predict`: segment scans; writes segmentations, uncertainty, one table, label tables and pictures."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from dwc.base.errors import InputError
from dwc.commands.arguments import Parser, add_settings, in_flags, new_parser, parse
from dwc.data.paths import is_network, network_file
from dwc.prediction_settings import MAPS, Map, OutputSettings, PredictionSettings

if TYPE_CHECKING:
    from dwc.batch import Batch

LEVELS = ("participant", "group")  # of a BIDS-App

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
    parser.add_argument(
        "--out", type=Path | None, default=None, help="folder for results, <stem>_dseg.nii.gz and so on; required"
    )
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
    parser.add_argument(
        "--participant_label", type=str, nargs="+", default=[],
        help="as a BIDS-App, dwc predict DATA OUT participant: only these; dwc predict DATA OUT group writes the table",
    )  # fmt: skip
    parser.add_argument("--session_label", type=str, nargs="+", default=[], help="as a BIDS-App: only these sessions")
    parser.add_argument(
        "--skip_bids_validation", type=bool, default=False, help="as a BIDS-App: do without dataset_description.json"
    )
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
    level = _level(values, scans)
    out = scans[1] if level else values.out

    from dwc.base import ranks  # here, so that help does not import PyTorch
    from dwc.base.signals import interrupted_by_signals
    from dwc.batch import Batch
    from dwc.bids_app import check_data_set, ignore_what_bids_does_not_know, participant_scans
    from dwc.inputs import given_scans
    from dwc.prediction import load_networks

    with ranks.joined(), interrupted_by_signals("go on with --skip-existing"):
        batch = Batch(load_networks(networks, settings.label_map), out, settings, outputs, wording=in_flags)
        if level == "group":
            _summarize(batch)
            return
        if level:
            if not values.skip_bids_validation:
                check_data_set(scans[0])
            found = participant_scans(scans[0], values.participant_label, values.session_label)
            if ranks.is_main():
                ignore_what_bids_does_not_know(out)
        else:
            found = given_scans(scans, out)
        batch.run(found, skip_existing=values.skip_existing, overwrite=values.overwrite)


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
                raise InputError(f"`maps` {word}: choose from {', '.join(MAPS)}, or none")
            scans.append(Path(word))
        elif word != "none":
            maps += [known[name] for name in names]
    return tuple(maps), scans


def _level(values: Namespace, scans: Sequence[Path]) -> str:
    """The level of a BIDS-App call, `dwc predict DATA OUT LEVEL`, or "" in the form with `--out`."""
    labels = [name for name in ("participant_label", "session_label") if values[name]]
    if values.out is None:
        if len(scans) != 3 or not (str(scans[2]) in LEVELS or scans[0].is_dir()):
            raise InputError("`out` must be given, or a BIDS-App's DATA OUT participant; see dwc predict --help")
        level = str(scans[2])
        if level not in LEVELS:
            raise InputError(f"level {level}: choose {' or '.join(LEVELS)}; or give the folder of results as `out`")
        if labels and level == "group":
            raise InputError(f"`{labels[0]}` {values[labels[0]][0]}: level group is for all participants; leave it out")
        if not scans[0].is_dir():
            raise InputError(f"{scans[0]}: no such folder; give a BIDS data set")
        return level
    if labels or values.skip_bids_validation:
        name = labels[0] if labels else "skip_bids_validation"
        raise InputError(f"`{name}` is for the form dwc predict DATA OUT participant; leave `out` out")
    return ""


def _summarize(batch: "Batch") -> None:
    """Write the table of all scans in the folder and, if its libraries are installed, the report."""
    batch.summarize()
    if find_spec("jinja2") and find_spec("matplotlib"):
        from dwc.report.predictions import write_predictions_report

        print(write_predictions_report(batch.out, batch.out / "report"))


def _output_settings(values: Namespace, maps: tuple[Map, ...]) -> OutputSettings:
    picture = find_spec("matplotlib") is not None if values.picture is None else values.picture
    return OutputSettings(
        maps=maps, conformed=values.conformed, largest_component=values.largest_component, picture=picture
    )
