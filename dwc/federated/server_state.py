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
from dwc.damping import Trial, worse
from dwc.factors import Influence
from dwc.federated.books import odd_entry
from dwc.federated.project import Project
from dwc.influence import MIN_SITES, verdicts, warnings_about

__all__ = [
    "UNHEARD", "answered", "describe", "last_round", "n_expected", "new_state", "open_round", "prior_sha256",
    "quorum_since", "read_state", "small_quorum", "steady_time", "uncount", "waiting", "write_state",
]  # fmt: skip

VERSION = 5
UNHEARD = {"state": "not heard of", "round": 0, "heard": None}
_HELD_BEFORE = ("the site is banned", "so its prior is void; train again")  # refusals that an earlier dwc kept for ever
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def new_state(project: Project, prior: str) -> dict[str, Any]:
    """The state in which nobody was asked; `prior` is the digest of the first network."""
    return {
        "version": VERSION,
        "project": project.to_json(),
        "priors": [prior],  # of round 1, 2, ...; the last is the result when all rounds are closed
        "published": [],
        "networks": [{}],  # what is known of each of these, in rounds on the same scans
        "clock": {},
        "banned": [],
        "acts": [],  # of the organizer: what was dropped, reopened or banned, and when
        "posteriors": [],
        "refused": [],
        "dropped": [],  # by the organizer: how to know them if they are sent again
        "trouble": [],  # problems of the last pass
        "traffic": {},  # by site and round: bytes of the messages to it and from it
        "sites": {site: dict(UNHEARD) for site in project.sites},
    }


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
    if type(version) is not int or not 3 <= version <= VERSION:
        raise InputError(
            f"{path}: version {str(version)[:20]}, this dwc reads 3 to {VERSION}; use the dwc that wrote it, "
            "or restore it from a backup"
        )
    if version == 3:
        state = _from_version_3(state)
    if version < VERSION:
        state = _from_version_4(state)
    state = {"dropped": [], **state}
    for row in _dicts(state.get("posteriors")):
        if isinstance(row.get("influence"), dict) and "tensors" not in row["influence"]:
            del row["influence"]  # an earlier dwc did not look at single tensors; measured again from the file
    for entry in _dicts(state.get("refused")):
        if str(entry.get("reason")).endswith(_HELD_BEFORE):
            state["refused"].remove(entry)  # so that the site sends its posterior again
    if odd := odd_entry(state):
        raise InputError(one_line(f"{path}: {odd}; restore it from a backup"))
    return state


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the state atomically."""
    write_whole(folder / "state.json", json.dumps(state, indent=2).encode())


def describe(state: Mapping[str, Any]) -> str:
    """The state as text, one line per site, then what needs attention."""
    project, number = state["project"], len(state["priors"])
    which = "result is"
    if open_round(state):
        which = f"round {number} of {project['rounds']} is open, from"
    elif number <= project["rounds"]:
        which = f"ended after round {number - 1}, whose change is below until ({project['until']:g}); result is"
    lines = [f"{project['name']}: {which} q{number - 1}.safetensors ({state['priors'][-1][:12]})"]
    lines += _changes(state)
    if since := quorum_since(state):
        lines.append(f"quorum since {since}, grace {project['grace_hours']:g} h")
    if warning := small_quorum(project, n_expected(state)):
        lines.append(f"warning: {warning}")
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


def open_round(state: Mapping[str, Any]) -> int | None:
    """The round that is open, from 1; None when all are closed."""
    number = len(state["priors"])
    return number if number <= last_round(state) else None


def last_round(state: Mapping[str, Any]) -> int:
    """The round after which the cycle ends: the agreed number, or the first whose change is below `until`.

    A round that has been answered goes on, also if `until` was raised since: its answers belong to no earlier one.
    """
    until = state["project"]["until"]
    begun = max((row["round"] for row in state["posteriors"]), default=0)
    for number, network in enumerate(state["networks"]):
        if number >= begun and until is not None and network.get("change", until) < until:
            return number
    return state["project"]["rounds"]


def prior_sha256(state: Mapping[str, Any], site: str, number: int) -> str:
    """Digest of what a site trains from in a round: its cavity, or the network that the round began with."""
    cavities: Mapping[str, str] = state["networks"][number - 1].get("cavities", {})
    return cavities.get(site, state["priors"][number - 1])


def quorum_since(state: Mapping[str, Any]) -> str | None:
    """When the posterior arrived that completed the open round's quorum; None if it has none."""
    received, quorum = sorted(answered(state).values()), min(state["project"]["quorum"], n_expected(state))
    return received[quorum - 1] if 0 < quorum <= len(received) else None


