"""The networks of a study as a graph: their names, how they are made, and which networks they start from."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

__all__ = [
    "Cycle", "Network", "average", "consolidated", "control_network", "cycle", "finetuned", "map_network", "untrained",
    "variational", "vcl", "with_parents",
]  # fmt: skip

_TRAINED = ("map", "vi", "vcl", "finetune")


@dataclass(frozen=True, eq=False)
class Network:
    """A network of a study; two are equal if all of their fields are, parents included."""

    name: str  # as in the paper, such as H->N
    mode: Literal[
        "map", "vi", "vcl", "finetune",
        "consolidated", "tempered", "average", "mean", "factors", "cavity", "untrained",
    ]  # fmt: skip
    site: str | None = None  # that it is trained on, or whose cavity it is; None for other computed ones
    # Prior and start, which may be one; for a computed network, the prior, the current network and the sites'.
    parents: tuple["Network", ...] = field(default=(), repr=False)
    stage: str = ""  # the setting that describes its training; by default the one named like its mode
    round: int = 0  # draws other cubes and noise in each round on the same scans
    damping: float = 1.0  # of factors
    times: int = 1  # as many steps as its stage says
    _digest: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Compared by a digest, since over many rounds the number of paths to an ancestor grows exponentially.
        parents = [parent._digest for parent in self.parents]
        content = repr((self.name, self.mode, self.site, self.stage, self.round, self.damping, self.times, parents))
        object.__setattr__(self, "_digest", hashlib.sha256(content.encode()).hexdigest())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Network) and self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)

    @property
    def is_trained(self) -> bool:
        """Whether it is trained, rather than computed from its parents."""
        return self.mode in _TRAINED


def map_network(site: str, stage: str = "map") -> Network:
    """A site's deterministic network, trained to a maximum a posteriori (MAP) estimate."""
    return Network(f"{site} MAP", "map", site, stage=stage)


def control_network(site: str) -> Network:
    """A site's MAP network with as many steps as its VCL network."""
    return Network(f"{site} MAP control", "map", site, stage="control")


def variational(site: str) -> Network:
    """The first variational network; its means start from the site's MAP network."""
    return Network(site, "vi", site, (map_network(site),))


def vcl(prior: Network, site: str) -> Network:
    """A site's network trained from a prior by variational continual learning (VCL)."""
    return Network(f"{prior.name}->{site}", "vcl", site, (prior,))


def consolidated(prior: Network, sites: Sequence[Network]) -> Network:
    """The consolidation (Eq. 17) of networks that sites trained from one prior."""
    return Network(_joint_name(prior, sites), "consolidated", None, (prior, *sites))


def average(prior: Network, sites: Sequence[Network]) -> Network:
    """The plain mean of the sites' means, as a MAP network."""
    return Network(f"{_joint_name(prior, sites)} average", "average", None, (prior, *sites))


def untrained(like: Network) -> Network:
    """A freshly initialised network of the same architecture: the level of chance."""
    return Network("untrained", "untrained", None, (like,))


def finetuned(prior: Network, site: str) -> Network:
    """A consolidated network fine-tuned on a site, with the likelihood weighted as one example volume."""
    return Network(f"{prior.name}->{site}", "finetune", site, (prior,))


class Cycle(NamedTuple):
    """The networks of one cycle: all MAP networks, the origin's, the sites', consolidated, fine-tuned."""

    maps: list[Network]
    prior: Network
    sites: list[Network]
    joint: Network
    dwc: Network


def cycle(origin: str, sites: Sequence[str]) -> Cycle:
    """The networks of one cycle: the first network, the sites', the consolidated and the fine-tuned one."""
    prior = variational(origin)
    trained = [vcl(prior, site) for site in sites]
    joint = consolidated(prior, trained)
    return Cycle([map_network(site) for site in (origin, *sites)], prior, trained, joint, finetuned(joint, origin))


def with_parents(networks: Iterable[Network]) -> list[Network]:
    """Networks and everything they start from, each once, parents first."""
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
