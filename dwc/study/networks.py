"""The networks of a study as a graph: each is trained once, from the networks it starts from, and never again.

A network's run folder is named by what it is called and by a hash of the settings, the scans and the networks before
it. So another setting trains anew only what it changes, and a study that was killed goes on where it stopped, in the
middle of a network if need be. The code is not in the hash: after a change of it, or of PyTorch, that gives other
weights, raise `_FORMAT` or remove the study's networks/. Which networks a study needs is decided elsewhere; how one
trains is `dwc.training`'s business, how several become one `dwc.consolidation`'s.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch

from dwc.base.devices import choose_device
from dwc.base.errors import Interrupted
from dwc.base.files import canonical_json, open_folder, write_whole
from dwc.base.work_sharing import claimed
from dwc.consolidation import Consolidation
from dwc.data.cache import digest_of_scans
from dwc.data.labels import LabelMap
from dwc.meshnet import MeshNet
from dwc.posterior import Posterior
from dwc.study.settings import Stage, StudySettings
from dwc.study.sites import scans_of
from dwc.training.loop import train_network

__all__ = [
    "Network", "Networks", "average", "consolidated", "control_network", "finetuned", "map_network", "untrained",
    "variational", "vcl",
]  # fmt: skip

_FORMAT = 1  # raise it when the same settings and data give other networks
_NO_CONTENT = (  # what changes no weights, a study never sets, or stands in the hash by its content or (device) type
    "data", "out", "prior", "init", "cache_dir", "label_map", "workers", "device", "activation_checkpointing", "stream",
)  # fmt: skip
_COMPUTED = ("consolidated", "average", "untrained")


@dataclass(frozen=True)
class Network:
    """A network of a study: what it is called, and what it is made from.

    Make one with `map_network`, `control_network`, `variational`, `vcl`, `finetuned`, `consolidated`, `average` or
    `untrained`.

    Attributes
    ----------
    name : str
        As the paper writes it, such as H->N.
    mode : str
        How it is trained, a mode of `dwc train`; or how it is computed from its parents.
    site : str or None
        Whose scans it is trained on; None for computed networks.
    parents : tuple of Network
        The network it starts from, if any; of a combined network the prior and the sites' networks.
    stage : str
        The setting of the study that says how it is trained; by default that of its mode.
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
    """A variational network of a site, starting from its prior and kept close to it."""
    return Network(f"{prior.name}->{site}", "vcl", site, (prior,))


def consolidated(prior: Network, sites: Sequence[Network]) -> Network:
    """The networks that sites trained from one prior, consolidated (Eq. 17)."""
    return Network(_joint_name(prior, sites), "consolidated", None, (prior, *sites))


def average(prior: Network, sites: Sequence[Network]) -> Network:
    """The plain mean of the means that sites trained from one prior; without standard deviations, as a MAP network."""
    return Network(f"{_joint_name(prior, sites)} average", "average", None, (prior, *sites))


def untrained(like: Network) -> Network:
    """A plain network of the same architecture before its first step: what chance gives."""
    return Network("untrained", "untrained", None, (like,))


def finetuned(prior: Network, site: str) -> Network:
    """A consolidated network trained on the origin, the likelihood weighing one example volume."""
    return Network(f"{prior.name}->{site}", "finetune", site, (prior,))


def _joint_name(prior: Network, sites: Sequence[Network]) -> str:
    return f"{prior.name}->{'+'.join(network.site for network in sites)}"


