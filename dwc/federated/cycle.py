"""The server's side of the cycle: which prior is out, whose posterior has arrived, and when a round closes.

A folder holds the networks (see `networks`), the posteriors `round-1/<site>.safetensors` and `state.json`. The state is
written atomically, after the files that it mentions: after a crash, whatever it does not mention is done again. A
network that may replace an older one waits as `next.safetensors` until the state has it.
Nothing here sends or waits.
"""

import json
import os
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from dwc.base.errors import InputError
from dwc.base.files import open_folder, sweep, write_whole
from dwc.consolidation import Consolidation
from dwc.factors import Influence, measure
from dwc.federated.admission import Refused, admit, blamed_on, check_size, round_of
from dwc.federated.closing import publish, settle
from dwc.federated.networks import (
    entered,
    network_file,
    prior_file,
    start_content,
    trained_from,
)
from dwc.federated.project import Project
from dwc.federated.server_state import (
    UNHEARD,
    answered,
    n_expected,
    new_state,
    open_round,
    prior_sha256,
    quorum_since,
    read_state,
    steady_time,
    waiting,
    write_state,
)
from dwc.federated.wire import ANSWER, check, digest
from dwc.held_out import HeldOut
from dwc.posterior import Posterior
from dwc.signing import TrustedKeys

__all__ = ["Cycle"]

# What may change while a cycle is under way.
_MAY_CHANGE = {
    "sites", "rounds", "until", "damping", "data", "quorum", "grace_hours", "answer_timeout_s", "max_influence",
    "trusted",
}  # fmt: skip
_MAX_REFUSALS = 100  # kept for each site, so that junk does not fill the state


