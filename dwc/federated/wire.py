"""The messages between server and sites, key by key; nothing else crosses.

The server's question is answered at once with the site's state, and with its posterior if one is ready. States are
fixed words, so that no path, name or message of a site travels in them; a posterior is the bytes of its file.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dwc.base.errors import InputError

__all__ = ["ANSWER", "ASK", "ENTERED", "GIVE", "HEADER", "QUESTION", "STATES", "check", "digest"]

_DIGEST = re.compile(r"([0-9a-f]{64})?")
ASK, GIVE = "ask", "give"  # FLARE's names of the two tasks: ask for the state; send the prior
QUESTION: dict[str, type] = {
    "round": int,  # the open one, from 1; 0 when all are closed
    "prior_sha256": str,  # content digest of what the site trains from: the network, or its cavity
    "start_sha256": str,  # with GIVE: content digest of what it starts from; "" if that is the prior
    "entered": list,  # with GIVE: the site's answers in its factor, `ENTERED`, from which it computes the start
    "settled": dict,  # file digest of each of this site's posteriors that was handled: "" or why it was refused
    "prior": bytes,  # with GIVE: the file
    "start": bytes,  # with GIVE: the file, if the site could not compute it
}
ANSWER: dict[str, type] = {
    "state": str,
    "round": int,  # that the site is working on
    "prior_sha256": str,
    "posterior": bytes,  # with state "trained": the file
}
ENTERED = ("round", "prior_sha256", "file_sha256", "damping", "power")  # of an answer that is in a site's factor
HEADER = {  # of a site's posterior, as dwc train writes it
    "format_version", "package_version", "architecture", "label_map", "preprocessing", "n_volumes", "prior_sha256",
    "training",
}  # fmt: skip
STATES = {
    "no prior": "asks for the round's prior",
    "no start": "asks for the round's prior and start, which it cannot compute",
    "no scans": "waits for scans that have not counted yet",
    "started": "has just started or restarted its trainer",
    "training": "is training",
    "trained": "sends its posterior",
    "idle": "has nothing to do",
}


class _Entered(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    round: int = Field(ge=1)
    prior_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    file_sha256: str
    damping: float = Field(gt=0, le=1)
    power: float = Field(gt=0, le=1)


def check(message: Mapping[str, Any], keys: Mapping[str, type]) -> dict[str, Any]:
    """Return the message if it has exactly the agreed entries, each of its type; only files may be absent."""
    for key, value in message.items():
        if key not in keys or type(value) is not keys[key]:
            raise InputError(
                f"message: unexpected entry {str(key)[:40]!r} of type {type(value).__name__}; install the same dwc"
            )
    if missing := [key for key, kind in keys.items() if kind is not bytes and key not in message]:
        raise InputError(f"message: {missing[0]!r} is missing; install the same dwc")
    if not _DIGEST.fullmatch(message["prior_sha256"]):  # it becomes part of a folder's name
        raise InputError("message: prior_sha256 is not a SHA-256 digest; install the same dwc")
    try:
        for row in message.get("entered", ()):
            _Entered.model_validate(row)
    except ValidationError as error:
        raise InputError("message: an answer in `entered` is of another form; install the same dwc") from error
    if not 0 <= message["round"] < 2**31:
        raise InputError("message: round is out of range; install the same dwc")
    if keys is ANSWER and message["state"] not in STATES:
        raise InputError("message: unknown state; install the same dwc")
    return dict(message)


def digest(content: bytes) -> str:
    """SHA-256 of a file's bytes."""
    return hashlib.sha256(content).hexdigest()
