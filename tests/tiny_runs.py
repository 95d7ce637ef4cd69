"""Fixtures for tests that train: a tiny site on disk, and the paper's chain of networks, each trained in a second.

Use them with ``pytest_plugins = ["tests.tiny_runs"]``.
"""

from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from dwc.consolidation import consolidate
from dwc.posterior import Posterior
from dwc.training.loop import train_network
from dwc.training.settings import TrainSettings

LIA = np.array([[-1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])


@pytest.fixture(scope="session")
def one_thread():
    """PyTorch with one thread, which is faster for volumes this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """Four conformed 32^3 volumes of two boxes, a thalamus beside a hippocampus; the last is held out."""
    folder = tmp_path_factory.mktemp("site")
    rng = np.random.default_rng(0)
    lines = ["image,label,subject,split"]
    for subject in range(4):
        ids = np.zeros((32, 32, 32), np.int32)
        middle = 16 + int(rng.integers(-3, 4))
        ids[middle - 8 : middle, 6:26, 6:26], ids[middle : middle + 8, 6:26, 6:26] = 17, 10
        image = (8 * ids + 40 + 5 * rng.standard_normal(ids.shape)).clip(0, 255).astype(np.uint8)
        for name, voxels in (("T1w", image), ("dseg", ids)):
            nibabel.save(nibabel.Nifti1Image(voxels, LIA), folder / f"sub-{subject}_{name}.nii.gz")
        split = "test" if subject == 3 else "train"
        lines.append(f"sub-{subject}_T1w.nii.gz,sub-{subject}_dseg.nii.gz,{subject},{split}")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def settings(site) -> TrainSettings:
    """Three epochs of two steps; callers set the output folder."""
    return TrainSettings(
        mode="map", data=site / "manifest.csv", out=site / "run", cache_dir=site / "cache", label_map="coarse",
        grid_size=32, width=2, dilations=(1,), lr=1e-2, batch_size=1, epochs=3, steps_per_epoch=2, device="cpu",
    )  # fmt: skip


@pytest.fixture(scope="session")
def networks(settings, one_thread, tmp_path_factory) -> dict[str, Posterior]:
    """The paper's chain by name: MAP, variational, two sites trained from it, consolidated, fine-tuned."""
    folder = tmp_path_factory.mktemp("chain")
    short = replace(settings, epochs=1, label_map=None, grid_size=None, width=None, dilations=None)

    def file_of(name: str) -> Path:
        return folder / name / "posterior.safetensors"

    chain = {"map": train_network(replace(settings, epochs=1, out=folder / "map"))}
    chain["vi"] = train_network(replace(short, mode="vi", init=file_of("map"), out=folder / "vi"))
    for seed, name in enumerate(("a", "b")):
        chain[name] = train_network(replace(short, mode="vcl", prior=file_of("vi"), seed=seed, out=folder / name))
    chain["dwc"] = consolidate(chain["vi"], [chain["a"], chain["b"]])
    (folder / "dwc").mkdir()
    chain["dwc"].save(file_of("dwc"))
    chain["finetune"] = train_network(replace(short, mode="finetune", prior=file_of("dwc"), out=folder / "finetune"))
    return chain
