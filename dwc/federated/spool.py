"""A site's side of the cycle: a folder of priors received, trainings and posteriors to send.

Each round has a folder, `round-1-<prior>/`, with the prior, the run folder of `dwc train`, its log and the lock that
the trainer holds while it runs. The trainer is a detached process; if it ends without a posterior, it is started again
and resumes. A site works on one round at a time, the oldest first. Which posteriors the server has is known from its
questions alone; a file `given-up` in a round's folder skips the round.

A round is trained on the scans that the site has when it begins; `scans.json` lists their content digests. With method
dwc, scans that have counted in one round are not used in another, unless `again` is set. With method pvi the same scans
are used in each round: the prior is the site's cavity, and the site computes what it starts from, the whole network,
from the cavity and its own earlier answers.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from dwc.base.errors import InputError, one_line
from dwc.base.files import open_folder, sweep, write_whole
from dwc.base.locks import held
from dwc.base.processes import rotate, start_once
from dwc.data.cache import digest_of_scans
from dwc.data.manifest import Scan, as_csv
from dwc.federated.wire import QUESTION, check, digest
from dwc.posterior import Posterior
from dwc.signing import sign
from dwc.site_factors import Factors

__all__ = ["TRAINER", "Spool", "stream_of"]

_KEPT = ("task.json", "scans.json", "refused", "given-up", "trainer.lock")  # of a round, by `Spool.prune`
TRAINER = (sys.executable, "-m", "dwc.train")


def stream_of(site: str) -> int:
    """A site's own noise stream: all sites share one seed, which also splits their scans."""
    return int(digest(site.encode())[:8], 16)


class _Kept(BaseModel):
    """What the site's folder keeps; the types are checked, because people can edit it."""

    model_config = ConfigDict(strict=True)


class _Scans(_Kept):
    data: str | None = None
    scans: list[str]


class _Site(_Scans):
    command: list[str]
    arguments: list[str]
    again: bool
    key: str | None = None
    method: Literal["dwc", "pvi"] = "dwc"


class _Task(_Kept):
    round: int
    prior_sha256: str


