"""`dwc train`, also `python -m dwc.train`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dwc.base.errors import InputError
from dwc.commands.arguments import add_settings, new_parser, parse
from dwc.training.settings import TrainSettings

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    """Read the settings and train."""
    parser = new_parser("train", "Train a network on a manifest of scans and leave a run folder.")
    parser.add_argument("--resume", type=bool, default=False, help="continue the run in OUT, bit for bit")
    add_settings(parser, TrainSettings)
    if not arguments:
        raise InputError(
            "no data: give --data manifest.csv (columns image,label[,subject,site,split]) and --out DIR; "
            "to see the whole cycle on simulated sites run `make demo` or `dwc demo`"
        )
    values = parse(parser, arguments).as_dict()
    resume = values.pop("resume")
    settings = TrainSettings(**values)

    from dwc.base import ranks  # here, so that help does not import PyTorch
    from dwc.training.loop import train_network

    with ranks.joined():
        posterior = train_network(settings, resume=resume)
        if ranks.is_main():
            print(_summary(Path(posterior.name), posterior.metadata["training"]))


def _summary(path: Path, training: dict[str, Any]) -> str:
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    plateau = training["plateau_step"]
    began = "no plateau seen" if plateau is None else f"plateau from step {plateau}"
    return f"{path}  (steps {training['steps']}, {began})"
