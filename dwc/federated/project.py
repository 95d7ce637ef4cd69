"""A consortium's agreement, `project.yml`: who takes part, from which prior, for how many rounds.

Where a site's scans are and how it computes is not part of it.
"""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from dwc.base.errors import InputError
from dwc.base.settings import Settings
from dwc.training.settings import TrainSettings

__all__ = ["OWN", "Project", "folder_in"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,62}")  # valid in a certificate, as a host and as a file name
_LOCAL = ("mode", "data", "out", "prior", "init", "cache_dir", "workers", "device", "stream")
OWN = ("device", "workers", "cache_dir", "activation_checkpointing", "label_map")  # settings that a site chooses


@dataclass(frozen=True)
class Project(Settings):
    """A consortium's agreement.

    Parameters
    ----------
    name
        Name of the project.
    server
        Host name of the server, as the sites reach it; part of its certificate.
    sites
        Names of the sites; each gets a start-up kit.
    prior
        Bayesian posterior that round 1 starts from, relative to project.yml.
    rounds
        Number of rounds; the greatest one if `until` is given.
    quorum
        Number of posteriors with which a round may close; by default one of every site. With fewer than three, nobody's
        influence is limited.
    grace_hours
        How long a round that has its quorum waits for the other sites.
    port
        The one port that the server listens on.
    organizer
        E-mail address of whoever runs the server.
    certificate_years
        How long the kits are valid.
    method
        ``pvi``: rounds on the same scans, in which each site's new factor replaces its old one. ``dwc``: the paper's
        cycle, in which each round multiplies the network by the likelihood of new scans.
    damping
        For pvi: share of a new factor, above 0 and at most 1. If left out, 1/S for the S sites that are not banned;
        ``auto`` doubles it from there while the held-out scans of `data` get more likely.
    data
        For pvi: manifest of the organization that made the prior, at the server and relative to project.yml. Each
        round is judged by its held-out scans before it is published, and one that makes them less likely is told.
    until
        For pvi: end before the last of `rounds` when the network's change is below this: the mean over the weights of
        |mu_new - mu_old| / sigma_old.
    temper
        For dwc: lambda of the consolidation, see `dwc consolidate --help`.
    max_influence
        Limit of a site's precision and pull on the means, as a multiple of the median site's; null switches it off. It
        needs three sites.
    trusted
        Folder of public keys, `<site>.pem`, relative to project.yml; if given, every posterior must be signed by its
        site, see `dwc posterior sign`.
    answer_timeout_s
        Timeout of one message: a posterior over a site's link, or those of all sites over the server's, whichever
        takes longer. Training does not count.
    training
        Settings of `dwc train` that all sites share, such as epochs and lr; part of each site's kit.
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
    method: Literal["pvi", "dwc"] = "pvi"
    damping: float | Literal["auto"] | None = None
    data: Path | None = None
    until: float | None = None
    temper: float = 1.0
    max_influence: float | None = 3.0
    trusted: Path | None = None
    answer_timeout_s: float = 600.0
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("rounds", "certificate_years", "temper", "answer_timeout_s", "max_influence", "until")
        self._check_method()
        self._require("grace_hours", self.grace_hours >= 0, "give 0 or more")
        self._require("grace_hours", self.grace_hours <= 1e6, "give a million or less")
        self._require("answer_timeout_s", self.answer_timeout_s <= 1e6, "give a million or less")
        self._require("certificate_years", self.certificate_years <= 1000, "give 1000 or less")
        self._require("port", 1 <= self.port <= 65535, "give 1 to 65535")
        self._require("organizer", "@" in self.organizer, "give an e-mail address")
        self._check_names()
        n_sites = len(self.sites)
        if self.quorum is None:
            object.__setattr__(self, "quorum", n_sites)
        self._require("quorum", 1 <= (self.quorum or 0) <= n_sites, f"give 1 to {n_sites}, the number of sites")
        self._check_training()

    def _check_method(self) -> None:
        if self.method == "dwc":
            for name in ("damping", "data", "until"):
                self._require(name, getattr(self, name) is None, "is for `method` pvi; leave it out")
            return
        self._require("temper", self.temper == 1, "is for `method` dwc; use `damping`, which also averages the sites")
        if self.damping == "auto":
            self._require("damping", self.data is not None, "needs scans to choose on; give `data`, or a number")
        elif self.damping is not None:
            self._require("damping", 0 < self.damping <= 1, "give a number above 0 and at most 1")

    def _check_names(self) -> None:
        self._require("sites", len(self.sites) > 0, "give at least one name")
        for key, name in (("name", self.name), ("server", self.server), *(("sites", site) for site in self.sites)):
            if not _NAME.fullmatch(name):
                raise InputError(f"`{key}` {name!r}: give letters, digits, points and dashes, at most 63")
        names = [name.lower() for name in (*self.sites, self.server, "server", "simulator")]
        if twice := [name for name in self.sites if names.count(name.lower()) > 1]:
            raise InputError(f"`sites`: the name {twice[0]!r} is taken; give each site its own")

    def _check_training(self) -> None:
        shared = {item.name for item in fields(TrainSettings)} - {*_LOCAL}
        if odd := sorted(self.training.keys() - shared):
            raise InputError(f"`training`: {odd[0]!r} is not a setting that sites share; see dwc train --help")
        try:
            TrainSettings(mode="vcl", data=Path("data"), out=Path("run"), prior=self.prior, **self.training)
        except InputError as error:
            raise InputError(f"`training`: {str(error).replace('`', '')}") from error


def folder_in(kit: Path) -> Path:
    """The folder in a start-up kit that holds a participant's part of the cycle."""
    return kit / "cycle"
