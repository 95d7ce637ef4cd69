"""`dwc experiment`: the paper's study and those beyond it, each from one declarative file; the pooling of seeds."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

from dwc.base.errors import InputError
from dwc.commands.arguments import new_parser, parse

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    """Run a study, say what it would do, or pool several runs of it.

    Raises
    ------
    InputError
        If an argument or a file is wrong.
    Interrupted
        If a signal ended a training.
    """
    from dwc.study.settings import PRESETS, STUDIES, StudySettings, preset_file  # here: other commands start fast

    parser = new_parser("experiment", "Run the paper's study: its networks, its Table 2, its figures, in one report.")
    parser.add_argument("--study", type=Literal[STUDIES], default="paper", help="the paper's, or one beyond it")
    parser.add_argument("--preset", default="cpu", help=f"settings that ship with dwc: {', '.join(PRESETS)}")
    parser.add_argument("--only", nargs="*", default=[], metavar="ROW", help="rows to train and score, as printed")
    parser.add_argument("--dry-run", action="store_true", help="say what would run and for how long; write nothing")
    parser.add_argument("--pool", type=Path, nargs="*", default=[], metavar="OUT", help="folders of other seeds")
    parser.add_class_arguments(StudySettings)
    presets = [name for flag, name in pairwise(arguments) if flag == "--preset"]
    parser.default_config_files = [str(preset_file(presets[-1] if presets else "cpu"))]
    values = parser.instantiate(parse(parser, arguments)).as_dict()
    study, only, dry_run, folders = (values.pop(name) for name in ("study", "only", "dry_run", "pool"))
    del values["preset"]
    settings = StudySettings(**values)
    if study != "paper" and (only or dry_run or folders):
        raise InputError(f"--study {study}: --only, --dry-run and --pool serve the paper's study; leave them out")
    if folders:
        if only or dry_run:
            raise InputError("--pool: reads what is there; leave --only and --dry-run out")
        from dwc.study.pooling import pool

        pool(folders, settings.out)
        return
    if study != "paper":
        from dwc.study import beyond

        beyond.run(study, settings)
        return
    from dwc.study.paper import run

    run(settings, only=only, dry_run=dry_run)