class Cycle:
    """The server's state and what may be done to it, by one process at a time (`dwc.base.locks.held`).

    Every method may be repeated after a crash.

    Parameters
    ----------
    folder : Path
        Made by `Cycle.create`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reload()
        for place in (folder, *folder.glob("after-*"), *folder.glob("after-*/cavities")):
            sweep(place)
        settle(folder, self.state)
        self._contents: dict[str, bytes] = {}

    def reload(self) -> None:
        """Drop changes that could not be written, for instance because the disk is full."""
        self.state = read_state(self.folder)
        self.project = self.state["project"]

    @classmethod
    def create(cls, folder: Path, project: Project) -> "Cycle":
        """Open round 1 from the project's prior, in a new folder."""
        prior = Posterior.load(project.prior)
        Consolidation(prior)  # refuses a MAP network
        _check_files(project)
        if (folder / "state.json").exists():
            raise InputError(f"{folder / 'state.json'}: a cycle has begun here; give another folder")
        open_folder(folder)
        prior.save(folder / "q0.safetensors")
        state = new_state(project, prior.sha256)
        state["published"].append(_now(state).isoformat())
        write_state(folder, state)
        return cls(folder)

    def amend(self, project: Project) -> None:
        """Continue under a changed agreement: other sites, rounds, quorum, grace or answer timeout.

        All else is part of kits and closed rounds and must stay, as must sites that have sent a posterior and rounds
        that have begun.
        """
        if self.round is None:
            self.advance()  # a late posterior belongs to the result before that becomes the prior of another round
        agreed = json.loads(json.dumps(project.to_json()))
        for name in sorted(agreed.keys() - _MAY_CHANGE - {"prior"}):
            if agreed[name] != self.project[name]:
                raise InputError(f"`{name}` {agreed[name]}: cannot change from {self.project[name]}; put that back")
        if (prior := Posterior.load(project.prior)).sha256 != self.state["priors"][0]:
            raise InputError(f"`prior` {prior.name}: is not the one that the cycle began with; put that back")
        if gone := sorted({row["site"] for row in self.state["posteriors"]} - {*project.sites}):
            raise InputError(f"`sites`: {gone[0]} has sent a posterior already; leave it in")
        _check_files(project)
        if project.rounds < (begun := self.round or len(self.state["priors"]) - 1):
            raise InputError(f"`rounds` {project.rounds}: round {begun} has begun already; give {begun} or more")
        self.project = self.state["project"] = agreed
        self.state["sites"] = {site: self.state["sites"].get(site, dict(UNHEARD)) for site in project.sites}
        write_state(self.folder, self.state)

    @property
    def round(self) -> int | None:
        """The open round, from 1; None when all are closed."""
        return open_round(self.state)

    @property
    def result(self) -> Path:
        """The newest consolidated posterior; before the first round closes, the prior."""
        return network_file(self.folder, len(self.state["priors"]))

    def question(self, site: str, *, with_prior: bool = False, with_start: bool = False) -> dict[str, Any]:
        """What the server asks a site: `wire.QUESTION`."""
        number = self.round
        question: dict[str, Any] = {
            "round": number or 0,
            "prior_sha256": prior_sha256(self.state, site, number) if number else "",
            "start_sha256": "",
            "entered": [],
            "settled": {
                row["file_sha256"]: row.get("reason", "")
                for row in self.state["posteriors"] + self.state["refused"]
                if row["site"] == site and not row.get("damaged")
            },
        }
        if with_prior and number:
            question["prior"] = self._content(number, site)
            question["start_sha256"] = self.state["networks"][-1].get("starts", {}).get(site, "")
            if question["start_sha256"]:
                question["entered"] = entered(self.state, site)
            if question["start_sha256"] and with_start:
                question["start"] = start_content(self.folder, self.state, site)
        return question

    def receive(self, site: str, answer: Mapping[str, Any]) -> dict[str, Any]:
        """Record a site's answer, `wire.ANSWER`, and return it.

        A posterior is checked and kept once per site, round and prior. One that does not belong is refused: the state
        says why, and the site is told. If the server's own files are at fault, this is an InputError and nothing is
        recorded; the site will send its answer again.
        """
        if site not in self.project["sites"]:
            raise InputError(f"{site}: is not a site of {self.project['name']}; its answer is ignored")
        if site in self.state["banned"]:
            raise InputError(f"{site}: is banned; its answer is ignored")
        try:
            answer = check(answer, ANSWER)
        except InputError as error:
            raise InputError(f"{site}: {error}") from error
        heard = self.now().isoformat()
        self.state["sites"][site] = {"state": answer["state"], "round": answer["round"], "heard": heard}
        if "posterior" in answer:
            self._enter(site, answer["posterior"], answer["round"])
        write_state(self.folder, self.state)
        return answer

    def advance(self, now: datetime | None = None) -> bool:
        """Close the open round if it is due, and publish the next prior; returns whether one was published.

        A round is due when all sites have answered, or when it has its quorum and the grace period is over; it closes
        once the held-out scans have been asked, if there are any. Late posteriors of earlier rounds enter the round
        that closes next; after the last round they are added to its result.
        """
        now, number, rows = now or self.now(), self.round, waiting(self.state)
        if number is None:
            return bool(rows) and publish(self, len(self.state["priors"]) - 1, rows)
        since = quorum_since(self.state)
        if since is None:
            return False
        until = datetime.fromisoformat(since) + timedelta(hours=self.project["grace_hours"])
        if len(answered(self.state)) < n_expected(self.state) and now < until:
            return False
        return publish(self, number, rows)

    def close(self) -> None:
        """Close the open round now, whatever its quorum."""
        publish(self, self.round or len(self.state["priors"]) - 1, waiting(self.state), wait=True)

    def now(self) -> datetime:
        """The time, which does not jump."""
        return _now(self.state)

    def record(self, act: str, **about: Any) -> None:
        """Record an act of the organizer; written with the next change."""
        self.state["acts"].append({"at": self.now().isoformat(), "act": act, **about})

    def write(self) -> None:
        """Write the state."""
        write_state(self.folder, self.state)

    def note(self, trouble: list[str]) -> None:
        """Keep the problems of a pass, for `describe`."""
        if trouble != self.state["trouble"]:
            self.state["trouble"] = trouble
            write_state(self.folder, self.state)

    def count(self, site: str, number: int, to_site: int, from_site: int) -> None:
        """Add to the bytes of a site's messages in a round; written with the next answer."""
        row = self.state["traffic"].setdefault(site, {}).setdefault(str(number), [0, 0])
        row[:] = row[0] + to_site, row[1] + from_site

    def influence(self, row: dict[str, Any]) -> Influence:
        """What a recorded posterior does; measured now if an earlier dwc has entered it."""
        if "influence" not in row:
            row["influence"] = measure(self.posterior(row), self._prior(row)).to_json()
        return Influence.from_json(row["influence"])

    def posterior(self, row: dict[str, Any]) -> Posterior:
        """A posterior that was recorded; one that was damaged since is asked for again."""
        path = self.folder / row["file"]
        try:
            posterior = Posterior.load(path)
            if posterior.sha256 == row["sha256"]:
                return posterior
            reason = "is not the file that was recorded"
        except InputError as error:
            if isinstance(error.__cause__, OSError):
                raise
            reason = str(error).removeprefix(f"{path}: ")
        self.reload()
        for known in self.state["posteriors"]:
            if known["file"] == row["file"]:
                known["damaged"] = True
        write_state(self.folder, self.state)
        raise InputError(f"{path}: {reason}; {row['site']} is asked to send it again, or drop it with amend")

    def _enter(self, site: str, content: bytes, claimed: int) -> None:
        """Keep a posterior's file and record it, or record why not; `claimed` is the round that the site names."""
        file_sha256 = digest(content)
        damaged = [row for row in self._rows_of(site) if row.get("damaged") and row["file_sha256"] == file_sha256]
        for row in damaged:
            write_whole(self.folder / row["file"], content)
            del row["damaged"]
        if damaged or file_sha256 in self.question(site)["settled"]:
            return  # sent again, because the file was damaged here or the site did not get the receipt
        received = self.now().isoformat()
        row = {"site": site, "file_sha256": file_sha256, "received": received, "bytes": len(content)}
        incoming = self.folder / f".incoming-{site}.part"
        try:
            check_size(site, content, network_file(self.folder, 1))
            write_whole(incoming, content)
            row |= self._checked(site, incoming, claimed)
            row |= {"file": self._place(row), "counted_in": None}
            (self.folder / row["file"]).parent.mkdir(exist_ok=True)
            os.replace(incoming, self.folder / row["file"])
            self.state["posteriors"].append(row)
        except Refused as error:
            self.refuse(row, str(error), **error.more)
        finally:
            incoming.unlink(missing_ok=True)

    def refuse(self, row: Mapping[str, Any], reason: str, **more: Any) -> None:
        """Note a refusal, written with the next change; the site is told with the next question."""
        kept = ("site", "file_sha256", "received", "bytes")
        self.state["refused"].append({**{name: row[name] for name in kept if name in row}, "reason": reason, **more})
        earlier = [other for other in self.state["refused"] if other["site"] == row["site"] and not other.get("void")]
        if len(earlier) > _MAX_REFUSALS:
            self.state["refused"].remove(earlier[0])

    def _place(self, row: Mapping[str, Any]) -> str:
        """Where a posterior's file goes; one of the same site and round may be there, of a prior that is void."""
        void = [entry["void"] for entry in self.state["refused"] if entry.get("void")]
        taken = {other["file"] for other in self.state["posteriors"] + void}
        file = f"round-{row['round']}/{row['site']}.safetensors"
        return (
            file if file not in taken else f"round-{row['round']}-{row['prior_sha256'][:12]}/{row['site']}.safetensors"
        )

    def _rows_of(self, site: str) -> list[dict[str, Any]]:
        return [row for row in self.state["posteriors"] if row["site"] == site]

    def _checked(self, site: str, incoming: Path, claimed: int) -> dict[str, Any]:
        """The state's entries about a posterior that belongs; `Refused` if it does not."""
        with blamed_on(site, incoming):
            posterior = Posterior.load(incoming)
            number = round_of(self.state, site, posterior, claimed)
            row = {"round": number, "prior_sha256": posterior.metadata["prior_sha256"], "sha256": posterior.sha256}
            row |= {"payload_sha256": posterior.payload_sha256}
        prior = trained_from(self.folder, self.state, site, number)
        trusted = self.project["trusted"] and TrustedKeys(Path(self.project["trusted"]))
        others = {
            other["site"]: self.influence(other)
            for other in self.state["posteriors"]
            if other["round"] == number and other["site"] != site and not {"damaged", "pruned"} & other.keys()
        }
        with blamed_on(site, incoming):
            if trusted:
                trusted.require(posterior, site)
            return row | admit(self.state, site, row, posterior, prior, others)

    def _content(self, number: int, site: str) -> bytes:
        """The file of a site's prior, kept in memory for all sites that ask for the same."""
        sha256 = prior_sha256(self.state, site, number)
        if self._contents.keys() != {sha256}:
            trained_from(self.folder, self.state, site, number)  # a damaged one is not sent
            self._contents = {sha256: prior_file(self.folder, self.state, site, number).read_bytes()}
        return self._contents[sha256]

    def _prior(self, row: Mapping[str, Any]) -> Posterior:
        """What a recorded posterior was trained from."""
        return trained_from(self.folder, self.state, row["site"], row["round"])


def _check_files(project: Project) -> None:
    """Refuse keys and held-out scans that could not be used later."""
    if project.trusted is not None:
        TrustedKeys(project.trusted)
    if project.data is not None:
        HeldOut.of(project.data, project.prior)


def _now(state: dict[str, Any]) -> datetime:
    return steady_time(state["clock"])
