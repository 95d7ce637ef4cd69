"""The server's books: which prior is out, whose posterior has arrived, and when a round closes.

A folder holds the priors `q0.safetensors`, `q1.safetensors`, ..., the posteriors `round-1/<site>.safetensors` and
`state.json`, which is written last and whole: what it does not tell has not happened, and is done again. Nothing here
sends or waits; `exchange` moves the messages, and every call may be repeated.
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
from dwc.federated.wire import ANSWER, HEADER, check, digest
from dwc.posterior import Posterior

__all__ = ["Cycle", "describe", "read_state"]

_VERSION = 3
_MAY_CHANGE = {"sites", "rounds", "quorum", "grace_hours", "answer_timeout_s"}  # while a cycle is under way
_REFUSED = 100  # files of a site that are remembered as refused: one that sends junk does not fill the books
_FAR = 1e9  # of the prior's sigmas that a mean moves, or fold that a sigma shrinks: no training does
_UNHEARD = {"state": "not heard of", "round": 0, "heard": None}


def read_state(folder: Path) -> dict[str, Any]:
    """The books as they stand.

    Raises
    ------
    InputError
        If there are none.
    """
    path = folder / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give the server's kit") from error
    except ValueError as error:
        raise InputError(f"{path}: is no JSON ({error}); restore it from a backup") from error
    if state.get("version") != _VERSION:
        raise InputError(f"{path}: version {state.get('version')!r}, not {_VERSION}; use the dwc that it began with")
    return state


def describe(state: Mapping[str, Any]) -> str:
    """The books for people: the round, and a line per site."""
    project, number = state["project"], len(state["priors"])
    open_round = f"round {number} of {project['rounds']} is open, from" if number <= project["rounds"] else "result is"
    lines = [f"{project['name']}: {open_round} q{number - 1}.safetensors ({state['priors'][-1][:12]})"]
    if since := _quorum_since(state):
        lines.append(f"quorum since {since}, grace {project['grace_hours']:g} h")
    width = max(map(len, state["sites"]))
    for site, row in state["sites"].items():
        entered = [str(row["round"]) for row in state["posteriors"] if row["site"] == site]
        heard = f"{row['state']} (round {row['round']}), heard {row['heard']}" if row["heard"] else row["state"]
        lines.append(f"  {site:<{width}}  {heard}; posteriors in: {', '.join(entered) or 'none'}")
    lines += [f"refused: {row['reason']}" for row in state["refused"]]
    lines += [f"in the last pass: {trouble}" for trouble in state["trouble"]]
    return "\n".join(lines)


class Cycle:
    """The books in a folder, and what may be done to them. One process at a time (`lock.held`).

    Parameters
    ----------
    folder : Path
        Made by `Cycle.create`.

    Raises
    ------
    InputError
        If it holds no books.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reload()
        sweep(folder)
        self._contents: dict[int, bytes] = {}

    def reload(self) -> None:
        """Forget what could not be written, as when the disk is full: the folder alone tells what has happened."""
        self.state = read_state(self.folder)
        self.project = self.state["project"]

    @classmethod
    def create(cls, folder: Path, project: Project) -> "Cycle":
        """Begin: round 1 is open, from the project's prior.

        Raises
        ------
        InputError
            If the prior is none, or the folder holds books already or cannot be written.
        """
        prior = Posterior.load(project.prior)
        Consolidation(prior)  # refuses a MAP network
        if (folder / "state.json").exists():
            raise InputError(f"{folder / 'state.json'}: a cycle has begun here; give another folder")
        open_folder(folder)
        prior.save(folder / "q0.safetensors")
        state = {
            "version": _VERSION,
            "project": project.to_json(),
            "priors": [prior.sha256],  # of round 1, 2, ...; the last one is the result when all rounds are closed
            "published": [_now().isoformat()],  # when
            "posteriors": [],
            "refused": [],
            "trouble": [],  # of the last pass: what a person has to see to
            "traffic": {},  # by site and round: bytes of the messages to it and from it
            "sites": {site: dict(_UNHEARD) for site in project.sites},
        }
        _write(folder, state)
        return cls(folder)

    def amend(self, project: Project) -> None:
        """Go on under a changed agreement: other sites, rounds, quorum, grace or time for an answer.

        Raises
        ------
        InputError
            If anything else is changed, which kits, sites or closed rounds would not know of, or if it leaves out a
            site that has handed in or a round that has begun.
        """
        if self.round is None:
            self.advance()  # a late posterior belongs to the result, before that is the prior of one more round
        agreed = json.loads(json.dumps(project.to_json()))
        for name in sorted(agreed.keys() - _MAY_CHANGE - {"prior"}):
            if agreed[name] != self.project[name]:
                raise InputError(f"{name} {agreed[name]}: the books have {self.project[name]} for good; put that back")
        if (prior := Posterior.load(project.prior)).sha256 != self.state["priors"][0]:
            raise InputError(f"prior {prior.name}: is not the one that the cycle began with; put that back")
        if gone := sorted({row["site"] for row in self.state["posteriors"]} - {*project.sites}):
            raise InputError(f"sites: {gone[0]} has handed in already; leave it in")
        if project.rounds < (begun := self.round or len(self.state["priors"]) - 1):
            raise InputError(f"rounds {project.rounds}: round {begun} has begun already; give {begun} or more")
        self.project = self.state["project"] = agreed
        self.state["sites"] = {site: self.state["sites"].get(site, dict(_UNHEARD)) for site in project.sites}
        _write(self.folder, self.state)

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
        question = {
            "round": number or 0,
            "prior_sha256": self.state["priors"][-1] if number else "",
            "settled": {
                row["file_sha256"]: row.get("reason", "")
                for row in self.state["posteriors"] + self.state["refused"]
                if row["site"] == site
            },
        }
        return question | ({"prior": self._content(number)} if with_prior and number else {})

    def receive(self, site: str, answer: Mapping[str, Any]) -> dict[str, Any]:
        """Enter a site's answer; a posterior is checked and kept, once per site, round and prior.

        Returns the answer. A posterior that does not belong is refused: the books say why, and the site is told.

        Raises
        ------
        InputError
            If the site is none of the project's, the message is none of ours, or the server's own files are at fault:
            nothing is entered then, and the site will send it again.
        """
        if site not in self.project["sites"]:
            raise InputError(f"{site}: is no site of {self.project['name']}; it is not listened to")
        answer = check(answer, ANSWER)
        self.state["sites"][site] = {"state": answer["state"], "round": answer["round"], "heard": _now().isoformat()}
        if "posterior" in answer:
            self._enter(site, answer["posterior"])
        _write(self.folder, self.state)
        return answer

    def advance(self, now: datetime | None = None) -> bool:
        """Close the open round if it is due, and publish the next prior; returns whether one was published.

        A round is due when all sites have answered, or the quorum has and the grace is over. Late posteriors of earlier
        rounds enter the round that closes next; after the last one they are added to its result.

        Raises
        ------
        InputError
            If a file has been tampered with.
        """
        now, number = now or _now(), self.round
        waiting = [row for row in self.state["posteriors"] if row["counted_in"] is None]
        if number is None:
            return bool(waiting) and self._publish(self.project["rounds"], waiting)
        since = _quorum_since(self.state)
        if since is None:
            return False
        until = datetime.fromisoformat(since) + timedelta(hours=self.project["grace_hours"])
        n_here = sum(row["round"] == number for row in waiting)
        if n_here < len(self.project["sites"]) and now < until:
            return False
        return self._publish(number, waiting)

    def note(self, trouble: list[str]) -> None:
        """Keep what went wrong in a pass for those who ask for the state."""
        if trouble != self.state["trouble"]:
            self.state["trouble"] = trouble
            _write(self.folder, self.state)

    def count(self, site: str, number: int, to_site: int, from_site: int) -> None:
        """Add to the bytes of a site's messages in a round; kept with the next answer that is entered."""
        row = self.state["traffic"].setdefault(site, {}).setdefault(str(number), [0, 0])
        row[:] = row[0] + to_site, row[1] + from_site

    def _publish(self, number: int, waiting: list[dict[str, Any]]) -> bool:
        """Consolidate what counts in a round into the next prior (Eq. 17; S = the posteriors received)."""
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
        _write(self.folder, self.state)
        return True

    def _enter(self, site: str, content: bytes) -> None:
        """Keep a posterior's file and note it, or note why not."""
        if digest(content) in self.question(site)["settled"]:
            return  # sent again, because our receipt was lost
        row = {"site": site, "file_sha256": digest(content), "received": _now().isoformat(), "bytes": len(content)}
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
            mine = [row for row in self.state["refused"] if row["site"] == site]
            if len(mine) > _REFUSED:
                self.state["refused"].remove(mine[0])
        finally:
            incoming.unlink(missing_ok=True)

    def _checked(self, site: str, incoming: Path) -> dict[str, Any]:
        """What the books tell of a posterior, if it belongs; `_Refused` if not.

        The round that it would close is consolidated on trial: what is let in here must not stop `advance` later.
        """
        with _blamed_on(site, incoming):
            posterior = Posterior.load(incoming)
            row = {"round": self._round_of(posterior), "prior_sha256": posterior.metadata["prior_sha256"]}
            row |= {"sha256": posterior.sha256, "n_volumes": posterior.metadata.get("n_volumes")}
        trial = Consolidation(self._prior(row["round"])).tempered(self.project["temper"])
        with _blamed_on(site, incoming):
            self._check(site, row, posterior)
            trial.add(posterior)
            trial.posterior()
            _check_reach(posterior, trial.prior)
        return row

    def _round_of(self, posterior: Posterior) -> int:
        """The round of the prior that a posterior was trained from: its key, whatever the site says."""
        trained_from = posterior.metadata.get("prior_sha256")
        opened = self.state["priors"][: self.project["rounds"]]
        if trained_from not in opened:
            raise InputError(f"{posterior.name}: was trained from prior {str(trained_from)[:12]}, none of ours")
        return opened.index(trained_from) + 1

    def _check(self, site: str, row: dict[str, Any], posterior: Posterior) -> None:
        """Refuse what would count a site's scans twice, and a header with more in it than was agreed on."""
        if odd := sorted(posterior.metadata.keys() - HEADER):
            raise InputError(f"{posterior.name}: its header has {odd[0]!r}; hand in what dwc train wrote, and no more")
        for other in self.state["posteriors"]:
            if other["site"] == site and other["round"] == row["round"]:
                raise InputError(f"{posterior.name}: another one of round {row['round']} is in; a site counts once")
            if other["site"] == site and other["round"] > row["round"]:
                raise InputError(f"{posterior.name}: of round {row['round']}, but one of round {other['round']} is in")
            if other["sha256"] == row["sha256"]:
                raise InputError(f"{posterior.name}: is the posterior of {other['site']}; each counts once")

    def _content(self, number: int) -> bytes:
        """A round's prior as a file's bytes, in memory once for all sites that ask."""
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
    """What a site has handed in does not belong."""