class Networks:
    """The networks of a study's folder, trained when they are asked for.

    Parameters
    ----------
    settings : StudySettings
        How each kind is trained, and where to.
    manifests : mapping of str to Path
        Scans by the name of the site; any sites.
    """

    def __init__(self, settings: StudySettings, manifests: Mapping[str, Path]) -> None:
        self.settings = settings
        self.manifests = dict(manifests)
        self._keys: dict[Network, str] = {}
        self._digests: dict[str, str] = {}

    def get(self, network: Network) -> Posterior:
        """The network's posterior; made now, as `make` does, unless it lies there already."""
        self.make([network])
        return Posterior.load(self.file(network))

    def make(self, networks: Iterable[Network]) -> None:
        """Make networks and all that they start from; those that lie there already, or that another process makes, not.

        Raises
        ------
        InputError
            If training refuses its input or the disk is full.
        Interrupted
            After a signal; called again, the study goes on.
        """
        open_folder(self.settings.locks)
        for network in claimed(self.needed(networks), self.is_done, self._lock, self._is_ready):
            self._make(network)

    def needed(self, networks: Iterable[Network]) -> list[Network]:
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

    def key(self, network: Network) -> str:
        """SHA-256, hex, of all that the network's weights depend on but the code."""
        if network not in self._keys:
            content: dict[str, Any] = {"format": _FORMAT, "mode": network.mode}
            content["parents"] = [self.key(parent) for parent in network.parents]
            if network.is_trained:
                paths = dict.fromkeys(("data", "out", *_start(network)), self.settings.out)  # not in the key
                settings = self.settings.training(network.mode, self.stage(network), **paths).to_json()
                content["settings"] = {name: value for name, value in settings.items() if name not in _NO_CONTENT}
                content["label_map"] = self._label_map.sha256
                content["scans"] = self._digest(network.site)
                if (device := choose_device(self.settings.device).type) != "cpu":
                    content["device"] = device  # it rounds otherwise
            self._keys[network] = hashlib.sha256(canonical_json(content).encode()).hexdigest()
        return self._keys[network]

    def folder(self, network: Network) -> Path:
        """Its run folder: its name without spaces and arrows, and the beginning of its key."""
        readable = re.sub(r"\W+", "_", network.name.replace("+", ""))
        return self.settings.out / "networks" / f"{readable}-{self.key(network)[:12]}"

    def file(self, network: Network) -> Path:
        """Its posterior file."""
        return self.folder(network) / "posterior.safetensors"

    def is_done(self, network: Network) -> bool:
        """Whether its posterior file lies there; files appear whole."""
        return self.file(network).exists()

    def log(self, network: Network) -> list[dict[str, Any]]:
        """The lines of its training log so far, one per epoch; none for combined networks."""
        path = self.folder(network) / "log.jsonl"
        if not network.is_trained or not path.exists():
            return []
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def steps(self, network: Network) -> int:
        """Optimizer steps it took itself."""
        return log[-1]["step"] if (log := self.log(network)) else 0

    def total_steps(self, networks: Iterable[Network]) -> int:
        """Optimizer steps behind networks in all: their own and those of all that they start from, each once."""
        return sum(self.steps(network) for network in self.needed(networks))

    def seconds(self, network: Network) -> float:
        """Time its own training took."""
        return sum(row["seconds"] for row in self.log(network))

    def stage(self, network: Network) -> Stage:
        """How it is trained."""
        return self.settings.stage(network.stage or network.mode)

    def _lock(self, network: Network) -> Path:
        return self.settings.locks / self.folder(network).name

    def _is_ready(self, network: Network) -> bool:
        return all(self.is_done(parent) for parent in network.parents)

    def _make(self, network: Network) -> None:
        print(f"{'training' if network.is_trained else 'computing'} {network.name}", flush=True)
        folder = self.folder(network)
        if not network.is_trained:
            self._compute(network, folder)
            return
        start = dict(zip(_start(network), map(self.file, network.parents), strict=True))
        paths = dict(data=self.manifests[network.site], out=folder, **start)
        settings = self.settings.training(network.mode, self.stage(network), **paths)
        try:
            train_network(settings, resume=folder.exists())
        except Interrupted as stop:
            where = f"{network.name} {stop.stopped}"
            raise Interrupted(stop.signal_number, where, "the same command goes on with the study") from None

    def _compute(self, network: Network, folder: Path) -> None:
        posteriors = (Posterior.load(self.file(parent)) for parent in network.parents)  # one at a time in memory
        first = next(posteriors)
        open_folder(folder)
        match network.mode:
            case "untrained":
                posterior = _untrained(first, self.settings.seed)
            case "average":
                posterior = _average(posteriors)
            case "consolidated":
                consolidation = Consolidation(first)
                for site in posteriors:
                    consolidation.add(site)
                weights = pd.DataFrame(asdict(row) for row in consolidation.report())
                names = {str(self.file(parent)): parent.name for parent in network.parents}
                weights["site"] = weights["site"].map(names)
                write_whole(folder / "weights.csv", weights.to_csv(index=False, float_format="%.4f").encode())
                posterior = consolidation.posterior(network.name)
        posterior.save(self.file(network))

    def _digest(self, site: str) -> str:
        if site not in self._digests:
            scans = scans_of(self.settings, self.manifests[site])
            self._digests[site] = digest_of_scans(scans, self.settings.cache_dir)
        return self._digests[site]

    @cached_property
    def _label_map(self) -> LabelMap:
        return LabelMap.load(self.settings.label_map)


def _start(network: Network) -> tuple[str, ...]:
    """The trainer's name for what a trained network starts from."""
    return {"map": (), "vi": ("init",)}.get(network.mode, ("prior",))


def _average(posteriors: Iterator[Posterior]) -> Posterior:
    """The mean of the means, in fp64, of networks trained alike."""
    first = next(posteriors)
    total, n, n_volumes = {name: mu.double() for name, mu in first.mu.items()}, 1, first.metadata["n_volumes"]
    for posterior in posteriors:
        total = {name: mu + posterior.mu[name] for name, mu in total.items()}
        n, n_volumes = n + 1, n_volumes + posterior.metadata["n_volumes"]
    inherited = {key: first.metadata[key] for key in ("architecture", "label_map", "preprocessing")}
    return Posterior({name: mu / n for name, mu in total.items()}, {}, {**inherited, "n_volumes": n_volumes})


def _untrained(like: Posterior, seed: int) -> Posterior:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Posterior.from_model(MeshNet.from_architecture(like.metadata["architecture"], bayesian=False))
