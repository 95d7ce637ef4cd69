"""Atomic writes and safetensors files with a JSON header and a digest.

Content is written to a temporary file in the target's folder, flushed and renamed, so that a reader never sees a
partial file, even if the writer is killed.
"""

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from dwc.base.errors import InputError, one_line

__all__ = [
    "DIGEST",
    "PARTS",
    "canonical_json",
    "check_suffix",
    "content_sha256",
    "load_entries",
    "load_tensors",
    "open_folder",
    "save_tensors",
    "sweep",
    "write_whole",
]

_HEADER, DIGEST = "dwc", "dwc_sha256"  # entries of a file's metadata
_MAX_HEADER = 2**28  # characters; a training log of a million steps fits
_MAX_DIMENSIONS = 16
PARTS = ".*.part"  # temporary files; kill -9 during a write leaves one behind


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no spaces and ASCII only, for digests; ValueError for NaN and infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def write_whole(path: str | Path, content: bytes) -> None:
    """Write `content` to `path` atomically, with the permissions of any new file; leave nothing behind on failure."""
    path = Path(path)
    temporary = None
    try:
        descriptor, temporary = _new_part(path)
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


def _new_part(path: Path) -> tuple[int, str]:
    """A temporary file beside `path`, locked while it is open, so that `sweep` leaves it alone."""
    while True:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.path.exists(temporary):
            return descriptor, temporary
        os.close(descriptor)  # swept before it was locked


def sweep(folder: Path, parts: str = PARTS) -> None:
    """Remove temporary files left by killed processes; files still being written are locked and stay."""
    for part in folder.glob(parts):
        try:
            with part.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                part.unlink(missing_ok=True)
        except OSError:  # in use, already gone, or owned by someone else
            continue


def check_suffix(path: str | Path) -> Path:
    """Check, before any work, that `path` ends in .safetensors and that its folder is writable.

    What killed processes left of this file is removed.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: an output network ends in .safetensors; name it {path.name}.safetensors")
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give a file name")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: no such folder; create it or give another `out`")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path.parent}: is not writable; give another `out`")
    sweep(path.parent, f".{glob.escape(path.name)}.*.part")
    return path


def open_folder(out: Path) -> None:
    """Create an output folder if needed and check that it is writable, before any work."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as file:
            file.write(b"\0" * 4096)
        sweep(out)
    except OSError as error:
        raise InputError(
            f"{out}: cannot be written ({error.strerror or error}); give a writable folder with free space"
        ) from error


def content_sha256(tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]) -> str:
    """Digest of header and tensors; independent of the file's layout and of the machine.

    SHA-256 of the canonical JSON header and a newline, then for each tensor, sorted by name: the canonical JSON of
    [name, shape], a newline and its little-endian bytes.
    """
    digest = hashlib.sha256(canonical_json(header).encode() + b"\n")
    for name, tensor in sorted(tensors.items()):
        digest.update(canonical_json([name, list(tensor.shape)]).encode() + b"\n")
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_tensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any], **entries: str
) -> None:
    """Write tensors, a JSON header and the digest of both as one safetensors file, atomically.

    `entries`, such as a signature, are added to the file's metadata and are not part of the digest.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {**entries, _HEADER: canonical_json(header), DIGEST: content_sha256(tensors, header)}
    write_whole(path, _in_order(safetensors.torch.save(tensors, metadata)))


def _in_order(content: bytes) -> bytes:
    """Sort a safetensors file's metadata, whose order in the library's output varies from call to call."""
    size = int.from_bytes(content[:8], "little")
    head = json.loads(content[8 : 8 + size])
    head["__metadata__"] = dict(sorted(head["__metadata__"].items()))
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def load_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and JSON header of a file written by `save_tensors`; its digest, if present, is checked."""
    tensors, header, _ = load_entries(path)
    return tensors, header


def load_entries(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, str]]:
    """As `load_tensors`, and the other entries of the file's metadata."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give the .safetensors file in it")
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a .safetensors file written by dwc")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: _tensor(file, name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({one_line(str(error))}); check its permissions") from error
    except safetensors.SafetensorError as error:
        raise InputError(
            f"{path}: truncated or not a safetensors file ({one_line(str(error))}); copy or write it again"
        ) from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # PyTorch and safetensors raise many kinds of errors for tensors they do not support.
        raise InputError(
            f"{path}: holds a tensor that cannot be read ({one_line(str(error))}); write it again"
        ) from error
    header = _header(path, metadata)
    recorded = metadata.get(DIGEST)
    if recorded is not None and recorded != content_sha256(tensors, header):
        raise InputError(f"{path}: was altered after it was written (its digest differs); copy or write it again")
    return tensors, header, {key: text for key, text in metadata.items() if key != _HEADER}


def _tensor(file: Any, name: str) -> torch.Tensor:
    if len(file.get_slice(name).get_shape()) > _MAX_DIMENSIONS:
        raise ValueError(f"more than {_MAX_DIMENSIONS} dimensions")
    return file.get_tensor(name)


def _header(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    text = metadata.get(_HEADER)
    if text is not None and len(text) > _MAX_HEADER:
        raise InputError(f"{path}: its header has {len(text)} characters, more than {_MAX_HEADER}; write it again")
    try:
        header = json.loads(text or "")
        canonical_json(header)  # refuses NaN and infinity, which Python's JSON accepts
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: has no dwc header that is JSON; give a file written by dwc") from error
    if not isinstance(header, dict):
        raise InputError(f"{path}: its dwc header is not a JSON object; give a file written by dwc")
    return header
