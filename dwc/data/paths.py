"""Paths that users give: found, or refused with what is wrong with them rather than with a guess."""

import errno
import os
import resource
import unicodedata
from pathlib import Path

from dwc.base.errors import InputError, one_line

__all__ = ["OUT_OF_HANDLES", "check_printable", "existing_file", "is_network", "network_file", "unreadable"]

_NETWORK = "posterior.safetensors"  # in a run folder
_UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")  # control characters, bytes that are not UTF-8, line and paragraph separators
OUT_OF_HANDLES = (errno.EMFILE, errno.ENFILE)


def existing_file(path: str | os.PathLike) -> Path:
    """The path as a Path, after checking that it is a regular file whose content is on this machine."""
    path = Path(path)
    check_printable(str(path))
    try:
        if path.is_file():
            return path
        if path.is_symlink():
            raise InputError(f"{path}: {_dangling(Path(os.readlink(path)))}")
        what = "is not a file" if path.exists() else "no such file"
    except (OSError, ValueError) as error:  # PermissionError, a name of 5000 letters, a NUL
        raise unreadable(path, error) from error
    raise InputError(f"{path}: {what}; check the path")


def is_network(path: Path) -> bool:
    """Whether a path names a network by its extension or is the folder of a finished run."""
    return path.suffix == ".safetensors" or (path / _NETWORK).is_file()


def network_file(path: str | os.PathLike) -> Path:
    """The file of a network, which may be given by the folder of its run."""
    path = Path(path)
    if not path.is_dir():
        return path
    if not (path / _NETWORK).is_file():
        unfinished = (path / "checkpoint.safetensors").is_file()
        what = (
            "its run has not ended, go on with it" if unfinished else "give the folder of a run or a .safetensors file"
        )
        raise InputError(f"{path}: holds no {_NETWORK}; {what}")
    return path / _NETWORK


def unreadable(path: str | os.PathLike, error: OSError | ValueError, remedy: str = "check the path") -> InputError:
    """What to raise when a file cannot be opened or read; does not blame the file where handles have run out."""
    if isinstance(error, OSError) and error.errno in OUT_OF_HANDLES:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return InputError(f"too many open files for {path}; raise the limit of {limit} with `ulimit -n`")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    name = str(path)
    if len(name) > 300:
        name = f"{name[:100]}...{name[-100:]}"
    return InputError(f"{name}: cannot be read ({one_line(reason)}); {remedy}")


def check_printable(text: str, what: str = "the name") -> None:
    """Refuse control characters, which could drive the user's terminal."""
    if any(unicodedata.category(letter) in _UNPRINTABLE for letter in text):
        shown = "".join("?" if unicodedata.category(letter) in _UNPRINTABLE else letter for letter in text[:300])
        raise InputError(f"{shown}: {what} holds a control character or is not UTF-8; rename it")


def _dangling(target: Path) -> str:
    if ".git/annex" in target.as_posix():
        return "its content is not on this machine (git-annex); fetch it with `datalad get` or `git annex get`"
    return f"is a link to {one_line(str(target))}, which does not exist; restore the file or mend the link"