def answered(state: Mapping[str, Any]) -> dict[str, str]:
    """The sites whose answers wait for the open round to close, and when they came.

    In rounds on the same scans an answer to an earlier cavity is as good as one to this round's.
    """
    number, any_round = len(state["priors"]), state["project"]["method"] == "pvi"
    found: dict[str, str] = {}
    for row in waiting(state):
        if any_round or row["round"] == number:
            found.setdefault(row["site"], row["received"])
    return found


def waiting(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The posteriors that count in the round that closes next; those of banned sites do not."""
    return [row for row in state["posteriors"] if row["counted_in"] is None and row["site"] not in state["banned"]]


def uncount(row: dict[str, Any]) -> None:
    """Take a posterior out of the round that it counted in."""
    row["counted_in"] = None
    for name in ("power", "limited_because"):
        row.pop(name, None)


def small_quorum(project: Mapping[str, Any], n_sites: int) -> str | None:
    """A warning if a round may close with too few sites to compare them with each other."""
    n_least = min(project["quorum"], n_sites)
    if project["max_influence"] is None or not 0 < n_least < MIN_SITES:
        return None
    return (
        f"a round closes with {n_least} of {n_sites} sites; with fewer than {MIN_SITES} posteriors there is no median "
        f"site, and nobody's influence is limited: set quorum to {MIN_SITES} or more"
    )


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


def _changes(state: Mapping[str, Any]) -> list[str]:
    """How far each round of factors moved the network, and what the held-out scans say about it."""
    lines = []
    for number, made in enumerate(state["networks"]):
        if "factors" not in made:
            continue
        line = f"round {number}: no answer entered"
        if "change" in made:
            line = f"round {number}: the network changed by {made['change']:.3g} sigma, damping {made['damping']:.3g}"
        trial = _trial_of(made)
        lines.append(f"{line}; held-out scans: {trial}" if trial else line)
        if trial and trial.is_worse:
            lines.append(f"warning: round {number}: {worse(trial)}")
    return lines


def _trial_of(made: Mapping[str, Any]) -> Trial | None:
    """The verdict of the held-out scans on a network."""
    if made.get("log_likelihood") is None:
        return None
    return Trial(made["damping"], made["log_likelihood"], made["gain"], made["standard_error"])


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
    """Verdicts on the posteriors of the newest round that has any, and warnings about those of every round.

    Sites are compared with the others of the round that they were trained in, also where they came late.
    """
    rounds: dict[int, dict[str, Influence]] = {}
    for row in state["posteriors"]:
        if "influence" in row and row["site"] not in state["banned"]:
            rounds.setdefault(row["round"], {})[row["site"]] = Influence.from_json(row["influence"])
    lines = []
    if rounds:
        newest = max(rounds)
        lines = [f"round {newest}: {site} {line}" for site, line in verdicts(rounds[newest]).items()]
    for number, influences in sorted(rounds.items()):
        for site, found in warnings_about(influences).items():
            lines += [f"warning: {site} in round {number}: {line}" for line in found]
    return lines


def _dicts(rows: Any) -> list[dict[str, Any]]:
    """The rows that are objects, of what may be anything."""
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _from_version_3(state: dict[str, Any]) -> dict[str, Any]:
    """A cycle that began before influence was limited goes on without a limit: the same files, the same result."""
    project = state.get("project")
    if isinstance(project, dict):
        defaults = {item.name: item.default for item in fields(Project) if item.default is not MISSING}
        project = {**defaults, "training": {}, "max_influence": None, "method": "dwc", **project}
    return {"banned": [], "acts": [], "clock": {}, **state, "project": project}


def _from_version_4(state: dict[str, Any]) -> dict[str, Any]:
    """A cycle that began before there were rounds on the same scans goes on as it began."""
    project, priors = state.get("project"), state.get("priors")
    if isinstance(project, dict):
        project = {"method": "dwc", "damping": None, "data": None, "until": None, **project}
    networks: list[dict[str, Any]] = [{} for _ in priors] if isinstance(priors, list) else []
    return {**state, "project": project, "networks": networks, "version": VERSION}
