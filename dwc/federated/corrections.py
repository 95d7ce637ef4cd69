"""What the organizer may undo in a cycle: drop a posterior, reopen a round, ban a site, remove old files.

Every act is recorded in the state with its time. Files are moved to `dropped/`, never deleted, except by `prune`.
"""

import os
from pathlib import Path
from typing import Any

from dwc.base.errors import InputError
from dwc.federated.cycle import Cycle

__all__ = ["allow", "ban", "drop", "prune", "recompute", "reopen"]


def drop(cycle: Cycle, site: str, number: int) -> None:
    """Take a site's posterior of a round out; if its round is closed, that and all later rounds are reopened."""
    rows = [row for row in cycle.state["posteriors"] if row["site"] == site and row["round"] == number]
    if not rows:
        raise InputError(f"`drop` {site}/{number}: no such posterior is in; see dwc federated status")
    (row,) = rows
    if row["counted_in"] is not None:
        _reopen(cycle, row["counted_in"])
    _remove(cycle, row, "was dropped by the organizer")
    cycle.record("drop", site=site, round=number, sha256=row["sha256"])


def reopen(cycle: Cycle, number: int) -> None:
    """Open a closed round again, with the posteriors that it had; later rounds are void."""
    _reopen(cycle, number)
    cycle.record("reopen", round=number)


def recompute(cycle: Cycle, number: int) -> None:
    """Consolidate a closed round again from its files, now, whatever its quorum; later rounds are void."""
    _reopen(cycle, number)
    cycle.record("recompute", round=number)
    cycle.close()


def ban(cycle: Cycle, site: str) -> None:
    """Ignore a site from now on: its waiting posteriors are dropped, and no round waits for it.

    What it has contributed to closed rounds stays; `drop` takes that out.
    """
    if site not in cycle.project["sites"]:
        raise InputError(f"`ban` {site}: is not a site of this cycle; see dwc federated status")
    if site in cycle.state["banned"]:
        raise InputError(f"`ban` {site}: is banned already; leave it out")
    for row in [row for row in cycle.state["posteriors"] if row["site"] == site and row["counted_in"] is None]:
        _remove(cycle, row, "the site is banned")
    cycle.state["banned"].append(site)
    cycle.record("ban", site=site)


def allow(cycle: Cycle, site: str) -> None:
    """Undo `ban`."""
    if site not in cycle.state["banned"]:
        raise InputError(f"`allow` {site}: is not banned; leave it out")
    cycle.state["banned"].remove(site)
    cycle.record("allow", site=site)


def prune(cycle: Cycle) -> int:
    """Delete the posteriors of closed rounds that nothing can need any more; returns the bytes freed.

    The round that closed last is kept, because late posteriors may enter it, and all priors are. Pruned rounds can no
    longer be reopened or recomputed.
    """
    last = len(cycle.state["priors"]) - 1
    freed = 0
    for row in cycle.state["posteriors"]:
        path = cycle.folder / row["file"]
        if row["counted_in"] is not None and row["counted_in"] < last and path.exists():
            freed += path.stat().st_size
            row["pruned"] = True
            path.unlink()
    for path in (cycle.folder / "dropped").glob("*.safetensors"):
        freed += path.stat().st_size
        path.unlink()
    cycle.record("prune", bytes=freed)
    return freed


def _reopen(cycle: Cycle, number: int) -> None:
    state = cycle.state
    closed = len(state["priors"]) - 1
    if not 1 <= number <= closed:
        raise InputError(f"`reopen` {number}: {closed} rounds are closed; give one of them")
    if gone := [row for row in state["posteriors"] if row.get("pruned") and (row["counted_in"] or 0) >= number]:
        raise InputError(f"`reopen` {number}: {gone[0]['file']} was pruned; restore it from a backup")
    for row in [row for row in state["posteriors"] if row["round"] > number]:
        _remove(cycle, row, f"round {number} was reopened, so its prior is void; train again")
    for row in state["posteriors"]:
        if row["counted_in"] is not None and row["counted_in"] >= number:
            row["counted_in"] = None
            row.pop("power", None)
    del state["priors"][number:], state["published"][number:]


def _remove(cycle: Cycle, row: dict[str, Any], reason: str) -> None:
    """Move a posterior aside and tell its site why."""
    source: Path = cycle.folder / row["file"]
    if source.exists():
        target = cycle.folder / "dropped" / f"round-{row['round']}-{row['site']}-{row['sha256'][:12]}.safetensors"
        target.parent.mkdir(exist_ok=True)
        os.replace(source, target)
    cycle.state["posteriors"].remove(row)
    cycle.refuse(row, f"{row['site']}'s posterior of round {row['round']}: {reason}")
