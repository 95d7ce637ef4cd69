"""A cycle's networks as files, what each site trains from, and how a round's answers make the next network.

`q0.safetensors`, `q1.safetensors`, ... are the networks. Rounds on the same scans also keep the sites' factors and
cavities, in `after-<round>-<digest of the factors>/`: written before the state that mentions them, never changed.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from dwc.base.errors import InputError
from dwc.consolidation import Consolidation
from dwc.federated.server_state import n_expected, prior_sha256
from dwc.federated.wire import ENTERED
from dwc.posterior import Posterior
from dwc.site_factors import Factors

__all__ = [
    "Answer",
    "consolidated",
    "factors_after",
    "network",
    "network_file",
    "prior_file",
    "replaced",
    "round_of_factors",
    "trained_from",
]

Answer: TypeAlias = tuple[Mapping[str, Any], Posterior, float]  # its row in the state, the posterior, its power


def network_file(folder: Path, number: int) -> Path:
    """The network that a round begins with; that after the last round is the result."""
    return folder / f"q{number - 1}.safetensors"


def network(folder: Path, state: Mapping[str, Any], number: int) -> Posterior:
    """The network that a round begins with."""
    return _published(network_file(folder, number), state["priors"][number - 1])


def prior_file(folder: Path, state: Mapping[str, Any], site: str, number: int) -> Path:
    """What a site trains from in a round."""
    if site in state["networks"][number - 1].get("cavities", {}):
        return _after(folder, state, number - 1) / "cavities" / f"{site}.safetensors"
    return network_file(folder, number)


def trained_from(folder: Path, state: Mapping[str, Any], site: str, number: int) -> Posterior:
    """The prior of a site's training in a round."""
    return _published(prior_file(folder, state, site, number), prior_sha256(state, site, number))


def factors_after(folder: Path, state: Mapping[str, Any], number: int) -> Factors:
    """The sites' factors after a round; none after round 0."""
    first = network(folder, state, 1)
    if number == 0:
        return Factors(first)
    path = _after(folder, state, number) / "factors.safetensors"
    factors = Factors.load(path, first)
    if factors.sha256 != state["networks"][number]["factors"]:
        raise InputError(f"{path}: is not what was published; reopen round {number}, or restore it from a backup")
    return factors


def consolidated(
    folder: Path, state: Mapping[str, Any], number: int, answers: Iterable[Answer]
) -> tuple[Posterior, dict[str, Any]]:
    """Multiply the network by the factors of a round's answers (Eq. 17)."""
    consolidation = Consolidation(network(folder, state, number)).tempered(state["project"]["temper"])
    for row, site, power in answers:
        earlier = None if row["round"] == number else network(folder, state, row["round"])
        consolidation.add(site, prior=earlier, power=power)
    return consolidation.posterior(), {}


def round_of_factors(
    folder: Path, state: Mapping[str, Any], number: int, answers: Iterable[Answer]
) -> tuple[Callable[[float], Factors], list[str]]:
    """A function from a damping to the factors after a round with these answers, and the banned sites it takes out."""
    before = factors_after(folder, state, number - 1)
    removed = [site for site in before.sites if site in state["banned"]]
    for site in removed:
        before.remove(site)
    entering = [
        (row["site"], answer, trained_from(folder, state, row["site"], row["round"]), power)
        for row, answer, power in answers
    ]

    def after(damping: float) -> Factors:
        factors = before.copy()
        for site, answer, cavity, power in entering:
            factors.replace(site, answer, cavity=cavity, damping=damping, power=power)
        return factors

    return after, removed


def replaced(
    folder: Path,
    state: Mapping[str, Any],
    number: int,
    answers: Iterable[Answer],
    verdict: Mapping[str, float] | None = None,
) -> tuple[Posterior, dict[str, Any]]:
    """Replace the factors of the sites that answered, and write factors and cavities.

    Banned sites' factors are taken out; all others stay. The second value goes into the state, with the verdict of the
    held-out scans, which has the damping.
    """
    answers = list(answers)
    after, removed = round_of_factors(folder, state, number, answers)
    damping = verdict["damping"] if verdict else state["project"]["damping"] or 1 / max(1, n_expected(state))
    factors = after(damping)
    made = factors.posterior("consolidated")
    about: dict[str, Any] = {"factors": factors.sha256, "removed": removed, "damping": damping}
    if answers:  # a round in which all were left out says nothing about whether the network still changes
        about["change"] = made.distance(network(folder, state, number))
    about |= {"cavities": {}, "starts": {}, **(verdict or {})}
    place = _place(folder, number, factors.sha256)
    (place / "cavities").mkdir(parents=True, exist_ok=True)
    for site, cavity in factors.cavities():
        cavity.save(place / "cavities" / f"{site}.safetensors")
        about["cavities"][site] = cavity.sha256
        about["starts"][site] = factors.start(site, cavity).sha256
    factors.save(place / "factors.safetensors")
    return made, about


def entered(state: Mapping[str, Any], site: str) -> list[dict[str, Any]]:
    """The answers of which a site's factor is made, in order: `wire.ENTERED`."""
    networks = state["networks"]
    since = max((number for number, made in enumerate(networks) if site in made.get("removed", ())), default=0)
    rows = [
        {**row, "damping": networks[row["counted_in"]].get("damping", 1.0)}
        for row in sorted(state["posteriors"], key=lambda row: (row["counted_in"] or 0, row["round"]))
        if row["site"] == site and (row["counted_in"] or 0) > since and row["power"] > 0
    ]
    return [{name: row[name] for name in ENTERED} for row in rows]


def start_content(folder: Path, state: Mapping[str, Any], site: str) -> bytes:
    """The file of the network as a site computes it, for one that cannot."""
    number = len(state["priors"])
    cavity = trained_from(folder, state, site, number)
    path = folder / f".start-{site}.part"
    try:
        factors_after(folder, state, number - 1).start(site, cavity).save(path)
        return path.read_bytes()
    finally:
        path.unlink(missing_ok=True)


def unneeded(folder: Path, state: Mapping[str, Any]) -> Iterator[Path]:
    """Factors before the last closed round's and the one it was made from; cavities that no answer can come to."""
    last = len(state["priors"]) - 1
    known = {_after(folder, state, n): n for n, made in enumerate(state["networks"]) if "factors" in made}
    newest: dict[str, int] = {}  # round of each site's last answer: earlier ones are refused
    for row in state["posteriors"]:
        newest[row["site"]] = max(row["round"], newest.get(row["site"], 0))
    used = {(row["site"], row["round"]) for row in state["posteriors"] if "pruned" not in row}
    for place in folder.glob("after-*"):
        number = known.get(place)
        if number is None or number < last - 1:
            yield place / "factors.safetensors"
        for cavity in place.glob("cavities/*.safetensors"):
            site = cavity.name.removesuffix(".safetensors")
            opened = None if number is None else number + 1  # the round that it is the site's prior in
            if opened is None or (opened <= newest.get(site, 0) and (site, opened) not in used):
                yield cavity


def _place(folder: Path, number: int, sha256: str) -> Path:
    return folder / f"after-{number}-{sha256[:12]}"


def _after(folder: Path, state: Mapping[str, Any], number: int) -> Path:
    return _place(folder, number, state["networks"][number]["factors"])


def _published(path: Path, sha256: str) -> Posterior:
    posterior = Posterior.load(path)
    if posterior.sha256 != sha256:
        raise InputError(
            f"{path}: is not the prior that was published; recompute its round, or restore it from a backup"
        )
    return posterior
