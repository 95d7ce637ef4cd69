"""The server's state file, `state.json`: read, written and described for people. `cycle` says what changes it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dwc.base.errors import InputError
from dwc.base.files import write_whole

__all__ = ["VERSION", "describe", "quorum_since", "read_state", "write_state"]

VERSION = 3


def read_state(folder: Path) -> dict[str, Any]:
    """The state kept in the server's folder."""
    path = folder / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give the server's kit") from error
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error}); restore it from a backup") from error
    if state.get("version") != VERSION:
        raise InputError(f"{path}: version {state.get('version')!r}, not {VERSION}; use the dwc that it began with")
    return state


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the state atomically."""
    write_whole(folder / "state.json", json.dumps(state, indent=2).encode())


def describe(state: Mapping[str, Any]) -> str:
    """The state as text, one line per site."""
    project, number = state["project"], len(state["priors"])
    open_round = "result is"
    if number <= project["rounds"]:
        open_round = f"round {number} of {project['rounds']} is open, from"
    lines = [f"{project['name']}: {open_round} q{number - 1}.safetensors ({state['priors'][-1][:12]})"]
    if since := quorum_since(state):
        lines.append(f"quorum since {since}, grace {project['grace_hours']:g} h")
    width = max(map(len, state["sites"]))
    for site, row in state["sites"].items():
        entered = [str(posterior["round"]) for posterior in state["posteriors"] if posterior["site"] == site]
        heard = row["state"]
        if row["heard"]:
            heard = f"{row['state']} (round {row['round']}), heard {row['heard']}"
        lines.append(f"  {site:<{width}}  {heard}; posteriors in: {', '.join(entered) or 'none'}")
    lines += [f"refused: {row['reason']}" for row in state["refused"]]
    lines += [f"in the last pass: {trouble}" for trouble in state["trouble"]]
    return "\n".join(lines)


def quorum_since(state: Mapping[str, Any]) -> str | None:
    """When the posterior arrived that completed the open round's quorum; None if it has none."""
    number, quorum = len(state["priors"]), state["project"]["quorum"]
    received = sorted(row["received"] for row in state["posteriors"] if row["round"] == number)
    return received[quorum - 1] if len(received) >= quorum else None
