"""The held-out scans of the organization that made the first prior: the only data that are there to judge a network."""

from dataclasses import dataclass
from pathlib import Path

from dwc.base.errors import InputError
from dwc.data.cache import prepare
from dwc.data.dataset import SubVolumes
from dwc.data.manifest import Scan, has_split_column
from dwc.evaluation import scans_to_score
from dwc.prediction import Ensemble, load_networks

__all__ = ["HeldOut"]


@dataclass(frozen=True)
class HeldOut:
    """Held-out scans, to be cut as the prior's network sees them.

    Attributes
    ----------
    scans : list of Scan
        With labels.
    organization : Ensemble
        The prior's network, with grid, label map and intensity.
    """

    scans: list[Scan]
    organization: Ensemble

    @classmethod
    def of(cls, manifest: Path, prior: Path, label_map: str | None = None) -> "HeldOut":
        """The scans of a manifest that were held out when this prior was trained; no image is read.

        Parameters
        ----------
        manifest : Path
            Of the organization's scans.
        prior : Path
            The network that it trained.
        label_map : str, optional
            TSV that the prior was trained on, if dwc ships none.
        """
        organization = load_networks([prior], label_map)
        (posterior,) = organization.posteriors
        if not posterior.metadata.get("training") and not has_split_column(manifest):
            raise InputError(
                f"{manifest}: has no split column, and {posterior.name} does not say which scans were held out; add one"
            )
        return cls(scans_to_score(manifest, [posterior]), organization)

    def prepare(self, cache_dir: Path) -> SubVolumes:
        """Conform the scans and cut them into sub-volumes, or find them in the cache."""
        shape = self.organization
        return prepare(self.scans, shape.label_map, shape.grid, cache_dir, intensity=shape.intensity)
