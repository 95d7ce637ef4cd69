"""Command-line parsing in one style; bad arguments become one line.

Flags are `--kebab-case`, snake_case is accepted too, and booleans are switches: `--overwrite`, `--no-picture`. Errors
from below the commands name parameters in backticks, which `in_flags` turns into flags.
"""

import argparse
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from inspect import get_annotations
from pathlib import Path
from typing import Any, TypeVar, get_args

from jsonargparse import ArgumentParser, Namespace

from dwc.base.errors import InputError
from dwc.base.settings import Settings

__all__ = ["Parser", "add_settings", "from_file", "in_flags", "new_parser", "parse"]

_S = TypeVar("_S", bound=Settings)
_MISFIT = re.compile(r'Parser key "([\w.]+)": Does not validate .*?Errors: - (.+?) - Expected .*Given value: (.+)')
_WRONG_TYPE = re.compile(r"""Parser key "([\w.]+)": Expected an? <class '(\w+)'>. Got value: (.+)""")
_WRONG_CHOICE = re.compile(r"""Parser key "([\w.]+)": Expected an? typing.Literal\[(.+)\]. Got value: (.+)""")
_BOOLEANS = (["true"], ["false"], ["yes"], ["no"])
_known: set[str] = set()  # the options of the running command


class Parser(ArgumentParser):
    """A parser that accepts flags in both spellings and prints kebab-case."""

    def parse_args(self, args: Any = None, *others: Any, **options: Any) -> Namespace:  # type: ignore[override]
        return super().parse_args(list(self.canonical(args or [])), *others, **options)

    def format_help(self) -> str:  # type: ignore[override]
        """The help text, with flags in kebab-case and booleans as switches."""
        text = super().format_help()
        switch = r"(--[\w.-]+) \{true,false(?:,null)?\}"
        text = re.sub(switch, lambda m: f"{m[1]} | --no-{m[1][2:]}", text)
        text = re.sub(r"<class\s+'(\w+)'>", lambda m: m[1].lower(), text)
        return re.sub(r"(?<![\w-])--[a-z][\w.-]*", lambda m: m[0].replace("_", "-"), text)

    def canonical(self, words: Sequence[str]) -> Iterator[str]:
        """The words as the library expects them: names as declared, ``--x=true`` and ``--x=false`` for switches."""
        actions = {name: action for action in self._actions for name in action.option_strings}
        words = list(words)
        for i, word in enumerate(words):
            if word == "--":
                yield from words[i:]
                return
            if not word.startswith("--"):
                yield word
                continue
            name, equals, value = word.partition("=")
            name = _declared(name, actions)
            negated = _declared(re.sub("^--no[-_]", "--", name), actions)
            if name in actions and _is_boolean(actions[name]) and not equals and words[i + 1 : i + 2] not in _BOOLEANS:
                yield f"{name}=true"
            elif name not in actions and negated in actions and _is_boolean(actions[negated]) and not equals:
                yield f"{negated}=false"
            else:
                yield name + equals + value


def new_parser(command: str, description: str) -> Parser:
    """A parser whose flags may also come from a YAML file, `--config`."""
    parser = Parser(
        prog=f"dwc {command}", description=description, exit_on_error=False, allow_abbrev=False, default_env=False
    )
    parser.add_argument("--config", action="config", help="YAML file of these settings; flags after it override it")
    return parser


def add_settings(parser: ArgumentParser, cls: type[Settings]) -> None:
    """Add the fields of a settings class as flags: its own first, then inherited ones."""
    left = {field.name for field in fields(cls)}
    for part in cls.__mro__:
        if own := left & set(get_annotations(part)):
            others = {field.name for field in fields(part)} - own
            parser.add_class_arguments(part, skip=others)
            left -= own


