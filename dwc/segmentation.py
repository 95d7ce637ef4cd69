"""Segment a scan from its file, with the result on the scan's own grid, in one call."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np

from dwc.base.devices import choose_device
from dwc.components import largest_components
from dwc.data.conform import conform_image
from dwc.derivatives import Derivatives, native_labels, write_derivatives
from dwc.inputs import find_scan
from dwc.posterior import Posterior
from dwc.prediction import Ensemble, Prediction, load_networks, predict_volume
from dwc.prediction_settings import OutputSettings, PredictionSettings

__all__ = ["Segmentation", "predict", "segment"]


@dataclass(frozen=True)
class Segmentation:
    """A segmented scan, as `predict` returns it.

    Attributes
    ----------
    scan : Path
        The scan's file.
    image : ndarray
        Its conformed image on the networks' grid, uint8 [size, size, size] in LIA orientation.
    prediction : Prediction
        Classes, maps of uncertainty and the volumes of each draw, on the same grid.
    ensemble : Ensemble
        The networks, with their label map and grid.
    """

    scan: Path
    image: np.ndarray
    prediction: Prediction
    ensemble: Ensemble

    def labels(self) -> nib.Nifti1Image:
        """Label ids of the networks' label map on the scan's own grid."""
        return native_labels(self.prediction, self.scan, self.ensemble.label_map, self.ensemble.grid)

    def without_islands(self) -> "Segmentation":
        """The same with the labels cleaned up by `largest_components`; the draws are left as they are."""
        labels = largest_components(self.prediction.labels, self.ensemble.label_map)
        return replace(self, prediction=replace(self.prediction, labels=labels))

    def write(self, files: Derivatives, settings: OutputSettings | None = None) -> np.ndarray:
        """Write the result `files` that the settings ask for, but for the picture; returns mm^3 per class."""
        return write_derivatives(
            files, self.prediction, self.scan, label_map=self.ensemble.label_map, grid=self.ensemble.grid,
            settings=settings, image=self.image,
        )  # fmt: skip


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
        A posterior, its file or the folder of its run, several for an ensemble, or the result of `load_networks`.
    scan : path
        NIfTI or mgz; the extension may be left out.
    settings
        Draws of the weights, their seed, device and precision.
    progress : bool
        Show a progress bar.
    """
    settings = PredictionSettings.check_type(settings or PredictionSettings(), "settings")
    ensemble = network if isinstance(network, Ensemble) else load_networks(network, settings.label_map)
    path = find_scan(scan)
    return segment(ensemble, path, conform_image(path, ensemble.grid), settings, progress=progress)


def segment(
    ensemble: Ensemble, scan: Path, image: np.ndarray, settings: PredictionSettings, *, progress: bool = False
) -> Segmentation:
    """Segment a scan whose image on the networks' grid is at hand."""
    prediction = predict_volume(
        ensemble.networks, image, intensity=ensemble.intensity, n_samples=settings.n_samples, seed=settings.seed,
        device=choose_device(settings.device), precision=settings.precision, memory_limit=settings.memory_limit,
        progress=scan.name if progress else None,
    )  # fmt: skip
    return Segmentation(scan, image, prediction, ensemble)
