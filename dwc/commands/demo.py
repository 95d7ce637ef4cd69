"""`dwc demo`: the whole cycle on simulated sites, in minutes on two CPU cores."""

from collections.abc import Sequence
from pathlib import Path

from dwc.commands.experiment import parse_study

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    """Run the study `demo` at its preset."""
    settings, _ = parse_study(
        "demo",
        "Run the whole cycle on simulated sites: train at each site, consolidate, fine-tune, compare.",
        arguments,
        "demo",
        out=Path("demo"),
    )
    from dwc.study.demo import run  # imported here so that help does not wait for PyTorch

    run(settings)
