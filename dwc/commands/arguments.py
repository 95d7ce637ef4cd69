"""Reading a command's arguments: bad ones become one line, and flags and config files mean the same."""

import argparse
from collections.abc import Sequence

from jsonargparse import ArgumentParser, Namespace

from dwc.errors import InputError

__all__ = ["new_parser", "parse"]


def new_parser(command: str, description: str) -> ArgumentParser:
    """A parser whose flags may also come from a YAML file, `--config`."""
    parser = ArgumentParser(
        prog=f"dwc {command}", description=description, exit_on_error=False, allow_abbrev=False, default_env=False
    )
    parser.add_argument("--config", action="config", help="YAML file of these settings; flags after it override it")
    return parser


def parse(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    """Parse.

    Raises
    ------
    InputError
        Instead of a usage page: which argument is wrong.
    """
    try:
        values = parser.parse_args(list(arguments))
    except argparse.ArgumentError as error:
        raise InputError(f"{' '.join(str(error).split())}; see {parser.prog} --help") from error
    values.pop("config", None)
    return values
