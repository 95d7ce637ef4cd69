"""`dwc demo`: the whole cycle on simulated sites, minutes on two CPU cores."""

from collections.abc import Sequence

from dwc.commands.experiment import parse_study

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    """Run the study `demo` at the preset `demo`."""
    settings, _ = parse_study(
        "demo",
        "Run the whole cycle on simulated sites: train apart, consolidate, fine-tune, compare.",
        arguments,
        "demo",
    )
    from dwc.study.demo import run  # here: help is printed without PyTorch

    run(settings)
