"""The closing of a round: its posteriors are compared and make the next network, which is published.

The new network waits as `next.safetensors` until the state has it: a crash leaves either the old network or the new.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dwc.base.errors import InputError
from dwc.federated.judging import verdict_on
from dwc.federated.networks import Answer, consolidated, network_file, replaced
from dwc.federated.server_state import prior_sha256, uncount
from dwc.influence import limit_powers, limited_because
from dwc.posterior import Posterior

if TYPE_CHECKING:
    from dwc.federated.cycle import Cycle

__all__ = ["publish", "settle"]

_JUDGED = ("site", "round", "file", "sha256", "power")


def publish(cycle: "Cycle", number: int, rows: list[dict[str, Any]], *, wait: bool = False) -> bool:
    """Make the next network of these posteriors and those that count in this round already.

    The result is read back before it is published. Where the agreement names held-out scans, they are asked first: this
    returns False while they are being scored, unless `wait` is set.
    """
    state, next_file = cycle.state, _next_file(cycle.folder)
    before = [row for row in state["posteriors"] if row["counted_in"] == number]
    rows = [*rows, *(row for row in before if row["site"] not in state["banned"])]
    rows.sort(key=lambda row: (row["round"], row["site"]))
    limits = _limits(cycle, rows)
    answers = _answers(cycle, rows, limits)
    if state["project"]["method"] == "dwc":
        network, about = consolidated(cycle.folder, state, number, answers)
    else:
        verdict = None
        if state["project"]["data"] is not None:
            entering = [{**row, **limit} for row, limit in zip(rows, limits, strict=True) if limit["power"] > 0]
            asked = [{name: row[name] for name in _JUDGED} for row in entering]
            verdict = verdict_on(cycle.folder, state, number, asked, wait=wait)
            if verdict is None:
                return False
        network, about = replaced(cycle.folder, state, number, answers, verdict)
    network.save(next_file)
    if Posterior.load(next_file).sha256 != network.sha256:
        raise InputError(f"{next_file}: reads back as something else; check the disk")
    for row in before:
        uncount(row)
    for row, limit in zip(rows, limits, strict=True):
        row |= {"counted_in": number, **limit}
    state["priors"][number:] = [network.sha256]
    state["published"][number:] = [cycle.now().isoformat()]
    state["networks"][number:] = [about]
    _revive(cycle)
    cycle.write()
    os.replace(next_file, cycle.result)
    return True


def settle(folder: Path, state: dict[str, Any]) -> None:
    """Finish or forget a publication that a crash has cut short: the state says which."""
    next_file = _next_file(folder)
    if not next_file.exists():
        return
    with suppress(InputError):  # damaged: the round is computed again
        if Posterior.load(next_file).sha256 == state["priors"][-1]:
            os.replace(next_file, network_file(folder, len(state["priors"])))
    next_file.unlink(missing_ok=True)


def _answers(cycle: "Cycle", rows: list[dict[str, Any]], limits: list[dict[str, Any]]) -> Iterator[Answer]:
    """The posteriors, one at a time, without those that are left out."""
    for row, limit in zip(rows, limits, strict=True):
        site = cycle.posterior(row)
        if limit["power"] > 0:
            yield row, site, limit["power"]


def _limits(cycle: "Cycle", rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The power of each posterior and why, compared with the others of the round that it was trained in."""
    found: dict[str, dict[str, Any]] = {}  # by file
    for number in {row["round"] for row in rows}:
        group = [
            row for row in cycle.state["posteriors"]
            if row["round"] == number and row["site"] not in cycle.state["banned"]
            and ("influence" in row or "pruned" not in row)
        ]  # fmt: skip
        influences = [cycle.influence(row) for row in group]
        powers = limit_powers(influences, cycle.project["max_influence"])
        reasons = limited_because(influences, powers)
        for row, power, reason in zip(group, powers, reasons, strict=True):
            found[row["file"]] = {"power": power, "limited_because": reason}
    return [found[row["file"]] for row in rows]


def _revive(cycle: "Cycle") -> None:
    """Let posteriors of the round that opens count that were trained from the same prior before it was void.

    Where the file is gone, the refusal is forgotten, and the site sends it again.
    """
    state, number = cycle.state, len(cycle.state["priors"])
    busy = {row["site"] for row in state["posteriors"] if row["counted_in"] is None}
    for entry in list(state["refused"]):
        row = entry.get("void")
        if entry.get("prior_sha256") != prior_sha256(state, entry["site"], number):
            continue
        if row and row["round"] != number:
            continue
        state["refused"].remove(entry)
        if row and entry["site"] not in busy and (cycle.folder / row["file"]).exists():
            state["posteriors"].append(row)


def _next_file(folder: Path) -> Path:
    return folder / "next.safetensors"
