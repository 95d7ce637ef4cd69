"""A study's settings resolved once: grid, label map, device, manifests, scans."""

import math
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from dwc.base.devices import choose_device
from dwc.base.errors import InputError
from dwc.base.files import open_folder, write_whole
from dwc.base.locks import held
from dwc.base.tables import read_settings
from dwc.data.cache import digest_of_scans, is_prepared, prepare
from dwc.data.dataset import SubVolumes
from dwc.data.grid import Grid
from dwc.data.intensity import Scheme
from dwc.data.labels import LabelMap
from dwc.data.manifest import Scan, read_manifest
from dwc.study.settings import StudySettings

__all__ = ["Study"]

_SCANS = (  # the settings that the scans in a study's folder depend on
    "seed", "grid_size", "voxel_size", "origin", "sites", "unseen", "n_train", "n_test", "anatomies", "manifests",
)  # fmt: skip


class Study:
    """A study with its settings and files checked; creating one writes nothing."""

    def __init__(self, settings: StudySettings) -> None:
        self.settings, self.out = settings, settings.out
        if self.out.exists() and not self.out.is_dir():
            raise InputError(f"`out` {self.out}: is a file; give a folder")
        if settings.anatomies is not None and not settings.anatomies.is_dir():
            raise InputError(f"`anatomies` {settings.anatomies}: no such folder; give one of label volumes (*.nii.gz)")
        self.label_map = LabelMap.load(settings.label_map)
        self.grid = Grid(settings.grid_size, settings.voxel_size)
        self.device = choose_device(settings.device)
        # By site, given or to be simulated, and for all training sites pooled; callers may add more.
        names = (*settings.all_sites, settings.pooled_name)
        self.manifests = {name: self.site_folder(name) / "manifest.csv" for name in names} | (settings.manifests or {})
        self._scans: dict[str, list[Scan]] = {}
        self._digests: dict[str, str] = {}
        self._check_folder()

    def _check_folder(self) -> None:
        path, values = self.out / "config.yaml", self.settings.to_json()
        if not path.exists() or not any(self.site_folder(site).exists() for site in self.settings.all_sites):
            return
        before = read_settings(path)
        for name in _SCANS:
            if before.get(name, values[name]) != values[name]:
                raise InputError(
                    f"{path}: has other scans, made with other settings ({name} {before[name]}, now {values[name]}); "
                    "give another `out` or remove the folder"
                )

    def keep_config(self) -> None:
        open_folder(self.out)
        write_whole(self.out / "config.yaml", yaml.safe_dump(self.settings.to_json(), sort_keys=False).encode())

    @property
    def cache_dir(self) -> Path:
        """Conformed volumes, shared by all networks."""
        return self.out / "cache"

    @property
    def intensity(self) -> Scheme:
        return self.settings.intensity or "z_score"

    @property
    def prediction(self) -> dict[str, Any]:
        """Keyword arguments of `predict_volume` and `score_volumes`."""
        settings = self.settings
        return {"n_samples": settings.n_samples, "seed": settings.seed, "device": self.device,
                "precision": settings.precision}  # fmt: skip

    def site_folder(self, site: str) -> Path:
        """The folder of a simulated site or of the pooled manifest."""
        return self.out / "sites" / site

    def lock(self, name: str) -> Path:
        """Path of the lock file with which processes share the work `name`."""
        (self.out / ".locks").mkdir(parents=True, exist_ok=True)
        return self.out / ".locks" / name

    def scans_held(self) -> AbstractContextManager[bool]:
        """Lock the study's scans: one process creates them while the others wait."""
        return held(self.lock("scans"), patience_s=math.inf)

    def scans(self, site: str) -> list[Scan]:
        """A site's scans, all labelled, with the same split as in training."""
        if site not in self._scans:
            settings, manifest = self.settings, self.manifests[site]
            scans = read_manifest(manifest, seed=settings.seed, test_fraction=settings.test_fraction)
            for scan in scans:
                if scan.label is None:
                    raise InputError(f"{manifest}: {scan.image} has no label; a study needs one for each scan")
            self._scans[site] = scans
        return self._scans[site]

    def held_out_scans(self, site: str) -> list[Scan]:
        """The scans of a site that no network trains on (all, if it is unseen)."""
        is_unseen = site in self.settings.unseen
        scans = [replace(scan, site=site) for scan in self.scans(site) if is_unseen or scan.split == "test"]
        if not scans:
            raise InputError(f"{self.manifests[site]}: has no scan to test on; set split to test for some")
        return scans

    def prepare(self, scans: list[Scan], *, progress: bool = False) -> SubVolumes:
        """Conform scans to the study's grid and classes, through its cache."""
        where = self.label_map, self.grid, self.cache_dir
        return prepare(scans, *where, intensity=self.intensity, progress=progress)

    def held_out(self, site: str) -> SubVolumes:
        return self.prepare(self.held_out_scans(site))

    def is_prepared(self, site: str) -> bool:
        """Whether a site's held-out scans exist and are cached; writes nothing."""
        there = self.manifests[site].exists()
        return there and is_prepared(self.held_out_scans(site), self.label_map, self.grid, self.cache_dir)

    def digest(self, site: str) -> str:
        """SHA-256 (hex) of a site's scans, labels and split."""
        if site not in self._digests:
            self._digests[site] = digest_of_scans(self.scans(site), self.cache_dir)
        return self._digests[site]
