"""Files that appear whole or not at all: the one way a result, a checkpoint or a log reaches the disk.

Bytes go to a temporary name in the target's own folder, are flushed to the disk and take the target's name in one
step, so that a reader never meets half a file, whatever killed the writer. Tensors travel as safetensors with one
JSON header. What the tensors mean is the business of `posterior` and `checkpoint`.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from dwc.base.errors import InputError

__all__ = [
    "PARTS",
    "canonical_json",
    "check_suffix",
    "load_tensors",
    "open_folder",
    "save_tensors",
    "sweep",
    "write_whole",
]

_HEADER = "dwc"
PARTS = ".*.part"  # temporary names, which a kill -9 in the middle of a write leaves behind


def canonical_json(value: Any) -> str:
    """The one spelling of a JSON value: keys sorted, no spaces, ASCII; digests are taken of this.

    Raises
    ------
    TypeError, ValueError
        If `value` is not JSON, or holds NaN or infinity.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def write_whole(path: str | Path, content: bytes) -> None:
    """Write `content` to `path` atomically, with the permissions any new file would get.

    Raises
    ------
    InputError
        If the folder is missing or unwritable or the disk is full; nothing is left behind then.
    """
    path = Path(path)
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            umask = os.umask(0)
            os.umask(umask)
            os.fchmod(file.fileno(), 0o666 & ~umask)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); give a writable folder with free space"
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


def sweep(folder: Path) -> None:
    """Clear away what a kill has left of unfinished writes, in a folder where nobody else writes now."""
    for part in folder.glob(PARTS):
        part.unlink(missing_ok=True)


def check_suffix(path: str | Path) -> Path:
    """`path` as a Path, after checking that it ends in .safetensors and that its folder takes new files.

    Raises
    ------
    InputError
        Before any work, so that an hour of it is not lost at the save.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: an output network ends in .safetensors; name it {path.name}.safetensors")
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: no such folder; make it or give another --out")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path.parent}: is not writable; give another --out")
    return path


def open_folder(out: Path) -> None:
    """Make an output folder if need be and write a file in it, so that an hour of work is not lost at the save.

    Raises
    ------
    InputError
        If that is not possible.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as file:
            file.write(b"\0" * 4096)
    except OSError as error:
        raise InputError(
            f"{out}: cannot be written ({error.strerror or error}); give a writable folder with free space as --out"
        ) from error


def save_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and their JSON header as one safetensors file, atomically.

    Raises
    ------
    InputError
        If `path` cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(path, safetensors.torch.save(tensors, {_HEADER: canonical_json(header)}))


def load_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and JSON header of a file written by `save_tensors`.

    Raises
    ------
    InputError
        If the file is missing, unreadable, truncated, not safetensors, or without this package's header.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give the .safetensors file in it")
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a .safetensors file written by dwc")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error}); check its permissions") from error
    except safetensors.SafetensorError as error:
        raise InputError(f"{path}: truncated or not a safetensors file ({error}); copy or write it again") from error
    try:
        header = json.loads(metadata[_HEADER])
        canonical_json(header)  # refuses the NaN and infinity that Python's JSON lets in
    except (KeyError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: has no dwc header that is JSON; give a file written by dwc") from error
    if not isinstance(header, dict):
        raise InputError(f"{path}: its dwc header is not a JSON object; give a file written by dwc")
    return tensors, header
