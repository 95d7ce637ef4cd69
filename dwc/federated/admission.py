"""What is checked before a site's posterior is recorded. Whatever is wrong with it is this site's refusal alone."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dwc.base.errors import InputError, one_line
from dwc.consolidation import Consolidation
from dwc.factors import Influence, measure
from dwc.federated.server_state import open_round, prior_sha256
from dwc.federated.wire import HEADER
from dwc.posterior import Posterior

__all__ = ["Refused", "admit", "blamed_on", "check_size", "round_of"]

_MAX_REACH = 1e9  # shift in sigma_0, and factor by which a sigma may shrink
_MAX_EXCESS = 2**20  # bytes of a file beyond its prior's: header and padding


class Refused(InputError):
    """A site's posterior does not belong; `more` are further entries of the state about it."""

    def __init__(self, message: str, **more: str) -> None:
        super().__init__(message)
        self.more = more


@contextmanager
def blamed_on(site: str, incoming: Path) -> Iterator[None]:
    """Turn any error about a site's file into a refusal that names no path of the server; a failing disk is not one."""
    try:
        yield
    except (OSError, Refused):
        raise
    except InputError as error:
        if isinstance(error.__cause__, OSError):
            raise
        reason = str(error).replace(str(incoming), f"{site}'s posterior").replace(f"{incoming.parent}/", "")
        raise Refused(one_line(reason)) from error
    except Exception as error:  # libraries raise all kinds for files that were made to break them
        raise Refused(
            one_line(f"{site}'s posterior: cannot be handled ({type(error).__name__}: {error}); train again")
        ) from error


def check_size(site: str, content: bytes, prior: Path) -> None:
    """Refuse a file much larger than its prior's before it is written or read."""
    if len(content) > prior.stat().st_size + _MAX_EXCESS:
        raise Refused(f"{site}'s posterior: has {len(content)} bytes, many more than its prior; train again")


def round_of(state: Mapping[str, Any], site: str, posterior: Posterior, claimed: int) -> int:
    """The round of the prior that a posterior was trained from.

    A site's cavity is the same in two rounds if no other site has answered between them: then the round that the site
    claims, or else the last.
    """
    trained_from = str(posterior.metadata.get("prior_sha256"))
    begun = open_round(state) or len(state["priors"]) - 1
    rounds = [number for number in range(1, begun + 1) if prior_sha256(state, site, number) == trained_from]
    if not rounds:
        reason = f"was trained from prior {trained_from[:12]}, which no round had; train from the one that was sent"
        raise Refused(one_line(f"{site}'s posterior: {reason}"), prior_sha256=trained_from)
    return claimed if claimed in rounds else rounds[-1]


def admit(
    state: Mapping[str, Any],
    site: str,
    row: Mapping[str, Any],
    posterior: Posterior,
    prior: Posterior,
    others: Mapping[str, Influence],
) -> dict[str, Any]:
    """Check a posterior against the prior that it was trained from and the round's other sites, and measure it.

    It is consolidated alone as a trial, so that what is accepted here does not stop the round from closing.

    Returns
    -------
    dict
        Further entries of its row in the server's state: the claimed volumes and the `Influence`.
    """
    _check_once(state, site, row, posterior)
    if odd := sorted(posterior.metadata.keys() - HEADER):
        raise InputError(f"{posterior.name}: its header has {odd[0]!r}; send only what dwc train writes")
    trial = Consolidation(prior).tempered(state["project"]["temper"])
    trial.add(posterior)
    trial.posterior()
    _check_reach(posterior, prior)
    influence = measure(posterior, prior)
    for name, other in others.items():
        if influence.copies(other):
            raise InputError(f"{posterior.name}: has tensors in common with the posterior of {name}; train your own")
    _check_dropped(state, site, row, influence, posterior)
    return {"n_volumes": posterior.metadata.get("n_volumes"), "influence": influence.to_json()}


def _check_once(state: Mapping[str, Any], site: str, row: Mapping[str, Any], posterior: Posterior) -> None:
    """Refuse what would count a site's scans twice."""
    for other in state["posteriors"]:
        if other["site"] == site and other["round"] == row["round"]:
            raise InputError(f"{posterior.name}: another one of round {row['round']} is in; a site counts once")
        if other["site"] == site and other["round"] > row["round"]:
            raise InputError(f"{posterior.name}: of round {row['round']}, but one of round {other['round']} is in")
        if other["sha256"] == row["sha256"]:
            raise InputError(f"{posterior.name}: is the posterior of {other['site']}; each counts once")


def _check_dropped(
    state: Mapping[str, Any], site: str, row: Mapping[str, Any], influence: Influence, posterior: Posterior
) -> None:
    """Refuse what the organizer has dropped, also under another header or with a part of its tensors changed."""
    for other in state["dropped"]:
        again = other["payload_sha256"] == row["payload_sha256"]
        if other["site"] == site and other["influence"] is not None:
            again = again or influence.copies(Influence.from_json(other["influence"]))
        if again:
            raise InputError(f"{posterior.name}: was dropped by the organizer before; train again")


def _check_reach(posterior: Posterior, prior: Posterior) -> None:
    """Refuse values so far from the prior that, combined with other sites', they could leave the range of fp32."""
    for name, sigma_0 in prior.sigma.items():
        shift = (posterior.mu[name].double() - prior.mu[name]).abs()
        if (shift > _MAX_REACH * sigma_0).any() or (posterior.sigma[name] < sigma_0 / _MAX_REACH).any():
            raise InputError(
                f"{posterior.name}: {name} is more than {_MAX_REACH:g} sigmas from the prior, or as much surer; "
                "train again"
            )
