"""The server's side of the cycle: which prior is out, whose posterior has arrived, and when a round closes.

A folder holds the priors `q0.safetensors`, `q1.safetensors`, ..., the posteriors `round-1/<site>.safetensors` and
`state.json`. The state is written last and atomically: after a crash, whatever it does not mention is done again.
Nothing here sends or waits.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from dwc.base.errors import InputError, one_line
from dwc.base.files import open_folder, sweep, write_whole
from dwc.consolidation import Consolidation
from dwc.federated.project import Project
from dwc.federated.server_state import VERSION, quorum_since, read_state, write_state
from dwc.federated.wire import ANSWER, HEADER, check, digest
from dwc.posterior import Posterior

__all__ = ["Cycle"]

_MAY_CHANGE = {"sites", "rounds", "quorum", "grace_hours", "answer_timeout_s"}  # while a cycle is under way
_MAX_REFUSALS = 100  # kept for each site, so that junk does not fill the state
_MAX_REACH = 1e9  # shift in sigma_0, and factor by which a sigma may shrink
_UNHEARD = {"state": "not heard of", "round": 0, "heard": None}


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
        sweep(folder)
        self._contents: dict[int, bytes] = {}

    def reload(self) -> None:
        """Drop changes that could not be written, for instance because the disk is full."""
        self.state = read_state(self.folder)
        self.project = self.state["project"]

    @classmethod
    def create(cls, folder: Path, project: Project) -> "Cycle":
        """Open round 1 from the project's prior, in a new folder."""
        prior = Posterior.load(project.prior)
        Consolidation(prior)  # refuses a MAP network
        if (folder / "state.json").exists():
            raise InputError(f"{folder / 'state.json'}: a cycle has begun here; give another folder")
        open_folder(folder)
        prior.save(folder / "q0.safetensors")
        state = {
            "version": VERSION,
            "project": project.to_json(),
            "priors": [prior.sha256],  # of round 1, 2, ...; the last is the result when all rounds are closed
            "published": [_now().isoformat()],
            "posteriors": [],
            "refused": [],
            "trouble": [],  # problems of the last pass
            "traffic": {},  # by site and round: bytes of the messages to it and from it
            "sites": {site: dict(_UNHEARD) for site in project.sites},
        }
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
        if project.rounds < (begun := self.round or len(self.state["priors"]) - 1):
            raise InputError(f"`rounds` {project.rounds}: round {begun} has begun already; give {begun} or more")
        self.project = self.state["project"] = agreed
        self.state["sites"] = {site: self.state["sites"].get(site, dict(_UNHEARD)) for site in project.sites}
        write_state(self.folder, self.state)

    @property
    def round(self) -> int | None:
        """The open round, from 1; None when all are closed."""
        number = len(self.state["priors"])
        return number if number <= self.project["rounds"] else None

    @property
    def result(self) -> Path:
        """The newest consolidated posterior; before the first round closes, the prior."""
        return self._prior_file(len(self.state["priors"]))

    def question(self, site: str, *, with_prior: bool = False) -> dict[str, Any]:
        """What the server asks a site: `wire.QUESTION`."""
        number = self.round
        question: dict[str, Any] = {
            "round": number or 0,
            "prior_sha256": self.state["priors"][-1] if number else "",
            "settled": {
                row["file_sha256"]: row.get("reason", "")
                for row in self.state["posteriors"] + self.state["refused"]
                if row["site"] == site
            },
        }
        if with_prior and number:
            question["prior"] = self._content(number)
        return question

    def receive(self, site: str, answer: Mapping[str, Any]) -> dict[str, Any]:
        """Record a site's answer, `wire.ANSWER`, and return it.

        A posterior is checked and kept once per site, round and prior. One that does not belong is refused: the state
        says why, and the site is told. If the server's own files are at fault, this is an InputError and nothing is
        recorded; the site will send its answer again.
        """
        if site not in self.project["sites"]:
            raise InputError(f"{site}: is not a site of {self.project['name']}; its answer is ignored")
        answer = check(answer, ANSWER)
        self.state["sites"][site] = {"state": answer["state"], "round": answer["round"], "heard": _now().isoformat()}
        if "posterior" in answer:
            self._enter(site, answer["posterior"])
        write_state(self.folder, self.state)
        return answer

    def advance(self, now: datetime | None = None) -> bool:
        """Close the open round if it is due, and publish the next prior; returns whether one was published.

        A round is due when all sites have answered, or when it has its quorum and the grace period is over. Late
        posteriors of earlier rounds enter the round that closes next; after the last round they are added to its
        result.
        """
        now, number = now or _now(), self.round
        waiting = [row for row in self.state["posteriors"] if row["counted_in"] is None]
        if number is None:
            return bool(waiting) and self._publish(self.project["rounds"], waiting)
        since = quorum_since(self.state)
        if since is None:
            return False
        until = datetime.fromisoformat(since) + timedelta(hours=self.project["grace_hours"])
        n_received = sum(row["round"] == number for row in waiting)
        if n_received < len(self.project["sites"]) and now < until:
            return False
        return self._publish(number, waiting)

    def note(self, trouble: list[str]) -> None:
        """Keep the problems of a pass, for `describe`."""
        if trouble != self.state["trouble"]:
            self.state["trouble"] = trouble
            write_state(self.folder, self.state)

    def count(self, site: str, number: int, to_site: int, from_site: int) -> None:
        """Add to the bytes of a site's messages in a round; written with the next answer."""
        row = self.state["traffic"].setdefault(site, {}).setdefault(str(number), [0, 0])
        row[:] = row[0] + to_site, row[1] + from_site

    def _publish(self, number: int, waiting: list[dict[str, Any]]) -> bool:
        """Consolidate the posteriors that count in a round into the next prior (Eq. 17)."""
        rows = [row for row in self.state["posteriors"] if row["counted_in"] == number] + waiting
        consolidation = Consolidation(self._prior(number)).tempered(self.project["temper"])
        for row in sorted(rows, key=lambda row: (row["round"], row["site"])):
            trained_from = None if row["round"] == number else self._prior(row["round"])
            consolidation.add(Posterior.load(self.folder / row["file"]), prior=trained_from)
        posterior = consolidation.posterior()
        posterior.save(self._prior_file(number + 1))
        for row in waiting:
            row["counted_in"] = number
        self.state["priors"][number:] = [posterior.sha256]
        self.state["published"][number:] = [_now().isoformat()]
        write_state(self.folder, self.state)
        return True

    def _enter(self, site: str, content: bytes) -> None:
        """Keep a posterior's file and record it, or record why not."""
        if digest(content) in self.question(site)["settled"]:
            return  # sent again, because the site did not get the receipt
        row: dict[str, Any] = {
            "site": site,
            "file_sha256": digest(content),
            "received": _now().isoformat(),
            "bytes": len(content),
        }
        incoming = self.folder / f".incoming-{site}.part"
        write_whole(incoming, content)
        try:
            row |= self._checked(site, incoming)
            row |= {"file": f"round-{row['round']}/{site}.safetensors", "counted_in": None}
            (self.folder / f"round-{row['round']}").mkdir(exist_ok=True)
            os.replace(incoming, self.folder / row["file"])
            self.state["posteriors"].append(row)
        except _Refused as error:
            self.state["refused"].append({**row, "reason": str(error)})
            earlier = [row for row in self.state["refused"] if row["site"] == site]
            if len(earlier) > _MAX_REFUSALS:
                self.state["refused"].remove(earlier[0])
        finally:
            incoming.unlink(missing_ok=True)

    def _checked(self, site: str, incoming: Path) -> dict[str, Any]:
        """The state's entries about a posterior that belongs; `_Refused` if it does not.

        It is consolidated alone as a trial, so that what is accepted here does not stop `advance` later.
        """
        with _blamed_on(site, incoming):
            posterior = Posterior.load(incoming)
            number = self._round_of(posterior)
            row = {"round": number, "prior_sha256": posterior.metadata["prior_sha256"]}
            row |= {"sha256": posterior.sha256, "n_volumes": posterior.metadata.get("n_volumes")}
        trial = Consolidation(self._prior(number)).tempered(self.project["temper"])
        with _blamed_on(site, incoming):
            self._check(site, row, posterior)
            trial.add(posterior)
            trial.posterior()
            _check_reach(posterior, trial.prior)
        return row

    def _round_of(self, posterior: Posterior) -> int:
        """The round of the prior that a posterior was trained from, whatever the site says."""
        trained_from = posterior.metadata.get("prior_sha256")
        opened = self.state["priors"][: self.project["rounds"]]
        if trained_from not in opened:
            raise InputError(
                f"{posterior.name}: was trained from prior {str(trained_from)[:12]}, which no round had; "
                "train from the prior that the server sent"
            )
        return opened.index(trained_from) + 1

    def _check(self, site: str, row: dict[str, Any], posterior: Posterior) -> None:
        """Refuse what would count a site's scans twice, and unknown header entries."""
        if odd := sorted(posterior.metadata.keys() - HEADER):
            raise InputError(f"{posterior.name}: its header has {odd[0]!r}; send only what dwc train writes")
        for other in self.state["posteriors"]:
            if other["site"] == site and other["round"] == row["round"]:
                raise InputError(f"{posterior.name}: another one of round {row['round']} is in; a site counts once")
            if other["site"] == site and other["round"] > row["round"]:
                raise InputError(f"{posterior.name}: of round {row['round']}, but one of round {other['round']} is in")
            if other["sha256"] == row["sha256"]:
                raise InputError(f"{posterior.name}: is the posterior of {other['site']}; each counts once")

    def _content(self, number: int) -> bytes:
        """The file of a round's prior, kept in memory for all sites that ask."""
        if self._contents.keys() != {number}:
            self._prior(number)  # a damaged one is not sent
            self._contents = {number: self._prior_file(number).read_bytes()}
        return self._contents[number]

    def _prior_file(self, number: int) -> Path:
        return self.folder / f"q{number - 1}.safetensors"

    def _prior(self, number: int) -> Posterior:
        prior = Posterior.load(self._prior_file(number))
        if prior.sha256 != self.state["priors"][number - 1]:
            raise InputError(f"{prior.name}: is not the prior that was published; restore it from a backup")
        return prior


class _Refused(InputError):
    """A site's posterior does not belong."""


@contextmanager
def _blamed_on(site: str, incoming: Path) -> Iterator[None]:
    """Turn errors about a site's file into refusals that name no path of the server; a failing disk is not one."""
    try:
        yield
    except InputError as error:
        if isinstance(error.__cause__, OSError):
            raise
        reason = str(error).replace(str(incoming), f"{site}'s posterior").replace(f"{incoming.parent}/", "")
        raise _Refused(one_line(reason)) from error


def _check_reach(posterior: Posterior, prior: Posterior) -> None:
    """Refuse values so far from the prior that, combined with other sites', they could leave the range of fp32."""
    for name, sigma_0 in prior.sigma.items():
        shift = (posterior.mu[name].double() - prior.mu[name]).abs()
        if (shift > _MAX_REACH * sigma_0).any() or (posterior.sigma[name] < sigma_0 / _MAX_REACH).any():
            raise InputError(
                f"{posterior.name}: {name} is more than {_MAX_REACH:g} sigmas from the prior, or as much surer; "
                "train again"
            )


def _now() -> datetime:
    return datetime.now(timezone.utc).replace(microsecond=0)
