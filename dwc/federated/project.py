"""What a consortium agrees on before it starts: the settings of `project.yml`, and the checks that need no other file.

Who takes part, from which prior, for how many rounds, and when a round may go on without a site. Where a site's scans
lie and how it trains on them is not in here: that stays at the site.
"""

import math
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from dwc.base.errors import InputError
from dwc.training.settings import TrainSettings

__all__ = ["OWN", "Project"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,62}")  # of a certificate, a host and a file
_LOCAL = ("mode", "data", "out", "prior", "init", "cache_dir", "workers", "device", "stream")
# What a site may set for itself: where and how it computes, nothing that decides what comes out.
OWN = ("device", "workers", "cache_dir", "activation_checkpointing", "label_map")


@dataclass(frozen=True)
class Project:
    """A consortium's agreement.

    Parameters
    ----------
    name
        Of the project.
    server
        Host name of the server, as the sites reach it; its certificate bears it.
    sites
        Names of the sites; each gets a start-up kit, and nobody else is let in.
    prior
        Bayesian posterior that the first round starts from, relative to project.yml.
    rounds
        How many.
    quorum
        Posteriors with which a round may close. By default those of all sites.
    grace_hours
        How long a round that has its quorum waits for the other sites.
    port
        The one port that the server listens on.
    organizer
        Who runs the server, as an e-mail address.
    certificate_years
        For how long the kits are valid.
    temper
        lambda of the consolidation, see `dwc consolidate --help`.
    answer_timeout_s
        How long one exchange waits for a site: for its posterior over its own link, or for those of all sites over the
        server's, whichever takes longer; for no training.
    training
        Settings of `dwc train` that the sites share, such as epochs and lr; they go into each site's kit.
    """

    name: str
    server: str
    sites: list[str]
    prior: Path
    rounds: int = 1
    quorum: int | None = None
    grace_hours: float = 0.0
    port: int = 8002
    organizer: str = "organizer@dwc.org"
    certificate_years: float = 10.0
    temper: float = 1.0
    answer_timeout_s: float = 600.0
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.quorum is None:
            object.__setattr__(self, "quorum", len(self.sites))

    def check(self) -> "Project":
        """Return itself, or refuse what cannot be meant.

        Raises
        ------
        InputError
            Naming the entry, its value and the remedy.
        """
        for name in (self.name, self.server, *self.sites):
            if not _NAME.fullmatch(name):
                raise InputError(f"name {name!r}: give letters, digits, points and dashes, at most 63")
        names = [name.lower() for name in (*self.sites, self.server, "server", "simulator")]
        if twice := [name for name in self.sites if names.count(name.lower()) > 1]:
            raise InputError(f"sites: the name {twice[0]!r} is taken; give each site its own")
        if not 1 <= self.quorum <= len(self.sites):
            raise InputError(f"quorum {self.quorum}: give 1 to {len(self.sites)}, the number of sites")
        if not 1 <= self.port <= 65535:
            raise InputError(f"port {self.port}: give 1 to 65535")
        if "@" not in self.organizer:
            raise InputError(f"organizer {self.organizer!r}: give an e-mail address")
        for name in ("rounds", "certificate_years", "temper", "answer_timeout_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} {getattr(self, name)}: give a positive number")
        if not 0 <= self.grace_hours < math.inf:
            raise InputError(f"grace_hours {self.grace_hours}: give 0 or more")
        shared = {item.name for item in fields(TrainSettings)} - {*_LOCAL}
        if odd := sorted(self.training.keys() - shared):
            raise InputError(f"training: {odd[0]!r} is no setting that sites share; see dwc train --help")
        return self

    def to_json(self) -> dict[str, Any]:
        """The agreement as plain values."""
        return {**asdict(self), "prior": str(self.prior)}
