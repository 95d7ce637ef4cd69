"""`dwc experiment`: run the paper's study or one beyond it from a settings file, or pool several seeds."""

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
    about = "Run the paper's study: its networks, its Table 2, its figures, in one report."
    settings, options = parse_study("experiment", about, arguments, "cpu", add=_add_options)
    study, only, dry_run, folders = (options[name] for name in ("study", "only", "dry_run", "pool"))
    if study != "paper" and (only or dry_run):
        raise InputError(f"`study` {study}: `only` and `dry_run` are for the paper's study; leave them out")
    if study == "demo" and folders:
        raise InputError("`pool`: the demo has one seed; leave it out")
    if folders and (only or dry_run):
        raise InputError("`pool`: reads finished studies; leave `only` and `dry_run` out")
    # Imported here so that help does not wait for PyTorch.
    if folders:
        from dwc.study.pooling import pool, pool_beyond

        if study == "paper":
            pool(folders, settings.out)
        else:
            pool_beyond(study, folders, settings.out)
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
    out: Path | None = None,
    add: Callable[[ArgumentParser], None] = lambda _: None,
) -> tuple[StudySettings, dict[str, Any]]:
    """The settings of a study, with defaults from `preset` or from `--preset`, and the values of `add`'s options.

    `out` is the output folder if neither preset nor user names one.
    """
    parser = new_parser(command, about)
    parser.add_argument("--preset", default=preset, help=f"default settings: {', '.join(PRESETS)}")
    add(parser)
    add_settings(parser, StudySettings)
    chosen = [value for flag, value in pairwise(arguments) if flag == "--preset"]
    chosen += [word.removeprefix("--preset=") for word in arguments if word.startswith("--preset=")]
    if out is not None:
        parser.set_defaults({"out": out})
    parser.default_config_files = [str(preset_file(chosen[-1] if chosen else preset))]
    values = parse(parser, arguments).as_dict()
    names = StudySettings.__dataclass_fields__
    settings = StudySettings(**{name: value for name, value in values.items() if name in names})
    return settings, {name: value for name, value in values.items() if name not in names}


def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--study", type=Literal[STUDIES], default="paper", help="the paper's study or another one")
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW", help="names of the rows to train and score")
    parser.add_argument(
        "--dry_run", type=bool, default=False, help="print what would run and for how long; write nothing"
    )
    parser.add_argument("--pool", type=Path, nargs="+", default=[], metavar="OUT", help="studies of several seeds")