def parse(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    """Parse arguments; a bad one is an InputError instead of a usage page."""
    _known.update(_options(parser))
    try:
        values = parser.parse_args(list(arguments))
    except argparse.ArgumentError as error:
        raise InputError(f"{_in_short(str(error), parser)}; see {parser.prog} --help") from error
    values.pop("config", None)
    return values


def from_file(
    cls: type[_S], path: Path, resolve: Callable[[dict[str, Any]], dict[str, Any]] = dict, **defaults: Any
) -> _S:
    """Settings from a YAML file; errors name the file and the entry, not a flag.

    `resolve` is applied to the entries first, for example to make paths relative to the file. `defaults` replace those
    of the class.
    """
    parser = new_parser("", "")
    add_settings(parser, cls)
    parser.set_defaults(**defaults)
    try:
        entries = parser.parse_args(["--config", str(path)]).as_dict()
        entries.pop("config")
        return cls(**resolve(entries))
    except argparse.ArgumentError as error:
        raise InputError(f"{path}: {_in_short(str(error), parser).removeprefix('--')}") from error
    except InputError as error:
        raise InputError(f"{path}: {str(error).replace('`', '')}") from error


def in_flags(message: str) -> str:
    """A message with backticked parameters written as flags if they are options of the running command."""

    def flag(match: re.Match[str]) -> str:
        name = match[1]
        if name.split(".")[0] not in _known and name not in _known:
            return match[0]
        return f"--{name.replace('_', '-')}"

    return re.sub(r"`([a-z_]\w*(?:\.[\w-]+)*)`", flag, message)


def _options(parser: ArgumentParser) -> set[str]:
    """Names of a parser's options, including those of its subcommands."""
    names = {action.dest for action in parser._actions}
    for action in parser._actions:
        if isinstance(action.choices, Mapping):
            names = names.union(*(_options(part) for part in action.choices.values()))
    return names


def _declared(name: str, actions: Mapping[str, Any]) -> str:
    """The spelling in which an option was declared; user-defined names after a dot are kept."""
    head, dot, tail = name.partition(".")
    spellings = [re.sub(r"(?<=\w)-", "_", name), re.sub(r"(?<=\w)-", "_", head) + dot + tail]
    for spelling in (name, *spellings):
        if spelling in actions:
            return spelling
    owner = actions.get(spellings[1].partition(".")[0])
    if owner is None:
        return name
    kinds = get_args(getattr(owner, "_typehint", None))
    return (
        spellings[0] if any(isinstance(kind, type) and issubclass(kind, Settings) for kind in kinds) else spellings[1]
    )


def _is_boolean(action: argparse.Action) -> bool:
    hint = getattr(action, "_typehint", action.type)
    return hint is bool or set(get_args(hint)) == {bool, type(None)}


def _in_short(message: str, parser: ArgumentParser) -> str:
    """The parser's message in one line; for an optional value, only the first type's complaint."""
    line = " ".join(message.split())
    if missing := re.match(r"the following arguments are required: ([\w., ]+)", line):
        names = [_flag(name, parser) for name in missing[1].split(", ")]
        given = f"{' and '.join(names)} must be given"
        origin = "a network comes from dwc train, or from dwc import if others published it"
        return f"{given} ({origin})" if "--network" in names else given
    if unknown := re.match(r"(?:U|u)nrecognized arguments: (--[\w.-]+)", line):
        known = [name for action in parser._actions for name in action.option_strings]
        close = get_close_matches(unknown[1].replace("-", "_").replace("__", "--", 1), known, 1)
        hint = f"; did you mean {close[0].replace('_', '-')}?" if close else ""
        return f"no option {unknown[1]}{hint}"
    if wrong := re.match(r"""Parser key "config": File does not exist: '(.+)'""", line):
        return f"--config {wrong[1]}: no such file"
    if wrong := re.match(r"""Parser key "([\w.]+)": Unable to load config '(.+?)'""", line):
        name = wrong[1].replace("_", "-")
        return f"--{name} {wrong[2]}: give its settings, in a YAML file or one by one (--{name}.NAME)"
    if wrong := re.match(r"Option '(.+)' is not accepted", line):
        return f"there is no setting {wrong[1]!r}, in the file of --config"
    if wrong := re.match(r'expected "(\w+)" to be one of \{(.+?)\}', line):
        return f"give a {wrong[1]}: {wrong[2].replace(',', ', ').replace(',  ...', ' and more')}"
    if wrong := _WRONG_TYPE.match(line):
        expected = "a list, such as [1,1,2]" if wrong[2] in ("tuple", "list") else wrong[2]
        return f"--{wrong[1].replace('_', '-')} {wrong[3]}: expected {expected}"
    if wrong := _WRONG_CHOICE.match(line):
        choices = wrong[2].replace("'", "")
        return f"--{wrong[1].replace('_', '-')} {wrong[3]}: choose one of {choices}"
    if not (misfit := _MISFIT.match(line)):
        return re.sub(r"(?<![\w-])--[a-z][\w.]*", lambda m: m[0].replace("_", "-"), line)
    key, expected, value = misfit.groups()
    expected = re.sub(r"Expected (?:a )?<class\s+'(\w+)'>", r"expected \1", expected)
    choices = re.search(r"Expected an? typing\.Literal\[(.+?)\]", expected)
    expected = f"choose one of {choices[1]}".replace("'", "") if choices else expected
    expected = expected.replace("expected tuple", "expected a list, such as [1,1,2]")
    return f"--{key.replace('_', '-')} {value}: {expected}"


def _flag(name: str, parser: ArgumentParser) -> str:
    """A parameter as the user gives it: a flag, or the name of a positional argument."""
    step, _, rest = name.partition(".")
    for action in parser._actions:
        if isinstance(action.choices, Mapping) and step in action.choices:
            return _flag(rest, action.choices[step])
    flags = [option for action in parser._actions if action.dest == name for option in action.option_strings]
    return flags[0].replace("_", "-") if flags else name.upper()
