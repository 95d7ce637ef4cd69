"""`dwc demo`: the whole cycle on simulated sites, minutes on two CPU cores."""

from collections.abc import Sequence

from dwc.commands.arguments import new_parser, parse

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    """Run the demo.

    Raises
    ------
    InputError
        If an argument is wrong or the folder cannot be written.
    """
    from dwc.study.demo import DemoSettings, run  # here, so that other commands start without PyTorch

    parser = new_parser("demo", "Run the whole cycle on simulated sites: train apart, consolidate, fine-tune, compare.")
    parser.add_class_arguments(DemoSettings)
    run(DemoSettings(**parser.instantiate(parse(parser, arguments)).as_dict()))
