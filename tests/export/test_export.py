"""`dwc export`: the same segmentation in onnxruntime and in MONAI's runner."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch
from nibabel.processing import resample_to_output

import dwc
from dwc import cli
from dwc.data.grid import Grid

pytest_plugins = ["tests.tiny_runs"]
pytestmark = pytest.mark.usefixtures("one_thread")

REQUIRED = {  # by MONAI's schema of metadata.json
    "schema", "version", "monai_version", "pytorch_version", "numpy_version", "required_packages_version", "task",
    "description", "authors", "copyright", "network_data_format",
}  # fmt: skip


def exported(network: str, form: str, out: Path) -> Path:
    assert cli.main(["export", network, "--format", form, "--out", str(out)]) == 0
    return out


def in_scheme(posterior: dwc.Posterior, intensity: str, activation: str, path: Path) -> str:
    """A network as if it had been trained with another scaling of intensities and another activation."""
    metadata = json.loads(json.dumps(posterior.metadata))
    metadata["preprocessing"]["intensity"], metadata["architecture"]["activation"] = intensity, activation
    dwc.Posterior(posterior.mu, {}, metadata).save(path)
    return str(path)


@pytest.mark.parametrize("activation", ["relu", "elu"])
def test_onnx_gives_the_logits_at_the_means_for_any_size(networks, tmp_path, activation):
    network = in_scheme(networks["finetune"], "min-max per volume", activation, tmp_path / "net.safetensors")
    path = exported(network, "onnx", tmp_path / "net.onnx")
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path)
    for shape in ((1, 1, 32, 32, 32), (3, 1, 5, 7, 12)):
        image = torch.randn(shape)
        (logits,) = session.run(["logits"], {"image": image.numpy()})
        np.testing.assert_allclose(logits, dwc.load_network(network)(image).detach(), atol=1e-4, rtol=0)


def test_an_onnx_model_says_how_to_scale_a_scan_and_what_its_classes_are(networks, tmp_path):
    path = exported(networks["finetune"].name, "onnx", tmp_path / "net.onnx")
    about = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    assert about["intensity"].startswith("z-score per volume: (x - mean) / standard deviation")
    assert (json.loads(about["grid_size"]), json.loads(about["voxel_size_mm"]), about["orientation"]) == (32, 1, "LIA")
    label_map = dwc.load_network(networks["finetune"].name).preprocessing.label_map
    labels = json.loads(about["labels"])
    assert [label["name"] for label in labels] == list(label_map.titles)
    assert [label["index"] for label in labels] == label_map.to_ids(np.arange(9)).tolist()
    assert about["posterior_sha256"] == networks["finetune"].sha256


def run_monai(bundle: Path, *words) -> None:
    """MONAI's runner in a process that finds neither dwc nor this source tree."""
    code = "import sys; sys.modules['dwc'] = sys.modules['dwc_kernels'] = None; sys.argv[0] = 'monai.bundle'; "
    code += "import runpy; runpy.run_module('monai.bundle', run_name='__main__', alter_sys=False)"
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(words, cwd=bundle, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "intensity", ["z-score per volume", "quantiles 0.05 to 0.95 per volume, the upper near white matter"]
)
def test_monais_runner_segments_conformed_scans_as_predict_does(networks, site, tmp_path, intensity):
    network = in_scheme(networks["finetune"], intensity, "relu", tmp_path / "net.safetensors")
    bundle, scans = exported(network, "bundle", tmp_path / "bundle"), tmp_path / "scans"
    scans.mkdir()
    affine = Grid(32, 1.0).affine(np.array([3.0, -20, 8]))
    for n in (2, 3):
        voxels = np.asarray(nibabel.load(site / f"sub-{n}_T1w.nii.gz").dataobj)
        nibabel.save(nibabel.Nifti1Image(voxels, affine), scans / f"sub-{n}.nii.gz")
    run_monai(
        bundle, "run", "--config_file", "configs/inference.json", "--bundle_root", ".", "--dataset_dir", scans,
        "--output_dir", tmp_path / "results", "--device", "$torch.device('cpu')",
    )  # fmt: skip
    for n in (2, 3):
        theirs = nibabel.load(tmp_path / "results" / f"sub-{n}_dseg.nii.gz")
        ours = dwc.predict(network, scans / f"sub-{n}", dwc.PredictionSettings(device="cpu")).labels()
        np.testing.assert_allclose(theirs.affine, ours.affine)
        np.testing.assert_array_equal(np.asarray(theirs.dataobj), np.asarray(ours.dataobj))
        assert theirs.get_data_dtype() == np.int16


