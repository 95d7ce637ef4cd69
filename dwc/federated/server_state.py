"""The server's state file, `state.json`: read, checked, upgraded, written, described. `cycle` changes it."""

import json
import time
from collections.abc import Mapping
from dataclasses import MISSING, fields
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from dwc.base.errors import InputError, one_line
from dwc.base.files import write_whole
from dwc.federated.project import Project
from dwc.influence import Influence, verdicts, warnings_about

__all__ = ["VERSION", "describe", "n_expected", "quorum_since", "read_state", "steady_time", "write_state"]

VERSION = 4
_ENTRIES: dict[str, type] = {
    "project": dict, "priors": list, "published": list, "clock": dict, "banned": list, "acts": list,
    "posteriors": list, "refused": list, "trouble": list, "traffic": dict, "sites": dict,
}  # fmt: skip
_ROWS: dict[str, dict[str, tuple[type, ...]]] = {
    "posteriors": {
        "site": (str,), "round": (int,), "file": (str,), "sha256": (str,), "file_sha256": (str,), "received": (str,),
        "counted_in": (int, type(None)),
    },
    "refused": {"site": (str,), "reason": (str,), "file_sha256": (str,)},
    "acts": {"at": (str,), "act": (str,)},
}  # fmt: skip
_SITE: dict[str, tuple[type, ...]] = {"state": (str,), "round": (int,), "heard": (str, type(None))}
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def read_state(folder: Path) -> dict[str, Any]:
    """The state kept in the server's folder, brought to this version."""
    path = folder / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give the server's kit") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON ({one_line(str(error))}); restore it from a backup") from error
    if not isinstance(state, dict):
        raise InputError(f"{path}: is not a JSON object; restore it from a backup")
    version = state.get("version")
    if version == 3:
        state = _from_version_3(state)
    elif version != VERSION:
        raise InputError(
            f"{path}: version {str(version)[:20]}, this dwc reads 3 and {VERSION}; use the dwc that wrote it, "
            "or restore it from a backup"
        )
    if odd := _odd_entry(state):
        raise InputError(f"{path}: {odd} is missing or of another type; restore it from a backup")
    return state


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the state atomically."""
    write_whole(folder / "state.json", json.dumps(state, indent=2).encode())


def describe(state: Mapping[str, Any]) -> str:
    """The state as text, one line per site, then what needs attention."""
    project, number = state["project"], len(state["priors"])
    open_round = "result is"
    if number <= project["rounds"]:
        open_round = f"round {number} of {project['rounds']} is open, from"
    lines = [f"{project['name']}: {open_round} q{number - 1}.safetensors ({state['priors'][-1][:12]})"]
    if since := quorum_since(state):
        lines.append(f"quorum since {since}, grace {project['grace_hours']:g} h")
    width = max(map(len, state["sites"]), default=0)
    for site, row in state["sites"].items():
        entered = [str(posterior["round"]) for posterior in state["posteriors"] if posterior["site"] == site]
        heard = row["state"]
        if row["heard"]:
            heard = f"{row['state']} (round {row['round']}), heard {row['heard']}"
        if site in state["banned"]:
            heard = f"banned; {heard}"
        lines.append(f"  {site:<{width}}  {heard}; posteriors in: {', '.join(entered) or 'none'}")
    lines += [f"the organizer: {_act(act)}" for act in state["acts"]]
    lines += _limited(state)
    lines += _judged(state)
    lines += [
        f"damaged: {row['file']}, {row['site']} sends it again" for row in state["posteriors"] if "damaged" in row
    ]
    lines += [f"refused: {row['reason']}" for row in state["refused"]]
    lines += [f"in the last pass: {trouble}" for trouble in state["trouble"]]
    return "\n".join(map(one_line, lines))


def quorum_since(state: Mapping[str, Any]) -> str | None:
    """When the posterior arrived that completed the open round's quorum; None if it has none."""
    number, quorum = len(state["priors"]), min(state["project"]["quorum"], n_expected(state))
    received = sorted(row["received"] for row in state["posteriors"] if row["round"] == number)
    return received[quorum - 1] if 0 < quorum <= len(received) else None


def n_expected(state: Mapping[str, Any]) -> int:
    """The number of sites that a round waits for."""
    return len({*state["project"]["sites"]} - {*state["banned"]})


def steady_time(clock: dict[str, Any]) -> datetime:
    """The time, in UTC, that does not jump while the machine is up, whatever is done to its clock.

    `clock` keeps the time at which this was first asked since the machine started; it is changed after a restart.
    """
    boot, uptime = _boot(), time.monotonic()
    if clock.get("boot") != boot or boot == "":
        clock.update(boot=boot, uptime=uptime, time=datetime.now(timezone.utc).isoformat())
    passed = timedelta(seconds=uptime - clock["uptime"])
    return (datetime.fromisoformat(clock["time"]) + passed).replace(microsecond=0)


def _boot() -> str:
    """A name of this start of the machine; "" where the system has none."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _act(act: Mapping[str, Any]) -> str:
    about = [f"{name} {str(value)[:20]}" for name, value in act.items() if name not in ("act", "at")]
    return f"{act['act']} {', '.join(about)} at {act['at']}"


def _limited(state: Mapping[str, Any]) -> list[str]:
    lines = []
    for row in state["posteriors"]:
        power = row.get("power", 1.0)
        if power == 1:
            continue
        what, how = "limited", f"above the limit; it enters with power {power:.3g}"
        if power == 0:
            what, how = "left out", "far above the limit"
        because = f": {row['limited_because']}" if row.get("limited_because") else ""
        lines.append(f"{what}: {row['site']} in round {row['counted_in']}, its influence is {how}{because}")
    return lines


def _judged(state: Mapping[str, Any]) -> list[str]:
    """Verdicts and warnings about the posteriors of the newest round that has any."""
    rows = [row for row in state["posteriors"] if row.get("influence")]
    newest = max((row["round"] for row in rows), default=0)
    influences = {row["site"]: Influence.from_json(row["influence"]) for row in rows if row["round"] == newest}
    lines = [f"round {newest}: {site} {line}" for site, line in verdicts(influences).items()]
    found = warnings_about(influences)
    return lines + [f"warning: {site} in round {newest}: {line}" for site, own in found.items() for line in own]


def _from_version_3(state: dict[str, Any]) -> dict[str, Any]:
    """A cycle that began before influence was limited goes on without a limit: the same files, the same result."""
    project = state.get("project")
    if isinstance(project, dict):
        defaults = {item.name: item.default for item in fields(Project) if item.default is not MISSING}
        project = {**defaults, "training": {}, "max_influence": None, **project}
    return {"banned": [], "acts": [], "clock": {}, **state, "project": project, "version": VERSION}


def _odd_entry(state: Mapping[str, Any]) -> str | None:
    """The first entry that is missing or not of the type that everything else relies on."""
    for name, kind in _ENTRIES.items():
        if not isinstance(state.get(name), kind):
            return name
    for name in (item.name for item in fields(Project)):
        if name not in state["project"]:
            return f"project.{name}"
    if not state["priors"] or not all(isinstance(digest, str) for digest in state["priors"]):
        return "priors"
    for name, columns in _ROWS.items():
        for row in state[name]:
            if not _has(row, columns):
                return name
    return None if all(_has(row, _SITE) for row in state["sites"].values()) else "sites"


def _has(row: Any, columns: Mapping[str, tuple[type, ...]]) -> bool:
    return isinstance(row, dict) and all(name in row and type(row[name]) in kinds for name, kinds in columns.items())
