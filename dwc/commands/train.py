"""`dwc train`, also `python -m dwc.train`."""

from collections.abc import Sequence
from typing import Any

from dwc.commands.arguments import new_parser, parse
from dwc.settings import TrainSettings

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

    from dwc import distributed
    from dwc.training import train

    with distributed.ranks():
        posterior = train(settings, resume=resume)
        if distributed.is_main():
            print(_line(posterior.name, posterior.metadata["training"]))


def _line(name: str, training: dict[str, Any]) -> str:
    plateau = training["plateau_step"]
    began = "no plateau seen" if plateau is None else f"plateau from step {plateau}"
    return f"{name}  (steps {training['steps']}, {began})"
