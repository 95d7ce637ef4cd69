"""The command line: `dwc COMMAND ...`; each command is a file in `dwc.commands`, imported on use.

Errors that the user can fix become one line on stderr and exit code 2, or 1 where the rest of the work was done; a
signal's exit code is 128 plus its number.
"""

import errno
import importlib
import sys
from collections.abc import Sequence
from difflib import get_close_matches

from dwc import __version__
from dwc.base import launcher
from dwc.base.errors import InputError, Interrupted, PartlyFailed, printable

__all__ = ["COMMANDS", "main"]

COMMANDS = {  # name: what it does; the file is dwc/commands/<name>.py
    "simulate": "simulate a site's scans and labels, to try the other commands on",
    "data": "check scans and labels before a run: data check",
    "train": "train a network: MAP, variational, from a prior at a site, or fine-tuned",
    "consolidate": "consolidate the posteriors of several sites into one",
    "import": "turn a network that others published into a posterior file",
    "export": "write a network as an ONNX model or a MONAI bundle",
    "posterior": "sign, verify, inspect and audit posterior files",
    "federated": "run the cycle over many sites on NVIDIA FLARE: init, serve, join, status, amend, ...",
    "predict": "segment scans with one network or an ensemble",
    "report": "make pages to look through segmentations, with a viewer, or through the rounds of a cycle",
    "evaluate": "score networks on the held-out scans of a manifest",
    "experiment": "run the paper's study: every row of its table, its figures, one report",
    "demo": "run the whole cycle on simulated sites; takes minutes on two CPU cores",
}
_SHARED = ("train", "predict")  # may be started in several processes by torchrun
_FULL_OR_READ_ONLY = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
_EXTRAS = {
    "nvflare": "federated",
    "matplotlib": "study",
    "jinja2": "study",
    "cryptography": "signing",
    "triton": "triton",
    "onnx": "export",
    "onnxscript": "export",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments:
        print(_help())
        return 2
    if arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        print(f"dwc {__version__}")
        return 0
    name, *rest = arguments
    try:
        if name not in COMMANDS:
            close = get_close_matches(name, COMMANDS, 1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise InputError(f"no command {name!r}; {hint}the commands are {', '.join(COMMANDS)}")
        if launcher.processes() > 1 and name not in _SHARED:
            raise InputError(f"dwc {name} runs in one process; start it without torchrun")
        importlib.import_module(f"dwc.commands.{name}").main(rest)
    except InputError as error:
        from dwc.commands.arguments import in_flags

        return _end(in_flags(str(error)), 2)
    except PartlyFailed as rest:
        return _end(f"{rest}", 1)
    except Interrupted as stop:
        return _end(f"{stop}", 128 + stop.signal_number)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        return _end(f"dwc {name} needs {error.name}: pip install '.[{extra}]' in the clone of dwc", 2)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            return _end("too many open files; raise the limit with `ulimit -n`", 2)
        if error.errno not in _FULL_OR_READ_ONLY:
            raise
        where = error.filename or "the output"
        return _end(f"{where}: {error.strerror}; free space or choose another folder", 2)
    except KeyboardInterrupt:
        return _end("interrupted", 130)
    return 0


def _help() -> str:
    from dwc.commands.arguments import Parser

    description = "Distributed weight consolidation: train Bayesian networks apart, consolidate them once."
    parser = Parser(prog="dwc", description=description, version=__version__)
    commands = parser.add_subcommands(dest="command", metavar="COMMAND")
    for name, summary in COMMANDS.items():
        commands.add_subcommand(name, Parser(prog=f"dwc {name}"), help=summary)
    return parser.format_help().rstrip()


def _end(line: str, code: int) -> int:
    """Print why the command ended, in one line without control characters, and return the exit code."""
    line = printable(line)
    if launcher.processes() > 1:
        from dwc.base.ranks import say_once  # here, so that a single process does not import PyTorch

        say_once(f"dwc: {line}")
    else:
        print(f"dwc: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
