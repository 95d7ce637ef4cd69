"""Segment a scan from its file, with the result on the scan's own grid, in one call."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from dwc.base.devices import choose_device
from dwc.data.conform import conform_image
from dwc.derivatives import Derivatives, find_scan, native_labels, write_derivatives
from dwc.posterior import Posterior
from dwc.prediction import Ensemble, Prediction, load_networks, predict_volume
from dwc.prediction_settings import PredictionSettings

__all__ = ["Segmentation", "predict"]


@dataclass(frozen=True)
class Segmentation:
    """A segmented scan: its file, its uint8 image and prediction on the networks' grid, and the networks."""

    scan: Path
    image: np.ndarray
    prediction: Prediction
    ensemble: Ensemble

    def labels(self) -> nib.Nifti1Image:
        """Label ids of the networks' label map on the scan's own grid."""
        return native_labels(self.prediction, self.scan, self.ensemble.label_map, self.ensemble.grid)

    def write(self, files: Derivatives) -> np.ndarray:
        """Write labels, table, entropy and volumes; returns mm^3 per class."""
        ensemble = self.ensemble
        return write_derivatives(files, self.prediction, self.scan, label_map=ensemble.label_map, grid=ensemble.grid)


def predict(
    network: str | Path | Posterior | Ensemble | Sequence[str | Path | Posterior],
    scan: str | Path,
    settings: PredictionSettings | None = None,
    *,
    progress: bool = False,
) -> Segmentation:
    """Segment a scan.

    Parameters
    ----------
    network
        A posterior or its file, several for an ensemble, or the result of `load_networks`.
    scan : path
        NIfTI or mgz; the extension may be left out.
    """
    settings = PredictionSettings.check_type(settings or PredictionSettings(), "settings")
    ensemble = network if isinstance(network, Ensemble) else load_networks(network, settings.label_map)
    path = find_scan(scan)
    image = conform_image(path, ensemble.grid)
    prediction = predict_volume(
        ensemble.networks, image, intensity=ensemble.intensity, n_samples=settings.n_samples, seed=settings.seed,
        device=choose_device(settings.device), precision=settings.precision, memory_limit=settings.memory_limit,
        progress=path.name if progress else None,
    )  # fmt: skip
    return Segmentation(path, image, prediction, ensemble)
