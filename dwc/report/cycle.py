"""The report on a federated cycle: one page of the server's books, as `dwc federated status` reads them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dwc.base.errors import InputError
from dwc.base.files import open_folder, write_whole
from dwc.federated.server_state import describe, read_state
from dwc.report.pages import is_ours, render
from dwc.report.words import DASH

__all__ = ["write_cycle_report"]

_DIGITS = 12  # of a SHA-256


def write_cycle_report(folder: Path, out: Path) -> Path:
    """Write index.html of the cycle whose state.json is in `folder`; returns its path. Replaces an earlier report."""
    state, index = read_state(folder), out / "index.html"
    if index.is_file() and not is_ours(index):
        raise InputError(f"{index}: was not written by dwc report; give another `out`")
    open_folder(out)
    project, lines = state["project"], describe(state).splitlines()
    numbers = range(1, min(len(state["priors"]), project["rounds"]) + 1)
    sites = {*state["sites"], *project["sites"]}
    posteriors = state["posteriors"]
    counted = [row for row in posteriors if row["counted_in"]]
    weak = [row for row in counted if row.get("power", 1.0) < 1]
    page = render(
        "cycle.html",
        name=project["name"],
        about=lines[0].partition(": ")[2],
        tiles=[
            (f"{len(state['priors']) - 1} of {project['rounds']}", "rounds closed"),
            (len(sites), "sites"), (len(counted), "posteriors counted"), (len(weak), "of them limited or left out"),
            (len(state["refused"]), "refused"),
        ],
        remarks=[line for line in lines[1:] if not line.startswith(("  ", "the organizer: "))],
        rounds=[_round(state, number) for number in numbers],
        numbers=numbers,
        sites=[_site(state, site, numbers) for site in sorted(sites)],
        posteriors=[_posterior(row) for row in sorted(posteriors, key=lambda row: row["received"])],
        acts=state["acts"],
        rules={name: project.get(name) for name in ("quorum", "grace_hours", "max_influence")},
        dash=DASH,
    )  # fmt: skip
    write_whole(index, page)
    return index


def _round(state: Mapping[str, Any], number: int) -> dict[str, Any]:
    counted = [row for row in state["posteriors"] if row["counted_in"] == number]
    is_closed = number < len(state["priors"])
    volumes = [row.get("n_volumes") for row in counted]
    return {
        "number": number,
        "state": "closed" if is_closed else "open",
        "prior": state["priors"][number - 1][:_DIGITS],
        "published": state["published"][number - 1],
        "sites": ", ".join(row["site"] for row in counted) or DASH,
        "scans": sum(volume for volume in volumes if volume) if any(volumes) else DASH,
    }


def _site(state: Mapping[str, Any], site: str, numbers: range) -> dict[str, Any]:
    own = {row["round"]: row for row in state["posteriors"] if row["site"] == site}
    known = state["sites"].get(site, {})
    traffic = [sum(both) for both in zip(*state["traffic"].get(site, {}).values(), strict=True)]
    return {
        "name": site,
        "state": "banned" if site in state["banned"] else known.get("state", DASH),
        "heard": known.get("heard") or DASH,
        "to": f"{traffic[0] / 1e6:.1f}" if traffic else DASH,
        "from": f"{traffic[1] / 1e6:.1f}" if traffic else DASH,
        "rounds": [_verdict(own.get(number)) for number in numbers],
    }


def _verdict(row: Mapping[str, Any] | None) -> tuple[str, str]:
    """What became of a site's posterior of a round, and the look of that."""
    if row is None:
        return DASH, ""
    if "damaged" in row:
        return "damaged", "failed"
    if row["counted_in"] is None:
        return "waits", "waits"
    power = row.get("power", 1.0)
    late = f" in {row['counted_in']}" if row["counted_in"] != row["round"] else ""
    if power == 1:
        return f"counted{late}", "pass"
    return (f"limited to {power:.2g}{late}", "check") if power else (f"left out{late}", "failed")


def _posterior(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **{name: row[name] for name in ("site", "round", "received")},
        "scans": row.get("n_volumes") or DASH,
        "size": f"{row['bytes'] / 1e6:.1f}" if row.get("bytes") else DASH,
        "verdict": _verdict(row),
        "because": row.get("limited_because", ""),
        "sha256": row["sha256"][:_DIGITS],
    }
