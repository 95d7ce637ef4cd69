"""`dwc train`, also `python -m dwc.train`."""

from collections.abc import Sequence
from typing import Any

from dwc.commands.arguments import new_parser, parse
from dwc.training.settings import TrainSettings

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    """Read the settings and train.

    Raises
    ------
    InputError
        If an argument or a file is wrong.
    Interrupted
        If a signal ended the run.
    """
    parser = new_parser("train", "Train a network on a manifest of scans and leave a run folder.")
    parser.add_argument("--resume", action="store_true", help="go on with the run in OUT, bit for bit")
    parser.add_class_arguments(TrainSettings)
    values = parse(parser, arguments).as_dict()
    resume = values.pop("resume")
    settings = TrainSettings(**values)
    settings.check()  # before PyTorch is imported

    from dwc.base import ranks
    from dwc.training.loop import train_network

    with ranks.joined():
        posterior = train_network(settings, resume=resume)
        if ranks.is_main():
            print(_line(posterior.name, posterior.metadata["training"]))


def _line(name: str, training: dict[str, Any]) -> str:
    plateau = training["plateau_step"]
    began = "no plateau seen" if plateau is None else f"plateau from step {plateau}"
    return f"{name}  (steps {training['steps']}, {began})"
