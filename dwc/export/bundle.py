"""A network at its means as a MONAI bundle: it runs on MONAI alone, without dwc, and its weights are not pickled."""

import importlib.resources
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch

from dwc import __version__
from dwc.base.errors import InputError
from dwc.base.files import open_folder, write_whole
from dwc.export.network import facts, plain_layers, plain_network
from dwc.posterior import Posterior
from dwc.preprocessing import Preprocessing

__all__ = ["write_bundle"]

_SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
_SCRIPTS = {  # module of dwc: its name in the bundle's folder `scripts`
    "dwc.data.head": "head",
    "dwc.data.intensity": "intensity",
    "dwc.export.bundle_transforms": "transforms",
}
_WEIGHTS = "models/model.safetensors"


def write_bundle(posterior: Posterior, out: Path, label_map: str | None = None) -> None:
    """Write a bundle into an empty or new folder."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; give a folder")
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out}: is not empty; give an empty or new folder")
    preprocessing = Preprocessing.of(posterior, label_map)
    contents = {
        "configs/metadata.json": _json(_metadata(posterior, preprocessing)),
        "configs/inference.json": _json(_inference(posterior, preprocessing)),
        _WEIGHTS: safetensors.torch.save(dict(plain_network(posterior).state_dict())),
        "docs/README.md": _readme(posterior, preprocessing).encode(),
        "scripts/__init__.py": b"",
        **{f"scripts/{name}.py": _source(module) for module, name in _SCRIPTS.items()},
    }
    for name, content in contents.items():
        open_folder((out / name).parent)
        write_whole(out / name, content)


def _inference(posterior: Posterior, preprocessing: Preprocessing) -> dict[str, Any]:
    """The configuration that MONAI's runner executes."""
    grid, label_map = preprocessing.grid, preprocessing.label_map
    ids = [label["index"] for label in facts(posterior, preprocessing)["labels"]]
    labels_type = "numpy.int16" if max(label_map.ids) < 2**15 else "numpy.int32"

    def transform(name: str, keys: str = "image", **arguments: Any) -> dict[str, Any]:
        return {"_target_": name, "keys": keys, **arguments}

    return {
        "imports": [
            "$import glob", "$import numpy", "$import os", "$from safetensors.torch import load_file", "$import torch",
            "$import scripts.transforms as transforms",
        ],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/scans'",
        "output_dir": "$@bundle_root + '/eval'",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "datalist": "$[{'image': path} for path in sorted(glob.glob(os.path.join(@dataset_dir, '*.nii*')))]",
        "weights": f"$load_file(@bundle_root + '/{_WEIGHTS}')",
        "layers": plain_layers(posterior),
        "network_def": "$torch.nn.Sequential(*@layers)",
        "network": "$@network_def.to(@device)",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                transform("LoadImaged", ensure_channel_first=True, dtype=None),
                transform("Lambdad", func="$transforms.grey_levels"),
                transform("Orientationd", axcodes="LIA", labels=None),
                transform("Spacingd", pixdim=[grid.voxel_size] * 3, mode="bilinear"),
                transform("ResizeWithPadOrCropd", spatial_size=list(grid.shape)),
                transform("CopyItemsd", names="head"),
                transform("Lambdad", "head", func="$transforms.head"),
                transform("Lambdad", func=f"$lambda image: transforms.scaled(image, {preprocessing.intensity!r})"),
            ],
        },
        "dataset": {"_target_": "Dataset", "data": "@datalist", "transform": "@preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1},
        "inferer": {"_target_": "SimpleInferer"},
        "ids": ids,
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                transform("AsDiscreted", "pred", argmax=True),
                transform("MaskIntensityd", "pred", mask_key="head"),
                transform("Lambdad", "pred", func="$lambda classes: transforms.label_ids(classes, @ids)"),
                transform(
                    "Invertd", "pred", transform="@preprocessing", orig_keys="image", nearest_interp=True,
                    to_tensor=True,
                ),
                transform(
                    "SaveImaged", "pred", output_dir="@output_dir", output_postfix="dseg", separate_folder=False,
                    output_dtype=f"${labels_type}", resample=False,
                ),
            ],
        },
        "evaluator": {
            "_target_": "SupervisedEvaluator", "device": "@device", "val_data_loader": "@dataloader",
            "network": "@network", "inferer": "@inferer", "postprocessing": "@postprocessing",
        },
        "run": ["$@network_def.load_state_dict(@weights)", "$@evaluator.run()"],
    }  # fmt: skip


