"""`dwc experiment`: the paper's study and those beyond it, each from one declarative file; the pooling of seeds."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser

from dwc.base.errors import InputError
from dwc.commands.arguments import add_settings, new_parser, parse
from dwc.study.settings import PRESETS, STUDIES, StudySettings, preset_file

__all__ = ["main", "parse_study"]


def main(arguments: Sequence[str]) -> None:
    """Run a study, say what it would do, or pool several runs of it."""
    chosen = [value for flag, value in pairwise(arguments) if flag == "--preset"]
    chosen += [word.removeprefix("--preset=") for word in arguments if word.startswith("--preset=")]
    preset = chosen[-1] if chosen else "cpu"
    about = "Run the paper's study: its networks, its Table 2, its figures, in one report."
    settings, options = parse_study("experiment", about, arguments, preset, add=_add_options)
    study, only, dry_run, folders = (options[name] for name in ("study", "only", "dry_run", "pool"))
    if study != "paper" and (only or dry_run or folders):
        raise InputError(f"`study` {study}: `only`, `dry_run` and `pool` serve the paper's study; leave them out")
    if folders and (only or dry_run):
        raise InputError("`pool`: reads what is there; leave `only` and `dry_run` out")
    # Imported here, so that help is printed without PyTorch.
    if folders:
        from dwc.study.pooling import pool

        pool(folders, settings.out)
    elif study == "paper":
        from dwc.study import paper

        paper.run(settings, only=only, dry_run=dry_run)
    elif study == "demo":
        from dwc.study import demo

        demo.run(settings)
    else:
        from dwc.study import beyond

        beyond.run(study, settings)


def parse_study(
    command: str,
    about: str,
    arguments: Sequence[str],
    preset: str,
    *,
    add: Callable[[ArgumentParser], None] = lambda _: None,
) -> tuple[StudySettings, dict[str, Any]]:
    """The settings of a study, those not given from a preset, and the values of the options that `add` adds."""
    parser = new_parser(command, about)
    add(parser)
    add_settings(parser, StudySettings)
    parser.default_config_files = [str(preset_file(preset))]
    values = parse(parser, arguments).as_dict()
    names = StudySettings.__dataclass_fields__
    settings = StudySettings(**{name: value for name, value in values.items() if name in names})
    return settings, {name: value for name, value in values.items() if name not in names}


def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--study", type=Literal[STUDIES], default="paper", help="the paper's, or one beyond it")
    parser.add_argument("--preset", default="cpu", help=f"settings that ship with dwc: {', '.join(PRESETS)}")
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW", help="rows to train and score, as printed")
    parser.add_argument("--dry-run", action="store_true", help="say what would run and for how long; write nothing")
    parser.add_argument("--pool", type=Path, nargs="+", default=[], metavar="OUT", help="folders of other seeds")
