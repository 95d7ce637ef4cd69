"""A study's networks on disk: each is trained or computed once, in a folder named by its key, and training resumes."""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from dwc.base.errors import Interrupted
from dwc.base.files import open_folder, write_whole
from dwc.base.seeds import seed_of
from dwc.base.tables import as_csv
from dwc.base.work_sharing import claimed
from dwc.posterior import Posterior
from dwc.site_factors import Factors
from dwc.study.combining import average, average_means, consolidate_sites, fresh_network
from dwc.study.context import Study
from dwc.study.graph import Network, with_parents
from dwc.study.keys import network_key
from dwc.study.settings import Stage
from dwc.training.log import read_log
from dwc.training.loop import train_network

__all__ = ["Networks"]

FACTORS = "factors.safetensors"  # beside the posterior of a network that is a product of factors


class Networks:
    """The networks of a study, made on demand."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self._keys: dict[Network, str] = {}

    def get(self, network: Network) -> Posterior:
        """The network's posterior; trained first if it does not exist."""
        self.make([network])
        return Posterior.load(self.file(network))

    def make(self, networks: Iterable[Network]) -> None:
        """Make networks and their parents, except those another process makes; raises Interrupted after a signal."""
        for network in claimed(with_parents(networks), self.is_done, self._lock, self._is_ready):
            self._make(network)

    def key(self, network: Network) -> str:
        """Its `network_key`."""
        if network not in self._keys:
            stage = self.stage(network) if network.is_trained else None
            parents = [self.key(parent) for parent in network.parents]
            self._keys[network] = network_key(self.study, network, stage, parents)
        return self._keys[network]

    def folder(self, network: Network) -> Path:
        """Its run folder, named by its name and the beginning of its key."""
        readable = re.sub(r"\W+", "_", network.name.replace("+", ""))
        return self.study.out / "networks" / f"{readable}-{self.key(network)[:12]}"

    def file(self, network: Network) -> Path:
        return self.folder(network) / "posterior.safetensors"

    def is_done(self, network: Network) -> bool:
        """Whether its posterior file exists; files are written atomically."""
        return self.file(network).exists()

    def log(self, network: Network) -> list[dict[str, Any]]:
        """Its training log, one line per epoch; empty for computed networks."""
        return read_log(self.folder(network) / "log.jsonl")

    def steps(self, network: Network) -> int:
        """Optimizer steps it took itself."""
        return log[-1]["step"] if (log := self.log(network)) else 0

    def total_steps(self, networks: Iterable[Network]) -> int:
        """Optimizer steps of networks and all their ancestors, each counted once."""
        return sum(map(self.steps, with_parents(networks)))

    def seconds(self, network: Network) -> float:
        """Seconds its own training took."""
        return sum(row["seconds"] for row in self.log(network))

    def stage(self, network: Network) -> Stage:
        """How it is trained, with the number of steps that it takes."""
        stage = self.study.settings.stage(network.stage or network.mode)
        return replace(stage, steps=network.times * stage.steps)

    def _factors(self, network: Network) -> Factors:
        """The factors of the network before this one, its second parent; none yet if that is the prior."""
        prior, before = network.parents[:2]
        q0 = Posterior.load(self.file(prior))
        return Factors(q0) if before == prior else Factors.load(self.folder(before) / FACTORS, q0)

    def _lock(self, network: Network) -> Path:
        return self.study.lock(self.folder(network).name)

    def _is_ready(self, network: Network) -> bool:
        return all(map(self.is_done, network.parents))

    def _make(self, network: Network) -> None:
        print(f"{'training' if network.is_trained else 'computing'} {network.name}", flush=True)
        if network.is_trained and network.site is not None:
            self._train(network, network.site)
        else:
            self._compute(network)

    def _train(self, network: Network, site: str) -> None:
        study, folder = self.study, self.folder(network)
        paths = {"data": study.manifests[site], "out": folder, "cache_dir": study.cache_dir}
        roles = ("init",) if network.mode == "vi" else ("prior", "init")
        paths |= {role: self.file(parent) for role, parent in zip(roles, network.parents, strict=False)}
        settings = study.settings.training(network.mode, self.stage(network), **paths)
        if network.round:
            settings = replace(settings, seed=seed_of(settings.seed, network.round))
        try:
            train_network(settings, resume=folder.exists())
        except Interrupted as stop:
            where = f"{network.name} {stop.stopped}"
            raise Interrupted(stop.signal_number, where, "the same command continues the study") from None

    def _compute(self, network: Network) -> None:
        posteriors = (Posterior.load(self.file(parent)) for parent in network.parents)  # one at a time in memory
        open_folder(self.folder(network))
        match network.mode:
            case "untrained":
                posterior = fresh_network(next(posteriors), self.study.settings.seed)
            case "average":
                next(posteriors)  # the prior
                posterior = average_means(posteriors)
            case "mean":
                posterior = average(next(posteriors), posteriors)
            case "cavity":
                posterior = self._factors(network).cavity(str(network.site))
            case "factors":
                factors = self._factors(network)
                for trained in network.parents[2:]:
                    site, cavity = (Posterior.load(self.file(n)) for n in (trained, trained.parents[0]))
                    factors.replace(str(trained.site), site, cavity=cavity, damping=network.damping)
                factors.save(self.folder(network) / FACTORS)
                posterior = factors.posterior(network.name)
            case _:
                temper = 1 / (len(network.parents) - 1) if network.mode == "tempered" else 1.0
                posterior, weights = consolidate_sites(posteriors, network.name, temper)
                weights["site"] = weights["site"].map(
                    {str(self.file(parent)): parent.name for parent in network.parents}
                )
                table = as_csv(weights, float_format="%.4f")
                write_whole(self.folder(network) / "weights.csv", table.encode())
        posterior.save(self.file(network))
