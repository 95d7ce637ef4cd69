"""Reading a command's arguments: bad ones become one line, and flags and config files mean the same."""

import argparse
import re
from collections.abc import Sequence

from jsonargparse import ArgumentParser, Namespace

from dwc.base.errors import InputError

__all__ = ["new_parser", "parse"]

_MISFIT = re.compile(r'Parser key "([\w.]+)": Does not validate .*?Errors: - (.+?) - Expected .*Given value: (.+)')


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
        raise InputError(f"{_in_short(str(error))}; see {parser.prog} --help") from error
    values.pop("config", None)
    return values


def _in_short(message: str) -> str:
    """The parser's message in one line; where it lists what each type of an optional value says, the first alone."""
    line = " ".join(message.split())
    if not (misfit := _MISFIT.match(line)):
        return line
    key, expected, value = misfit.groups()
    expected = re.sub(r"Expected (?:a )?<class '(\w+)'>", r"expected \1", expected)
    expected = expected.replace("expected tuple", "expected a list, such as [1,1,2]")
    return f"--{key} {value}: {expected}"
