"""A site's folder of work: priors that came in, the trainer that works on one of them, posteriors that go out.

Each round has a folder, `round-1-<prior>/`, with the prior, the run folder of `dwc train`, its log and the lock that
the trainer holds while it lives. The trainer is a process group of its own: it outlives whoever started it, and is
started again, to resume, if it ends without a posterior. A site works on one round at a time, the oldest first. What
has been handed in the server's books tell, not this folder; a round that a person gives up has a file `given-up`.

A round is trained on the scans that are the site's when it begins, and `scans.json` in its folder names them by their
content: scans that have counted in one round are not trained on in another, unless a person says so.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from dwc.base.errors import InputError
from dwc.base.files import open_folder, sweep, write_whole
from dwc.base.locks import held
from dwc.base.processes import start_once
from dwc.data.cache import digest_of_scans
from dwc.data.manifest import Scan, as_csv
from dwc.federated.wire import QUESTION, check, digest
from dwc.posterior import Posterior

__all__ = ["TRAINER", "Spool", "stream_of"]

TRAINER = (sys.executable, "-m", "dwc.train")


def stream_of(site: str) -> int:
    """The stream of noise that is a site's own: all sites train under one seed, as it splits their scans too."""
    return int(digest(site.encode())[:8], 16)


class Spool:
    """A site's folder.

    Parameters
    ----------
    folder : Path
        With `site.yml` in it, as `Spool.create` writes it.
    name : str
        The site's, as its certificate has it.

    Raises
    ------
    InputError
        If it has none.
    """

    def __init__(self, folder: Path, name: str = "") -> None:
        self.folder, self.name = folder, name
        path = folder / "site.yml"
        try:
            self.site = yaml.safe_load(path.read_text(encoding="utf-8"))
            self._command = [*self.site["command"], *self.site["arguments"]]
            self._begun_with = {name: self.site[name] for name in ("data", "scans")}
        except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
            raise InputError(f"{path}: cannot be read ({error}); write it with dwc federated join") from error

    @classmethod
    def create(
        cls,
        folder: Path,
        arguments: list[str],
        command: list[str] | None = None,
        *,
        scans: Sequence[Scan] = (),
        again: bool = False,
    ) -> "Spool":
        """Make the folder, or change what the rounds that have not begun yet are trained on.

        Parameters
        ----------
        folder : Path
            Where.
        arguments : list of str
            Of `dwc train`; the scans, the prior, the run folder and the site's stream of noise are added to them.
        command : list of str, optional
            What they are given to, and what must last as long as the training does: ``sbatch --wait /srv/job.sh``,
            ``systemd-run --user --scope dwc train``, ``torchrun --standalone --nproc-per-node=4 -m dwc.train``. By
            default `TRAINER`.
        scans : sequence of Scan
            The site's, of both parts of the split; each one to train on is read once, to know it by its content.
        again : bool
            Whether rounds may be trained on scans that have counted in one before.

        Raises
        ------
        InputError
            If it cannot be written, a scan cannot be read, or one has counted already.
        """
        open_folder(folder)
        to_train = [replace(scan, label=None) for scan in scans if scan.split == "train"]  # the same with other labels
        known = [digest_of_scans([scan], folder / "cache") for scan in to_train]
        if (n := len(_counted(folder).intersection(known))) and not again:
            raise InputError(
                f"{folder}: {n} of {len(known)} scans have counted in an earlier round; give others, or --again true"
            )
        data = None
        if scans:  # kept, so that a round goes on with what it began with, whatever becomes of the manifest
            manifest = as_csv(scans)
            data = str(folder / f"scans-{digest(manifest)[:12]}.csv")
            write_whole(data, manifest)
        site = {"command": list(command or TRAINER), "arguments": list(arguments)}
        site |= {"data": data, "scans": known, "again": again}
        write_whole(folder / "site.yml", yaml.safe_dump(site, sort_keys=False).encode())
        return cls(folder)

    def answer(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Do what a question asks for and say how far the site is, within seconds: `wire.ANSWER`.

        Raises
        ------
        InputError
            If the message is none of ours, its prior is not the one it names, or the folder cannot be written.
        """
        question = check(question, QUESTION)
        with held(self.folder / "lock") as alone:
            if not alone:  # another exchange that has not ended yet does this
                return _answer("idle", question)
            for place in (self.folder, *self._tasks()):
                sweep(place)
            if "prior" in question:
                self._take(question)
            return self._next(question)

    def _next(self, question: Mapping[str, Any]) -> dict[str, Any]:
        for task in self._tasks():
            key = json.loads((task / "task.json").read_text(encoding="utf-8"))
            if (task / "given-up").exists():
                continue
            path = task / "run" / "posterior.safetensors"
            if not path.exists():
                if not (task / "run").exists() and self._lacks_scans():
                    return _answer("no scans", key)
                return _answer(self._train(task), key)
            content = path.read_bytes()
            if (reason := question["settled"].get(digest(content))) is None:
                return _answer("trained", key) | {"posterior": content}
            if reason:
                write_whole(task / "refused", reason.encode())  # for people
        wanted = question["round"] and not (self._task(question) / "task.json").exists()
        if not wanted:
            return _answer("idle", question)
        return _answer("no scans" if self._lacks_scans() else "no prior", question)

    def _lacks_scans(self) -> bool:
        """Whether a round that began now would count scans a second time, and nobody has said that it may."""
        return not self.site["again"] and not _counted(self.folder).isdisjoint(self.site["scans"])

    def _task(self, question: Mapping[str, Any]) -> Path:
        return self.folder / f"round-{question['round']}-{question['prior_sha256'][:12]}"

    def _tasks(self) -> list[Path]:
        """The rounds that have begun here, the oldest first."""
        begun = [path.parent for path in self.folder.glob("round-*/task.json")]
        return sorted(begun, key=lambda task: (task / "task.json").stat().st_mtime_ns)

    def _take(self, question: Mapping[str, Any]) -> None:
        """Keep a prior that came in; `task.json` is written last, and makes it a task."""
        task = self._task(question)
        if (task / "task.json").exists():
            return
        task.mkdir(parents=True, exist_ok=True)
        write_whole(task / "prior.safetensors", question["prior"])
        found = Posterior.load(task / "prior.safetensors").sha256
        if found != question["prior_sha256"]:
            raise InputError(f"{task / 'prior.safetensors'}: is {found[:12]}, not what the message names; ask again")
        key = {name: question[name] for name in ("round", "prior_sha256")}
        write_whole(task / "task.json", json.dumps(key).encode())

    def _train(self, task: Path) -> str:
        """Start the trainer, unless it runs."""
        if not (task / "run").exists():  # it begins, or a person has taken it away to begin anew
            write_whole(task / "scans.json", json.dumps(self._begun_with).encode())
            (task / "run").mkdir()
        data = json.loads((task / "scans.json").read_text(encoding="utf-8"))["data"]
        words = [*self._command, *(["--data", data] if data else []), "--stream", stream_of(self.name)]
        words += ["--prior", task / "prior.safetensors", "--out", task / "run", "--resume"]
        trainer = start_once(words, task / "trainer.lock", task / "trainer.log", cwd=self.folder)
        return "training" if trainer is None else "started"


def _counted(folder: Path) -> set[str]:
    """The scans of rounds that have a posterior, by their content; of one that was refused none has counted."""
    done = [path.parents[1] for path in folder.glob("round-*/run/posterior.safetensors")]
    entered = [task / "scans.json" for task in done if not (task / "refused").exists()]
    return {scan for path in entered for scan in json.loads(path.read_text(encoding="utf-8"))["scans"]}


def _answer(state: str, key: Mapping[str, Any]) -> dict[str, Any]:
    return {"state": state, "round": key["round"], "prior_sha256": key["prior_sha256"]}
