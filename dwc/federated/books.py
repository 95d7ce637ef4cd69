"""The types of all that is in the server's state file, so that one that was damaged or edited is refused at once."""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from dwc.base.errors import InputError
from dwc.factors import Influence
from dwc.federated.project import Project

__all__ = ["odd_entry"]


def odd_entry(state: Mapping[str, Any]) -> str | None:
    """The first entry that is missing or not of the type that everything else relies on, and why; None if all are."""
    try:
        books = _Books.model_validate(state)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = [str(part) for part in first["loc"]]
        return f"{where[0] if where else 'it'} is missing or of another type ({'.'.join(where[1:])}: {first['msg']})"
    return _odd_project(books.project) or _odd_number(books)


def _time(text: str) -> str:
    time = datetime.fromisoformat(text)
    if time.tzinfo is None or not 1970 <= time.year < 9000:
        raise ValueError("has no time zone, or is no year in which anybody sends anything")
    return text


def _inside(path: str) -> str:
    if path.startswith("/") or ".." in Path(path).parts or Path(path).suffix != ".safetensors":
        raise ValueError("is no posterior in this folder")
    return path


def _measured(values: dict[str, Any]) -> dict[str, Any]:
    Influence.from_json(values)
    return values


_OF_FACTORS = {"factors", "cavities", "starts", "removed", "damping"}  # of each network that was made of factors
_VERDICT = {"log_likelihood", "gain", "standard_error"}  # all of them or none
_Time = Annotated[str, AfterValidator(_time)]
_Count = Annotated[int, Field(ge=0, lt=2**53)]
_Round = Annotated[int, Field(ge=1, lt=2**31)]
_Bytes = Annotated[list[_Count], Field(min_length=2, max_length=2)]  # to the site and from it
_Number = Annotated[str, Field(pattern=r"^\d{1,9}$")]
_Measured = Annotated[dict[str, Any], AfterValidator(_measured)]


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class _Clock(_Entry):
    boot: str
    uptime: float
    time: _Time


class _Unset(_Entry):
    """The clock before it was first asked."""


class _Site(_Entry):
    state: str
    round: _Count
    heard: _Time | None


class _Act(_Entry):
    model_config = ConfigDict(extra="allow")

    at: _Time
    act: str


class _Posterior(_Entry):
    site: str
    round: _Round
    prior_sha256: str = ""
    file: Annotated[str, AfterValidator(_inside)]
    sha256: str
    payload_sha256: str = ""
    file_sha256: str
    received: _Time
    bytes: _Count = 0
    n_volumes: _Count | None = None
    influence: _Measured = Field(default_factory=dict)
    counted_in: _Round | None
    power: Annotated[float, Field(ge=0, le=1)] = 1.0
    limited_because: str = ""
    damaged: Literal[True] = True
    pruned: Literal[True] = True


class _Network(_Entry):
    """What is known about a network that rounds on the same scans made; empty for others."""

    factors: str = ""
    cavities: dict[str, str] = Field(default_factory=dict)
    starts: dict[str, str] = Field(default_factory=dict)
    removed: list[str] = Field(default_factory=list)
    damping: Annotated[float, Field(gt=0, le=1)] = 1.0
    change: Annotated[float, Field(ge=0)] = 0.0
    log_likelihood: float | None = None
    gain: float = 0.0
    standard_error: Annotated[float, Field(ge=0)] = 0.0


class _Refused(_Entry):
    site: str
    reason: str
    file_sha256: str
    received: str = ""
    bytes: _Count = 0
    prior_sha256: str = ""
    void: _Posterior | None = None


class _Dropped(_Entry):
    site: str
    payload_sha256: str
    influence: _Measured | None


class _Books(_Entry):
    version: int
    project: dict[str, Any]
    priors: Annotated[list[str], Field(min_length=1)]
    published: list[_Time]
    networks: list[_Network]
    clock: _Clock | _Unset
    banned: list[str]
    acts: list[_Act]
    posteriors: list[_Posterior]
    refused: list[_Refused]
    dropped: list[_Dropped]
    trouble: list[str]
    traffic: dict[
        str,
        dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[list[_Count], Field(min_length=2, max_length=2)]],
    ]
    sites: dict[str, _Site]


def _odd_project(project: dict[str, Any]) -> str | None:
    for name in Project.__dataclass_fields__:
        if name not in project:
            return f"project.{name} is missing or of another type"
    for name, kind in (("quorum", int), ("training", dict)):  # which `Project` would fill in
        if type(project[name]) is not kind:
            return f"project.{name} is of another type"
    try:
        Project(**{**project, "training": {}})  # which settings there are is a matter of the kits
    except (InputError, TypeError) as error:  # TypeError: an entry that does not exist
        return f"project is of another type ({str(error).replace('`', '')})"
    return None


def _odd_number(books: _Books) -> str | None:
    """What does not go together: rounds that have not begun, two posteriors of one site and round, other networks."""
    n_open, n_closed = len(books.priors), len(books.priors) - 1
    if n_closed > books.project["rounds"]:
        return "priors is of another length than there are rounds"
    for key in ("published", "networks"):
        if len(getattr(books, key)) != n_open:
            return f"{key} is of another length than priors"
    if books.project["method"] == "pvi":
        for number, network in enumerate(books.networks[1:], start=1):
            needed = _OF_FACTORS | (_VERDICT if network.model_fields_set & _VERDICT else set())
            if missing := sorted(needed - network.model_fields_set):
                return f"networks is wrong: {number}.{missing[0]} is missing"
            if not network.factors:
                return f"networks is wrong: {number} has no factors"
        for row in books.posteriors:
            if row.counted_in is not None and "power" not in row.model_fields_set:
                return f"posteriors is wrong: {row.file} counts without a power"
    for row in books.posteriors:
        if row.round > n_open or (row.counted_in or 0) > n_closed:
            return f"posteriors is wrong: {row.file} is of a round that has not begun"
    for key in ("file", "sha256"):
        if len({getattr(row, key) for row in books.posteriors}) < len(books.posteriors):
            return f"posteriors is wrong: two have one {key}"
    if len({(row.site, row.round) for row in books.posteriors}) < len(books.posteriors):
        return "posteriors is wrong: two are of one site and round"
    void = [entry.void for entry in books.refused if entry.void]
    influences = [row.influence for row in (*books.posteriors, *void) if row.influence]
    if len({_shape(Influence.from_json(influence)) for influence in influences}) > 1:
        return "posteriors is wrong: two influences are of different networks"
    return None


def _shape(influence: Influence) -> tuple[Any, ...]:
    return (*sorted(influence.tensors), len(influence.shift_sketch), len(influence.pull_sketch))
