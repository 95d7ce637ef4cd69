"""What crosses between server and sites, key by key; nothing else does.

A question is answered at once with where the site stands, and with its posterior if one is ready. The words are few
and fixed, so that no path, name or message of a site can travel in them; a posterior is the bytes of its file.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from dwc.base.errors import InputError

__all__ = ["ANSWER", "ASK", "GIVE", "HEADER", "QUESTION", "STATES", "check", "digest"]

_DIGEST = re.compile(r"([0-9a-f]{64})?")
ASK, GIVE = "ask", "give"  # the two tasks: how far are you; here is the prior
QUESTION = {
    "round": int,  # the open one, from 1; 0 when all are closed
    "prior_sha256": str,  # of its prior's content
    "settled": dict,  # digest of each of this site's files the server is done with: "" or why it was refused
    "prior": bytes,  # with GIVE: the file
}
ANSWER = {
    "state": str,
    "round": int,  # that the site is at
    "prior_sha256": str,
    "posterior": bytes,  # with state "trained": the file
}
HEADER = {  # of a posterior's file, as dwc train writes it; a site sends no other and no consolidated one
    "format_version", "package_version", "architecture", "label_map", "preprocessing", "n_volumes", "prior_sha256",
    "training",
}  # fmt: skip
STATES = {
    "no prior": "asks for the round's prior",
    "no scans": "waits for scans that have not counted yet",
    "started": "has just started its trainer, or started it again",
    "training": "trains",
    "trained": "hands in its posterior",
    "idle": "has nothing to do",
}


def check(message: Mapping[str, Any], keys: Mapping[str, type]) -> dict[str, Any]:
    """The message's own entries, if they are the agreed ones.

    Raises
    ------
    InputError
        If a key is unknown or missing (all but a file are needed), or a value of another type.
    """
    for key, value in message.items():
        if key not in keys or type(value) is not keys[key]:
            raise InputError(
                f"message: unexpected entry {str(key)[:40]!r} of type {type(value).__name__}; use the same dwc"
            )
    if missing := [key for key, kind in keys.items() if kind is not bytes and key not in message]:
        raise InputError(f"message: {missing[0]!r} is missing; use the same dwc")
    if not _DIGEST.fullmatch(message["prior_sha256"]):  # it names a folder
        raise InputError("message: prior_sha256 is no SHA-256 digest; use the same dwc")
    if not 0 <= message["round"] < 2**31:
        raise InputError("message: round is no number of a round; use the same dwc")
    if keys is ANSWER and message["state"] not in STATES:
        raise InputError("message: a state that is none of ours; use the same dwc")
    return dict(message)


def digest(content: bytes) -> str:
    """SHA-256 of a file's bytes, by which server and site know that they mean the same file."""
    return hashlib.sha256(content).hexdigest()
