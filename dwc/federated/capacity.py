"""What a round costs a server with many sites: measured with a few, extrapolated in proportion to more."""

import math
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pandas as pd
import torch

from dwc.federated.cycle import Cycle
from dwc.federated.project import Project
from dwc.meshnet import MeshNet
from dwc.posterior import Posterior

__all__ = ["capacity_table"]

_MEASURED = 10  # sites
_CLOSING = 10  # posteriors per site: its old and its new factor, four times as large each, its answer and its cavity


def capacity_table(sites: Sequence[int], *, n_classes: int, width: int, link_mbit_s: float) -> pd.DataFrame:
    """One round, one row per number of sites.

    Columns: ``payload_mb`` (one posterior; a site receives and sends as much), ``server_traffic_gb`` (both ways),
    ``link_s`` (that traffic on the server's idle link), ``answer_timeout_s`` (lower bound for the project's if all
    posteriors arrive at once), ``consolidation_s``, ``memory_mb`` (without FLARE; the same for any number of sites),
    ``in_flight_mb`` (in addition, if all posteriors arrive at once), ``disk_gb``, ``factors_gb`` (memory in addition
    while a round on the same scans closes, computed) and ``basis``, measured or extrapolated.
    """
    # A separate process, so that peak memory is not that of what ran here before.
    n_measured = min(_MEASURED, *sites)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        payload, seconds, memory = pool.submit(_measure, n_measured, n_classes, width).result()
    rows = [
        {
            "sites": n,
            "payload_mb": payload / 1e6,
            "server_traffic_gb": 2 * n * payload / 1e9,
            "link_s": 2 * n * payload * 8 / (link_mbit_s * 1e6),
            "answer_timeout_s": n * payload * 8 / (link_mbit_s * 1e6),
            "consolidation_s": n * seconds,
            "memory_mb": memory / 1e6,
            "in_flight_mb": n * payload / 1e6,
            "disk_gb": (n + 1) * payload / 1e9,
            "factors_gb": _CLOSING * n * payload / 1e9,
            "basis": "measured" if n == n_measured else f"extrapolated from {n_measured}",
        }
        for n in sites
    ]
    return pd.DataFrame(rows).set_index("sites")


def _measure(n_sites: int, n_classes: int, width: int) -> tuple[int, float, int]:
    """Bytes of a posterior, seconds per site to check and consolidate it, and peak memory in bytes."""
    torch.manual_seed(0)
    prior = Posterior.from_model(MeshNet(n_classes, width))
    metadata = {**prior.metadata, "prior_sha256": prior.sha256, "n_volumes": 1}
    sites = [f"site-{number}" for number in range(1, n_sites + 1)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.safetensors"
        prior.save(path)
        cycle = Cycle.create(Path(folder) / "books", Project("plan", "localhost", sites, path, method="dwc"))
        seconds = 0.0
        for number, site in enumerate(sites, 1):
            sigma = {name: sigma * (1 - 0.5 * number / n_sites) for name, sigma in prior.sigma.items()}
            Posterior(prior.mu, sigma, metadata).save(path)
            answer = {"state": "trained", "round": 1, "prior_sha256": prior.sha256, "posterior": path.read_bytes()}
            began = time.monotonic()
            cycle.receive(site, answer)
            cycle.advance()  # the last one closes the round
            seconds += time.monotonic() - began
        payload = math.ceil(sum(row["bytes"] for row in cycle.state["posteriors"]) / n_sites)
    unit = 1 if sys.platform == "darwin" else 1024
    return payload, seconds / n_sites, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
