"""BIDS-Apps: the scans of a data set that participant and session labels name, and what validators skip in the results.

A BIDS-App is called with DATA OUT LEVEL: participant treats each scan alone, group all results together.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from dwc.base.errors import InputError
from dwc.base.files import open_folder, write_whole
from dwc.data.bids import images_in_bids
from dwc.data.paths import unreadable
from dwc.inputs import GivenScan
from dwc.prediction_settings import MAPS

__all__ = ["check_data_set", "ignore_what_bids_does_not_know", "participant_scans"]

_DESCRIPTION = "dataset_description.json"
_UNKNOWN = (  # results whose suffix BIDS has not defined
    *(f"*_{name}.nii.gz" for name in MAPS), "*_volumes.tsv", "*_overlay.png", "*_desc-conformed_T1w.nii.gz",
    "/volumes.tsv", "/failures.tsv", "/labels_*", "/report/",
)  # fmt: skip


def check_data_set(data: Path) -> None:
    """Check that a folder says of itself that it is a BIDS data set; names of files are not checked."""
    path = data / _DESCRIPTION
    remedy = f"describe the data set there, or give `skip_bids_validation` to use {data} as it is"
    try:
        about = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; {remedy}") from error
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON; {remedy}") from error
    for key in ("Name", "BIDSVersion"):
        if not isinstance(about, dict) or not isinstance(about.get(key), str):
            raise InputError(f"{path}: has no {key}; {remedy}")


def participant_scans(data: Path, participants: Sequence[str] = (), sessions: Sequence[str] = ()) -> list[GivenScan]:
    """The T1w images of a BIDS data set, of all or of these participants and sessions, whose `sub-` may be left out."""
    known = {folder.name for folder in data.glob("sub-*") if folder.is_dir()}
    if not known:
        raise InputError(f"{data}: holds no folder sub-*; give a BIDS data set")
    wanted = _asked("participant_label", "sub-", participants, known)
    images = [(image, fault) for image, fault in images_in_bids(data) if image.relative_to(data).parts[0] in wanted]
    if sessions:
        of_session = {image: image.relative_to(data).parts[1] for image, _ in images}
        wanted_sessions = _asked("session_label", "ses-", sessions, set(of_session.values()) - {"anat"})
        images = [(image, fault) for image, fault in images if of_session[image] in wanted_sessions]
    without = wanted - {image.relative_to(data).parts[0] for image, _ in images}
    if without and (participants or not images):
        raise InputError(f"{data / min(without)}: holds no *_T1w image of what is asked for; leave it out")
    if all(fault for _, fault in images):
        raise InputError(images[0][1])
    return [GivenScan(image, image.parent.relative_to(data), fault) for image, fault in images]


def ignore_what_bids_does_not_know(out: Path) -> None:
    """Write `.bidsignore` into the folder of results, so that validators accept it."""
    open_folder(out)
    write_whole(out / ".bidsignore", "".join(f"{pattern}\n" for pattern in _UNKNOWN).encode())


def _asked(parameter: str, prefix: str, labels: Iterable[str], known: set[str]) -> set[str]:
    """The folders that labels mean, all if there are no labels."""
    asked = {prefix + label.removeprefix(prefix) for label in labels} or known
    if unknown := asked - known:
        there = ", ".join(sorted(name.removeprefix(prefix) for name in known)[:10]) or "none"
        raise InputError(
            f"`{parameter}` {min(unknown).removeprefix(prefix)}: there is no {min(unknown)}; choose from {there}"
            + (", ..." if len(known) > 10 else "")
        )
    return asked