@contextmanager
def _blamed_on(site: str, incoming: Path) -> Iterator[None]:
    """What is wrong with a file is its site's to mend, in words that name no path of ours; a failing disk is not."""
    try:
        yield
    except InputError as error:
        if isinstance(error.__cause__, OSError):
            raise
        reason = str(error).replace(str(incoming), f"{site}'s posterior").replace(f"{incoming.parent}/", "")
        raise _Refused(one_line(reason)) from error


def _check_reach(posterior: Posterior, prior: Posterior) -> None:
    """Refuse values so large or small that, with those of other sites, they leave the range of fp32."""
    for name, sigma_0 in prior.sigma.items():
        shift = (posterior.mu[name].double() - prior.mu[name]).abs()
        if (shift > _FAR * sigma_0).any() or (posterior.sigma[name] < sigma_0 / _FAR).any():
            raise InputError(
                f"{posterior.name}: {name} is more than {_FAR:g} sigmas from the prior, or as much surer; train again"
            )


def _quorum_since(state: Mapping[str, Any]) -> str | None:
    """When the posterior arrived with which the open round had its quorum; None if it has none."""
    number, quorum = len(state["priors"]), state["project"]["quorum"]
    received = sorted(row["received"] for row in state["posteriors"] if row["round"] == number)
    return received[quorum - 1] if len(received) >= quorum else None


def _write(folder: Path, state: Mapping[str, Any]) -> None:
    write_whole(folder / "state.json", json.dumps(state, indent=2).encode())


def _now() -> datetime:
    return datetime.now(timezone.utc).replace(microsecond=0)
