"""Fixtures shared by all tests."""

import os
import socket
from pathlib import Path

# Triton decides at its first import whether to compile or interpret kernels, and several libraries import it.
os.environ.setdefault("TRITON_INTERPRET", "0" if os.environ.get("DWC_TEST_DEVICE") == "cuda" else "1")

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from dwc.data.grid import Grid

# Drawing examples is slow on a busy machine, and no test depends on time.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture
def poisoned_memory():
    """Fill new memory with NaN, so that elements that are never written show up."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture
def save(tmp_path):
    """save(name, voxels, affine): write a NIfTI under tmp_path and return its path."""

    def save(name: str, voxels: np.ndarray, affine: np.ndarray | None = None) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        affine = np.diag([2.0, 2, 2, 1]) if affine is None else affine
        nib.save(nib.Nifti1Image(voxels, affine, dtype=voxels.dtype), path)
        return path

    return save


@pytest.fixture
def scan_pair(save):
    """scan_pair(name, seed): an image and its labels, conformed at 64^3 and 3 mm."""

    def scan_pair(name: str, seed: int = 0) -> tuple[Path, Path]:
        rng = np.random.default_rng(seed)
        affine = Grid(64, 3.0).affine(np.zeros(3))
        image = rng.integers(0, 256, (64, 64, 64), np.uint8)
        labels = rng.choice(np.array([0, 2, 2, 31, 1035, 251], np.int16), (64, 64, 64))
        return save(f"{name}_T1w.nii.gz", image, affine), save(f"{name}_dseg.nii.gz", labels, affine)

    return scan_pair


@pytest.fixture(scope="session")
def shared_data() -> Path:
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the folder with real scans is absent ({folder})")
    return folder


GUARD = """
import os, socket

LOCAL = ("127.", "::1", "localhost", "0.0.0.0")

def refuse_others(connect):
    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(LOCAL):
            if self.type & socket.SOCK_STREAM:  # connect of a datagram socket sends nothing
                with open(os.environ["DWC_TEST_CALLS"], "a") as file:
                    file.write(f"{address}\\n")
            raise ConnectionRefusedError(f"{address}: this test reaches loopback only")
        return connect(self, address)
    return guarded

socket.socket.connect = refuse_others(socket.socket.connect)
socket.socket.connect_ex = refuse_others(socket.socket.connect_ex)
"""


@pytest.fixture(scope="module")
def offline_here(tmp_path_factory):
    """As `offline`, for this process, too, and for as long as a module's fixtures."""
    folder = tmp_path_factory.mktemp("guard")
    (folder / "sitecustomize.py").write_text(GUARD)
    calls = folder / "calls"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DWC_TEST_CALLS", str(calls))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, getattr(socket.socket, name))  # put back afterwards
        exec(GUARD, {})
        yield calls
    assert not calls.exists(), calls.read_text()


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Processes started here can reach loopback only; afterwards, check that nothing else was attempted."""
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / "sitecustomize.py").write_text(GUARD)
    calls = tmp_path / "calls"
    monkeypatch.setenv("DWC_TEST_CALLS", str(calls))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "guard"), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    assert not calls.exists(), calls.read_text()
