"""The hash that names a network's run folder, of the settings, scans and parents that its weights depend on."""

import hashlib
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from dwc.base.files import canonical_json
from dwc.study.context import Study
from dwc.study.graph import Network
from dwc.study.settings import Stage, shared
from dwc.training.settings import ComputeSettings, CubeSettings, NetworkSettings, OptimizerSettings, without_later

__all__ = ["digest_of", "network_key"]

_FORMAT = 1  # increase if a change to the code or to PyTorch changes the weights
_BY_CONTENT = {"label_map", "workers", "device"} | {field.name for field in fields(CubeSettings)}  # see `network_key`


def network_key(study: Study, network: Network, stage: Stage | None, parents: Sequence[str]) -> str:
    """SHA-256 (hex) of what determines the weights, except code; `stage` is None for a computed network."""
    content: dict[str, Any] = {"format": _FORMAT, "mode": network.mode, "parents": list(parents)}
    if network.round:
        content["round"] = network.round
    if network.mode == "factors":
        content["damping"] = network.damping
    if network.mode == "cavity":
        content["site"] = network.site
    if stage is not None and network.site is not None:
        values = shared(study.settings, NetworkSettings, ComputeSettings) | shared(stage, OptimizerSettings)
        values |= {"mode": network.mode, "epochs": stage.epochs, "steps_per_epoch": stage.steps // stage.epochs}
        content["settings"] = without_later({n: value for n, value in values.items() if n not in _BY_CONTENT})
        content["settings"] |= study.settings.decisive_cubes()
        content["label_map"] = study.label_map.sha256
        content["scans"] = study.digest(network.site)
        if study.device.type != "cpu":
            content["device"] = study.device.type  # it rounds differently
    return digest_of(content)


def digest_of(content: Any) -> str:
    """SHA-256 (hex) of a JSON value."""
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()
