"""Distributed weight consolidation: train Bayesian segmentation networks at separate sites and consolidate them.

>>> import dwc
>>> q0 = dwc.train_network(dwc.TrainSettings(mode="vi", data="manifest.csv", init="map.safetensors", out="runs/q0"))
>>> q1 = dwc.consolidate(q0, [dwc.Posterior.load(path) for path in ("a.safetensors", "b.safetensors")])
>>> prediction = dwc.predict(q1, "scan.nii.gz")
>>> scores = dwc.evaluate(q1, "manifest.csv")

Names are imported on first use, so that `import dwc` is quick.
"""

import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dwc.base.errors import InputError, Interrupted
    from dwc.consolidation import Consolidation, consolidate
    from dwc.evaluation import Evaluation, evaluate
    from dwc.meshnet import MeshNet
    from dwc.posterior import Posterior
    from dwc.prediction import load_network
    from dwc.prediction_settings import PredictionSettings
    from dwc.segmentation import Segmentation, predict
    from dwc.training.loop import train_network
    from dwc.training.settings import TrainSettings

_MODULES = {
    "Consolidation": "dwc.consolidation",
    "Evaluation": "dwc.evaluation",
    "InputError": "dwc.base.errors",
    "Interrupted": "dwc.base.errors",
    "MeshNet": "dwc.meshnet",
    "Posterior": "dwc.posterior",
    "PredictionSettings": "dwc.prediction_settings",
    "Segmentation": "dwc.segmentation",
    "TrainSettings": "dwc.training.settings",
    "consolidate": "dwc.consolidation",
    "evaluate": "dwc.evaluation",
    "load_network": "dwc.prediction",
    "predict": "dwc.segmentation",
    "train_network": "dwc.training.loop",
}

__all__ = [
    "Consolidation", "Evaluation", "InputError", "Interrupted", "MeshNet", "Posterior", "PredictionSettings",
    "Segmentation", "TrainSettings", "__version__", "consolidate", "evaluate", "load_network", "predict",
    "train_network",
]  # fmt: skip


def _version() -> str:
    """The version, read from the source of `dwc_kernels` so that PyTorch is not imported."""
    spec = find_spec("dwc_kernels")
    text = Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else ""
    found = re.search(r'^__version__ = "(.+)"', text, re.MULTILINE)
    return found[1] if found else "unknown"


__version__ = _version()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'dwc' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