def _metadata(posterior: Posterior, preprocessing: Preprocessing) -> dict[str, Any]:
    """The bundle's metadata.json."""
    titles = preprocessing.label_map.titles
    image = {"type": "image", "format": "magnitude", "num_channels": 1, "dtype": "float32", "is_patch_data": False}
    image |= {"modality": "MR", "spatial_shape": ["*", "*", "*"], "value_range": [], "channel_def": {"0": "T1 image"}}
    pred = {**image, "format": "segmentation", "num_channels": len(titles)}
    pred["channel_def"] = {str(k): title for k, title in enumerate(titles)}
    del pred["modality"]
    return {
        "schema": _SCHEMA,
        "version": __version__,
        "changelog": {__version__: "written by dwc export"},
        "monai_version": _installed("monai", "1.6.1"),
        "pytorch_version": _installed("torch"),
        "numpy_version": _installed("numpy"),
        "required_packages_version": {
            "nibabel": _installed("nibabel"),
            "safetensors": _installed("safetensors"),
            "pytorch-ignite": _installed("pytorch-ignite", "0.5.5"),
        },
        "name": "dwc segmentation of T1 scans",
        "task": f"Segmentation of a T1-weighted MRI of the head into {len(titles)} classes",
        "description": "The network of a posterior at its means. Draws of its weights, and so uncertainty, need dwc.",
        "authors": "those who trained the network, with dwc",
        "copyright": "of the network: those who trained it; of the scripts: the dwc developers, Apache-2.0",
        "data_type": "nibabel",
        "image_classes": "one channel, scaled intensities",
        "pred_classes": "logits of each class; the saved label ids are listed in dwc.labels",
        "network_data_format": {"inputs": {"image": image}, "outputs": {"pred": pred}},
        "dwc": facts(posterior, preprocessing),
    }


def _readme(posterior: Posterior, preprocessing: Preprocessing) -> str:
    about, grid = facts(posterior, preprocessing), preprocessing.grid
    gigabytes = 2 * 4 * posterior.metadata["architecture"]["width"] * grid.size**3 / 1e9
    rows = "".join(f"| {label['index']} | {label['name']} |\n" for label in about["labels"])
    return f"""# Segmentation of T1 scans into {len(about["labels"])} classes

Written by dwc {__version__} from the posterior with SHA-256 `{about["posterior_sha256"]}`: its network at its means.
It needs MONAI with fire and pytorch-ignite, nibabel and safetensors, but not dwc.

From this bundle's folder, with scans (`*.nii.gz`) in a folder SCANS:

    python -m monai.bundle run --config_file configs/inference.json --bundle_root . \\
      --dataset_dir SCANS --output_dir RESULTS

writes the label ids of each scan, on its own grid, to `RESULTS/NAME_dseg.nii.gz`.

- Scans are brought to {grid.size}^3 voxels of {grid.voxel_size:g} mm in LIA orientation. Their intensities are scaled:
  {about["intensity"]}.
- On a scan that is conformed already the result is that of `dwc predict` with the means, but for rounding. Others are
  resampled by MONAI, about another centre than FreeSurfer's and back by the nearest voxel, so that borders move.
- A scan goes through the network as a whole, which takes about {gigabytes:.1f} GB.

| id | structure |
| --- | --- |
{rows}"""


def _source(module: str) -> bytes:
    """The source of a module of dwc as one of the bundle's."""
    package, _, name = module.rpartition(".")
    text = (importlib.resources.files(package) / f"{name}.py").read_text(encoding="utf-8")
    for theirs, ours in _SCRIPTS.items():
        text = text.replace(f"from {theirs} import", f"from scripts.{ours} import")
    return text.encode()


def _installed(package: str, otherwise: str = "") -> str:
    try:
        return version(package).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return otherwise


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