@pytest.mark.published
def test_monais_runner_agrees_with_predict_on_a_real_scan_conformed_or_not(shared_data, tmp_path):
    """The second scan is the first one with other voxels, axes and intensities; on it only resampling differs."""
    rows = (f"{index}\t{k}\t{name}\n" for index, k, name in ((0, 0, "Background"), (2, 1, "White"), (3, 2, "Grey")))
    (tmp_path / "three.tsv").write_text("index\tclass\tname\n" + "".join(rows))
    network, scans = tmp_path / "net.safetensors", tmp_path / "scans"
    model, words = str(shared_data / "networks" / "model5_gw_ae"), ["--label-map", str(tmp_path / "three.tsv")]
    assert cli.main(["import", model, *words, "--out", str(network)]) == 0
    assert cli.main(["export", str(network), *words, "--format", "bundle", "--out", str(tmp_path / "bundle")]) == 0
    scans.mkdir()
    conformed = nibabel.load(shared_data / "real" / "S1_T1w.nii.gz")
    nibabel.save(conformed, scans / "conformed.nii.gz")
    other = nibabel.as_closest_canonical(resample_to_output(conformed, (0.9, 1.1, 1.2), order=1))
    nibabel.save(nibabel.Nifti1Image((7 * other.get_fdata()).astype(np.int16), other.affine), scans / "other.nii.gz")
    run_monai(
        tmp_path / "bundle", "run", "--config_file", "configs/inference.json", "--bundle_root", ".",
        "--dataset_dir", scans, "--output_dir", tmp_path / "results", "--device", "$torch.device('cpu')",
    )  # fmt: skip
    agreement = {}
    for name in ("conformed", "other"):
        settings = dwc.PredictionSettings(device="cpu", label_map=str(tmp_path / "three.tsv"))
        ours = np.asarray(dwc.predict(network, scans / name, settings).labels().dataobj)
        theirs = np.asarray(nibabel.load(tmp_path / "results" / f"{name}_dseg.nii.gz").dataobj)
        agreement[name] = [
            2 * ((ours == k) & (theirs == k)).sum() / ((ours == k).sum() + (theirs == k).sum()) for k in (2, 3)
        ]
    print({name: [round(float(dice), 4) for dice in both] for name, both in agreement.items()})
    assert min(agreement["conformed"]) > 0.9999
    assert min(agreement["other"]) > 0.9


def test_the_bundles_metadata_are_complete_and_true_of_its_network(networks, tmp_path):
    bundle = exported(networks["finetune"].name, "bundle", tmp_path / "bundle")
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    assert metadata.keys() >= REQUIRED
    assert metadata["network_data_format"]["outputs"]["pred"]["channel_def"]["1"] == "White-Matter"
    run_monai(
        bundle, "verify_net_in_out", "network_def", "--meta_file", "configs/metadata.json",
        "--config_file", "configs/inference.json", "--device", "cpu",
    )  # fmt: skip


def test_a_bundle_holds_the_means_without_pickle(networks, tmp_path):
    bundle = exported(networks["finetune"].name, "bundle", tmp_path / "bundle")
    weights = safetensors.torch.load_file(bundle / "models" / "model.safetensors")
    assert torch.equal(weights["0.weight"], networks["finetune"].mu["layers.0.weight"])
    files = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert files == {
        "configs/metadata.json", "configs/inference.json", "models/model.safetensors", "docs/README.md",
        "scripts/__init__.py", "scripts/head.py", "scripts/intensity.py", "scripts/transforms.py",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "onnx", "--out", "net.pt"], "--out net.pt: name it net.pt.onnx"),
        (["--format", "onnx", "--out", "there.onnx"], "there.onnx: exists already; give another --out, or --overwrite"),
        (["--format", "onnx", "--out", "no/net.onnx"], "no: no such folder; create it or give another --out"),
        (["--format", "bundle", "--out", "."], ".: is not empty; give an empty or new folder"),
        (["--format", "bundle", "--out", "there.onnx"], "there.onnx: is a file; give a folder"),
        (["--format", "bundle", "--out", "b", "--overwrite"], "--overwrite is for .onnx files"),
        (["--format", "tflite", "--out", "b"], "--format tflite: choose one of bundle, onnx"),
    ],
)
def test_what_cannot_be_written_is_refused_in_one_line(networks, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.onnx").touch()
    assert cli.main(["export", networks["finetune"].name, *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize("library", ["onnx", "onnxscript"])
def test_a_missing_extra_is_named(networks, tmp_path, monkeypatch, capsys, library):
    monkeypatch.setitem(sys.modules, library, None)
    words = ["export", networks["map"].name, "--format", "onnx", "--out", str(tmp_path / "net.onnx")]
    assert cli.main(words) == 2
    assert capsys.readouterr().err == f"dwc: dwc export needs {library}: pip install '.[export]' in the clone of dwc\n"
