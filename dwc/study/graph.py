"""The networks of a study as a graph: what each is called, how it is made, and which networks it starts from."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

__all__ = [
    "Cycle", "Network", "average", "consolidated", "control_network", "cycle", "finetuned", "map_network", "untrained",
    "variational", "vcl", "with_parents",
]  # fmt: skip

_COMPUTED = ("consolidated", "average", "untrained")


@dataclass(frozen=True)
class Network:
    """A network of a study.

    Attributes
    ----------
    name : str
        As the paper writes it, such as H->N.
    mode : str
        The mode of `dwc train` that trains it, or how it is computed from its parents.
    site : str or None
        Whose scans it is trained on; None if it is computed.
    parents : tuple of Network
        What it starts from; of a computed network, the prior and the sites' networks.
    stage : str
        The study's setting that says how it is trained; by default that of its mode.
    """

    name: str
    mode: Literal["map", "vi", "vcl", "finetune", "consolidated", "average", "untrained"]
    site: str | None = None
    parents: tuple["Network", ...] = ()
    stage: str = ""

    @property
    def is_trained(self) -> bool:
        """Whether it takes steps, rather than being computed from its parents."""
        return self.mode not in _COMPUTED


def map_network(site: str, stage: str = "map") -> Network:
    """A plain network of a site."""
    return Network(f"{site} MAP", "map", site, stage=stage)


def control_network(site: str) -> Network:
    """A plain network of a site that takes as many steps as VCL's."""
    return Network(f"{site} MAP control", "map", site, stage="control")


def variational(site: str) -> Network:
    """The first variational network, its means starting from the site's MAP network."""
    return Network(site, "vi", site, (map_network(site),))


def vcl(prior: Network, site: str) -> Network:
    """A site's variational network, trained from its prior."""
    return Network(f"{prior.name}->{site}", "vcl", site, (prior,))


def consolidated(prior: Network, sites: Sequence[Network]) -> Network:
    """The networks that sites trained from one prior, consolidated (Eq. 17)."""
    return Network(_joint_name(prior, sites), "consolidated", None, (prior, *sites))


def average(prior: Network, sites: Sequence[Network]) -> Network:
    """The plain mean of the sites' means, without standard deviations, as a MAP network."""
    return Network(f"{_joint_name(prior, sites)} average", "average", None, (prior, *sites))


def untrained(like: Network) -> Network:
    """A plain network of the same architecture before its first step: what chance gives."""
    return Network("untrained", "untrained", None, (like,))


def finetuned(prior: Network, site: str) -> Network:
    """A consolidated network fine-tuned on a site, with the likelihood weighted as one example volume."""
    return Network(f"{prior.name}->{site}", "finetune", site, (prior,))


class Cycle(NamedTuple):
    """The networks of one cycle: each training site's MAP network, the origin's, the sites', what becomes of these."""

    maps: list[Network]
    prior: Network
    sites: list[Network]
    joint: Network
    dwc: Network


def cycle(origin: str, sites: Sequence[str]) -> Cycle:
    """The networks of the cycle over an origin and sites."""
    prior = variational(origin)
    trained = [vcl(prior, site) for site in sites]
    joint = consolidated(prior, trained)
    return Cycle([map_network(site) for site in (origin, *sites)], prior, trained, joint, finetuned(joint, origin))


def with_parents(networks: Iterable[Network]) -> list[Network]:
    """The networks and all that they start from, each once, parents first."""
    order: dict[Network, None] = {}

    def visit(network: Network) -> None:
        if network not in order:
            for parent in network.parents:
                visit(parent)
            order[network] = None

    for network in networks:
        visit(network)
    return list(order)


def _joint_name(prior: Network, sites: Sequence[Network]) -> str:
    return f"{prior.name}->{'+'.join(str(network.site) for network in sites)}"