class Spool:
    """A site's folder.

    Parameters
    ----------
    folder : Path
        Made by `Spool.create`.
    name : str
        The site's name in its certificate.
    """

    def __init__(self, folder: Path, name: str = "") -> None:
        self.folder, self.name = folder, name
        self.site = _read(folder / "site.yml", _Site, "write it with dwc federated join")
        self._command = [*self.site["command"], *self.site["arguments"]]
        self._begun_with = {name: self.site[name] for name in ("data", "scans")}

    @classmethod
    def create(
        cls,
        folder: Path,
        arguments: list[str],
        command: list[str] | None = None,
        *,
        scans: Sequence[Scan] = (),
        again: bool = False,
        key: Path | None = None,
        method: str = "dwc",
    ) -> "Spool":
        """Make the folder, or change what future rounds are trained on.

        Parameters
        ----------
        folder : Path
            The site's folder.
        arguments : list of str
            Arguments of `dwc train`; scans, prior, run folder and noise stream are added.
        command : list of str, optional
            The program that runs `dwc train` with these arguments; it must not end before the training does:
            ``sbatch --wait /srv/job.sh``, ``torchrun --standalone --nproc-per-node=4 -m dwc.train``. Default `TRAINER`.
        scans : sequence of Scan
            Training and test scans of the site; training images are read once, for their digests.
        again : bool
            Allow rounds on scans that have counted before.
        key : Path, optional
            Private key to sign posteriors with, see `dwc.signing`.
        method : {"dwc", "pvi"}
            The consortium's; scans may not count twice with dwc.
        """
        open_folder(folder)
        to_train = [
            replace(scan, label=None) for scan in scans if scan.split == "train"
        ]  # other labels do not make it another scan
        known = [digest_of_scans([scan], folder / "cache") for scan in to_train]
        if method == "dwc" and not again and (n := len(_counted(folder).intersection(known))):
            raise InputError(
                f"{folder}: {n} of {len(known)} scans have counted in an earlier round; give others, or set `again`"
            )
        data = None
        if scans:  # a copy, so that a round that has begun keeps its scans if the manifest changes
            manifest = as_csv(scans)
            data = str(folder / f"scans-{digest(manifest)[:12]}.csv")
            write_whole(data, manifest)
        site: dict[str, Any] = {"command": list(command or TRAINER), "arguments": list(arguments)}
        site |= {"data": data, "scans": known, "again": again, "key": None if key is None else str(key)}
        site["method"] = method
        write_whole(folder / "site.yml", yaml.safe_dump(site, sort_keys=False).encode())
        return cls(folder)

    def answer(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Answer a question, `wire.QUESTION`, within seconds; starts the trainer if need be. Returns `wire.ANSWER`."""
        question = check(question, QUESTION)
        with held(self.folder / "lock") as alone:
            if not alone:  # another exchange is still doing it
                return _answer("idle", question)
            for place in (self.folder, *self._tasks()):
                sweep(place)
                rotate(place / "trainer.log")
            if "prior" in question and not self._take(question):
                return _answer("no start", question)
            return self._next(question)

    def prune(self) -> int:
        """Delete what finished rounds no longer need, checkpoints above all; returns the bytes freed.

        Kept are the posteriors and the digests of the scans, by which counted scans and settled rounds are known, and
        with method pvi the priors, which the next start is computed from.
        """
        freed = 0
        kept = (*_KEPT, "prior.safetensors") if self.site["method"] == "pvi" else _KEPT
        for task in self._tasks():
            posterior = task / "run" / "posterior.safetensors"
            with held(task / "trainer.lock") as ended:
                if not ended or not posterior.exists():
                    continue
                keep = {posterior, *(task / name for name in kept)}
                for path in [path for path in task.rglob("*") if path.is_file() and path not in keep]:
                    freed += path.stat().st_size
                    path.unlink()
        return freed

    def _next(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Work on the oldest round that is not settled, or ask for the open round's prior."""
        for task in self._tasks():
            key = _read(task / "task.json", _Task, f"remove {task} to begin this round again")
            if (task / "given-up").exists():
                continue
            path = task / "run" / "posterior.safetensors"
            if not path.exists():
                if not (task / "run").exists() and self._lacks_scans():
                    return _answer("no scans", key)
                return _answer(self._train(task), key)
            self._sign(path)
            content = path.read_bytes()
            if (reason := question["settled"].get(digest(content))) is None:
                return _answer("trained", key) | {"posterior": content}
            if reason:
                write_whole(task / "refused", reason.encode())  # to be read by people
            else:
                (task / "refused").unlink(missing_ok=True)  # it counts again
        wanted = question["round"] and not (self._task(question) / "task.json").exists()
        if not wanted:
            return _answer("idle", question)
        return _answer("no scans" if self._lacks_scans() else "no prior", question)

    def _sign(self, path: Path) -> None:
        """Sign a posterior with the site's key, unless it is signed."""
        if key := self.site.get("key"):
            posterior = Posterior.load(path)
            if not posterior.signature:
                sign(posterior, Path(key)).save(path)

    def _lacks_scans(self) -> bool:
        """Whether a round that began now would count scans twice, without `again`."""
        return (
            self.site["method"] == "dwc"
            and not self.site["again"]
            and not _counted(self.folder).isdisjoint(self.site["scans"])
        )

    def _task(self, question: Mapping[str, Any]) -> Path:
        return self.folder / f"round-{question['round']}-{question['prior_sha256'][:12]}"

    def _tasks(self) -> list[Path]:
        """Folders of the rounds that have begun here, the oldest first."""
        begun = [path.parent for path in self.folder.glob("round-*/task.json")]
        return sorted(begun, key=lambda task: (task / "task.json").stat().st_mtime_ns)

    def _take(self, question: Mapping[str, Any]) -> bool:
        """Keep a prior that was sent; `task.json` is written last and makes it a task. False without its start."""
        task = self._task(question)
        if (task / "task.json").exists():
            return True
        task.mkdir(parents=True, exist_ok=True)
        prior = _kept(task / "prior.safetensors", question["prior"], question["prior_sha256"])
        if expected := question["start_sha256"]:
            if "start" in question:
                _kept(task / "start.safetensors", question["start"], expected)
            elif (start := self._start(prior, question["entered"])) and start.sha256 == expected:
                start.save(task / "start.safetensors")
            else:
                return False
        key = {name: question[name] for name in ("round", "prior_sha256")}
        write_whole(task / "task.json", json.dumps(key).encode())
        return True

    def _start(self, cavity: Posterior, entered: Sequence[Mapping[str, Any]]) -> Posterior | None:
        """The network: the cavity times this site's factor, which its answers make; None if one of them is gone."""
        own = Factors(cavity)
        with suppress(InputError):  # damaged here
            for row in entered:
                task = self._task(row)
                posterior = task / "run" / "posterior.safetensors"
                if not posterior.exists() or digest(posterior.read_bytes()) != row["file_sha256"]:
                    return None
                before, shares = Posterior.load(task / "prior.safetensors"), (row["damping"], row["power"])
                own.replace(self.name, Posterior.load(posterior), cavity=before, damping=shares[0], power=shares[1])
            return own.posterior()
        return None

    def _train(self, task: Path) -> str:
        """Start the trainer unless it runs; the state to report."""
        if not (task / "run").exists():  # a new round, or one whose run was removed to start over
            write_whole(task / "scans.json", json.dumps(self._begun_with).encode())
            (task / "run").mkdir()
        data = _scans(task)["data"]
        words = [*self._command, *(["--data", data] if data else []), "--stream", stream_of(self.name)]
        words += ["--prior", task / "prior.safetensors"]
        if (start := task / "start.safetensors").exists():
            words += ["--init", start]
        words += ["--out", task / "run", "--resume"]
        trainer = start_once(words, task / "trainer.lock", task / "trainer.log", cwd=self.folder)
        return "training" if trainer is None else "started"


def _kept(path: Path, content: bytes, sha256: str) -> Posterior:
    """Write a posterior that was sent, and read it back."""
    write_whole(path, content)
    posterior = Posterior.load(path)
    if posterior.sha256 != sha256:
        raise InputError(f"{path}: is {posterior.sha256[:12]}, not what the message names; ask again")
    return posterior


def _counted(folder: Path) -> set[str]:
    """Digests of the scans of all rounds with a posterior that was not refused."""
    done = [path.parents[1] for path in folder.glob("round-*/run/posterior.safetensors")]
    entered = [task for task in done if not (task / "refused").exists()]
    return {scan for task in entered for scan in _scans(task)["scans"]}


def _scans(task: Path) -> dict[str, Any]:
    return _read(task / "scans.json", _Scans, "restore it from a backup: it says which scans have counted")


def _read(path: Path, kind: type[_Kept], remedy: str) -> dict[str, Any]:
    """A file of the site's folder, JSON or YAML, with all its entries."""
    try:
        return kind.model_validate(yaml.safe_load(path.read_text(encoding="utf-8"))).model_dump()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{path}: cannot be read ({where}: {first['msg']}); {remedy}") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(one_line(f"{path}: cannot be read ({error}); {remedy}")) from error


def _answer(state: str, key: Mapping[str, Any]) -> dict[str, Any]:
    return {"state": state, "round": key["round"], "prior_sha256": key["prior_sha256"]}
