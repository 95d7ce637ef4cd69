"""What the organizer may undo in a cycle: drop a posterior, reopen a round, ban a site, remove old files.

Every act is recorded in the state with its time. Files of dropped posteriors are moved to `dropped/`; only `prune`
deletes files.
"""

import os
from pathlib import Path
from typing import Any

from dwc.base.errors import InputError
from dwc.federated.cycle import Cycle
from dwc.federated.networks import unneeded
from dwc.federated.server_state import prior_sha256, uncount, waiting
from dwc.posterior import Posterior

__all__ = ["allow", "ban", "drop", "prune", "recompute", "reopen"]


def drop(cycle: Cycle, site: str, number: int) -> None:
    """Take a site's posterior of a round out; if its round is closed, that and all later rounds are reopened.

    It is refused if it is sent again, also under another header.
    """
    rows = [row for row in cycle.state["posteriors"] if row["site"] == site and row["round"] == number]
    if not rows:
        raise InputError(f"`drop` {site}/{number}: no such posterior is in; see dwc federated status")
    (row,) = rows
    if row["counted_in"] is not None:
        _reopen(cycle, row["counted_in"])
    cycle.state["posteriors"].remove(row)
    cycle.refuse(row, f"{site}'s posterior of round {number}: was dropped by the organizer")
    known = {"payload_sha256": row.get("payload_sha256") or _payload(cycle, row), "influence": row.get("influence")}
    cycle.state["dropped"].append({"site": site, **known})
    cycle.record("drop", site=site, round=number, sha256=row["sha256"])
    cycle.write()
    _put_aside(cycle, row)


def reopen(cycle: Cycle, number: int) -> None:
    """Open a closed round again, with the posteriors that it had; later rounds are void."""
    _reopen(cycle, number)
    cycle.record("reopen", round=number)
    cycle.write()


def recompute(cycle: Cycle, number: int) -> None:
    """Consolidate a round again from its files, now, whatever its quorum; if the result differs, later rounds are void.

    The open round, if it has a posterior, is closed.
    """
    if number != cycle.round:
        _reopen(cycle, number)
    if not waiting(cycle.state):
        cycle.reload()
        raise InputError(f"`recompute` {number}: no posterior counts in it; see dwc federated status")
    cycle.record("recompute", round=number)
    try:
        cycle.close()
    except InputError:
        cycle.reload()
        raise


def ban(cycle: Cycle, site: str) -> None:
    """Ignore a site from now on: it is not heard, its posteriors do not count, and no round waits for it.

    What it has contributed to closed rounds stays until such a round is computed again; `drop` takes it out at once.
    """
    if site not in cycle.project["sites"]:
        raise InputError(f"`ban` {site}: is not a site of this cycle; see dwc federated status")
    if site in cycle.state["banned"]:
        raise InputError(f"`ban` {site}: is banned already; leave it out")
    cycle.state["banned"].append(site)
    cycle.record("ban", site=site)
    cycle.write()


def allow(cycle: Cycle, site: str) -> None:
    """Undo `ban`: what the site had sent counts again."""
    if site not in cycle.state["banned"]:
        raise InputError(f"`allow` {site}: is not banned; leave it out")
    cycle.state["banned"].remove(site)
    cycle.record("allow", site=site)
    cycle.write()


def prune(cycle: Cycle) -> int:
    """Delete the posteriors of closed rounds that nothing can need any more; returns the bytes freed.

    The round that closed last is kept, because late posteriors may enter it, and all networks are. Factors and cavities
    that nobody can train from or answer to any more go too. Pruned rounds can no longer be reopened or recomputed.
    """
    last = len(cycle.state["priors"]) - 1
    freed = 0
    closed = [
        row for row in cycle.state["posteriors"]
        if row["counted_in"] is not None and row["counted_in"] < last and (cycle.folder / row["file"]).exists()
    ]  # fmt: skip
    for row in closed:
        row["pruned"] = True
    cycle.write()  # before the files are gone, so that a crash leaves none that is missed
    void = [entry.pop("void") for entry in cycle.state["refused"] if entry.get("void")]
    gone = [cycle.folder / row["file"] for row in closed + void]
    gone += [*(cycle.folder / "dropped").glob("*.safetensors"), *unneeded(cycle.folder, cycle.state)]
    for path in filter(Path.exists, gone):
        freed += path.stat().st_size
        path.unlink()
    cycle.record("prune", bytes=freed)
    cycle.write()
    return freed


def _reopen(cycle: Cycle, number: int) -> None:
    state = cycle.state
    closed = len(state["priors"]) - 1
    if not 1 <= number <= closed:
        raise InputError(f"`reopen` {number}: {closed} rounds are closed; give one of them")
    if gone := [row for row in state["posteriors"] if row.get("pruned") and (row["counted_in"] or 0) >= number]:
        raise InputError(f"`reopen` {number}: {gone[0]['file']} was pruned; restore it from a backup")
    for row in state["posteriors"]:
        if row["counted_in"] is not None and row["counted_in"] >= number:
            uncount(row)
    for row in [row for row in state["posteriors"] if row["round"] > number]:
        state["posteriors"].remove(row)
        reason = f"round {number} was reopened, so its prior is void, unless the round ends with the same network"
        told = f"{row['site']}'s posterior of round {row['round']}: {reason}"
        cycle.refuse(row, told, prior_sha256=prior_sha256(state, row["site"], row["round"]), void=row)
    del state["priors"][number:], state["published"][number:], state["networks"][number:]


def _payload(cycle: Cycle, row: dict[str, Any]) -> str:
    """The digest of the tensors of a posterior that an earlier dwc has entered; "" if its file is damaged."""
    try:
        return Posterior.load(cycle.folder / row["file"]).payload_sha256
    except InputError:
        return ""


def _put_aside(cycle: Cycle, row: dict[str, Any]) -> None:
    source: Path = cycle.folder / row["file"]
    if source.exists():
        target = cycle.folder / "dropped" / f"round-{row['round']}-{row['site']}-{row['sha256'][:12]}.safetensors"
        target.parent.mkdir(exist_ok=True)
        os.replace(source, target)
