"""What the organization's held-out scans say about a round before it is published: in a process of its own.

Scoring takes longer than a pass over the sites may. The pass writes what is to be judged, `judging.json`, and starts
the process; a later pass finds the verdict, `verdict.json`. A process that was killed is started again.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dwc.base.devices import choose_device
from dwc.base.errors import InputError, one_line
from dwc.base.files import canonical_json, write_whole
from dwc.base.processes import start_once
from dwc.damping import choose_damping, doubled
from dwc.federated.networks import network, network_file, round_of_factors
from dwc.federated.server_state import n_expected, read_state
from dwc.federated.wire import digest
from dwc.held_out import HeldOut
from dwc.posterior import Posterior

__all__ = ["judge", "verdict_on"]

_SUB_VOLUMES = 64


class _Verdict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    question: str
    error: str = ""
    damping: Annotated[float, Field(gt=0, le=1)] = 1.0
    log_likelihood: float = 0.0
    gain: float = 0.0
    standard_error: Annotated[float, Field(ge=0)] = 0.0


def verdict_on(
    folder: Path, state: Mapping[str, Any], number: int, answers: Sequence[Mapping[str, Any]], *, wait: bool
) -> dict[str, float] | None:
    """Damping, log-likelihood, gain and standard error of a round with these answers; None if they are not known yet.

    Parameters
    ----------
    folder, state
        The server's.
    number : int
        The round.
    answers : sequence of dict
        Site, round, file, digest and power of each posterior that enters.
    wait : bool
        Judge here and now.
    """
    asked = {
        "number": number, "answers": answers, "n_sites": n_expected(state), "banned": state["banned"],
        "priors": state["priors"][:number],
        **{name: state["project"][name] for name in ("damping", "data")},
    }  # fmt: skip
    question = digest(canonical_json(asked).encode())
    verdict = _read(folder)
    if verdict is None or verdict.question != question:
        write_whole(folder / "judging.json", json.dumps({**asked, "question": question}).encode())
        if not wait:
            words: list[str | Path] = [sys.executable, "-m", "dwc.federated.judging", folder]
            start_once(words, folder / "judging.lock", folder / "judging.log")
            return None
        judge(folder)
        verdict = _read(folder)
    assert verdict is not None
    if verdict.error:
        (folder / "verdict.json").unlink()  # the next pass tries again
        raise InputError(verdict.error)
    return verdict.model_dump(exclude={"question", "error"})


def judge(folder: Path) -> None:
    """Answer `judging.json`; an error becomes the verdict, so that the next pass tells it."""
    asked = json.loads((folder / "judging.json").read_text(encoding="utf-8"))
    verdict = {"question": asked["question"]}
    try:
        verdict |= _scores(folder, asked)
    except Exception as error:
        reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        verdict["error"] = one_line(reason) or type(error).__name__
    write_whole(folder / "verdict.json", json.dumps(verdict).encode())


def _scores(folder: Path, asked: Mapping[str, Any]) -> dict[str, float]:
    state, number = read_state(folder), asked["number"]
    held_out = HeldOut.of(Path(asked["data"]), network_file(folder, 1))
    answers = ((row, Posterior.load(folder / row["file"]), row["power"]) for row in asked["answers"])
    after, _ = round_of_factors(folder, state, number, answers)
    n_sites, damping = max(1, asked["n_sites"]), asked["damping"]
    dampings = doubled(n_sites) if damping == "auto" else [damping or 1 / n_sites]
    data, device = held_out.prepare(folder / "cache"), choose_device("auto")
    before = network(folder, state, number)
    trial = choose_damping(before, after, dampings, data, at_most=_SUB_VOLUMES, device=device).trial
    names = ("damping", "log_likelihood", "gain", "standard_error")
    return {name: getattr(trial, name) for name in names}


def _read(folder: Path) -> _Verdict | None:
    """The last verdict; None if there is none, or it was damaged."""
    try:
        return _Verdict.model_validate_json((folder / "verdict.json").read_bytes())
    except (OSError, ValidationError):
        return None


if __name__ == "__main__":
    judge(Path(sys.argv[1]))
