"""`dwc report`: pages to look through the segmentations of a folder, or the rounds of a federated cycle."""

from collections.abc import Sequence
from pathlib import Path

from dwc.base.errors import InputError
from dwc.commands.arguments import new_parser, parse

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    """Write the report and print its first page."""
    parser = new_parser("report", "Make HTML pages of a folder that dwc predict wrote, or of a federated cycle.")
    parser.add_argument("folder", type=Path, help="what dwc predict wrote, or a server's start-up kit")
    parser.add_argument(
        "--out", type=Path | None, default=None, help="folder for index.html and the rest; default: FOLDER/report"
    )
    values = parse(parser, arguments)
    if not values.folder.is_dir():
        raise InputError(f"{values.folder}: no such folder; give one that dwc predict wrote, or a server's kit")
    out = values.out or values.folder / "report"

    if (cycle := values.folder / "cycle" / "state.json").is_file():
        from dwc.report.cycle import write_cycle_report  # here, so that help does not import PyTorch

        print(write_cycle_report(cycle.parent, out))
    else:
        from dwc.report.predictions import write_predictions_report

        print(write_predictions_report(values.folder, out))
