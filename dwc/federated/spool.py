"""A site's folder of work: priors that came in, the trainer that works on one of them, posteriors that go out.

Each round has a folder, `round-1-<prior>/`, with the prior, the run folder of `dwc train`, its log and the lock that
the trainer holds while it lives. The trainer is a process group of its own: it outlives whoever started it, and is
started again, to resume, if it ends without a posterior. A site works on one round at a time, the oldest first. What
has been handed in the server's books tell, not this folder; a round that a person gives up has a file `given-up`.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dwc.errors import InputError
from dwc.federated.wire import QUESTION, check, digest
from dwc.files import open_folder, sweep, write_whole
from dwc.lock import held, start_once
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
        except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
            raise InputError(f"{path}: cannot be read ({error}); write it with dwc federated join") from error

    @classmethod
    def create(cls, folder: Path, arguments: list[str], command: list[str] | None = None) -> "Spool":
        """Make the folder.

        Parameters
        ----------
        folder : Path
            Where.
        arguments : list of str
            Of `dwc train`; the prior, the run folder and the site's stream of noise are added to them.
        command : list of str, optional
            What they are given to, and what must last as long as the training does: ``sbatch --wait job.sh``,
            ``systemd-run --user --scope dwc train``, ``torchrun --nproc-per-node 4 -m dwc.train``. By default
            `TRAINER`.

        Raises
        ------
        InputError
            If it cannot be written.
        """
        open_folder(folder)
        site = {"command": list(command or TRAINER), "arguments": list(arguments)}
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
                return _answer(self._train(task), key)
            content = path.read_bytes()
            if (reason := question["settled"].get(digest(content))) is None:
                return _answer("trained", key) | {"posterior": content}
            if reason:
                write_whole(task / "refused", reason.encode())  # for people
        wanted = question["round"] and not (self._task(question) / "task.json").exists()
        return _answer("no prior" if wanted else "idle", question)

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
        words = [*self._command, "--stream", stream_of(self.name), "--prior", task / "prior.safetensors"]
        words += ["--out", task / "run", "--resume"]
        (task / "run").mkdir(exist_ok=True)  # --resume wants a folder; a person may have taken it away to start anew
        trainer = start_once(words, task / "trainer.lock", task / "trainer.log", cwd=self.folder)
        return "training" if trainer is None else "started"


def _answer(state: str, key: Mapping[str, Any]) -> dict[str, Any]:
    return {"state": state, "round": key["round"], "prior_sha256": key["prior_sha256"]}
