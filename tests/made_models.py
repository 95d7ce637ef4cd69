"""Made-up TensorFlow.js layers-models of a few filters, for tests of the import."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np

from dwc.data.labels import LabelMap

DILATIONS = (1, 2)
COARSE = LabelMap.load("coarse")  # 9 classes
Model = dict[str, Any]


def conv(name: str, filters: int, kernel: int = 3, dilation: int = 1, **config: Any) -> Model:
    whole = {
        "name": name, "filters": filters, "kernel_size": [kernel] * 3, "strides": [1, 1, 1], "padding": "same",
        "data_format": "channels_last", "dilation_rate": [dilation] * 3, "activation": "linear", "use_bias": True,
    }  # fmt: skip
    return {"class_name": "Conv3D", "config": {**whole, **config}}


def activation(name: str, kind: str) -> Model:
    return {"class_name": "Activation", "config": {"name": name, "activation": kind}}


def layers_of(kind: str, *, normalized: bool = False) -> list[Model]:
    layers: list[Model] = [
        {"class_name": "InputLayer", "config": {"name": "in", "batch_input_shape": [None, 9, 9, 9, 1]}}
    ]
    for n, dilation in enumerate(DILATIONS):
        layers.append(conv(f"c{n}", 4, dilation=dilation))
        if normalized:
            layers.append(
                {"class_name": "BatchNormalization", "config": {"name": f"b{n}", "axis": [4], "epsilon": 0.01}}
            )
        layers += [activation(f"a{n}", kind), {"class_name": "Dropout", "config": {"name": f"d{n}", "rate": 0.1}}]
    return [*layers, conv("out", COARSE.n_classes, 1)]


def chained(layers: list[Model]) -> Model:
    before: list[Any] = []
    for layer in layers:
        layer["name"], layer["inbound_nodes"] = layer["config"]["name"], before
        before = [[[layer["name"], 0, 0, {}]]]
    config = {"layers": layers, "input_layers": [["in", 0, 0]], "output_layers": [[layers[-1]["name"], 0, 0]]}
    return {"model_config": {"class_name": "Functional", "config": config}}


def tensors_of(layers: list[Model], seed: int = 0) -> dict[str, np.ndarray]:
    rng, tensors, channels = np.random.default_rng(seed), {}, 1
    for layer in layers:
        config, name = layer["config"], layer["config"]["name"]
        if layer["class_name"] == "Conv3D":
            shape = (*config["kernel_size"], channels, channels := config["filters"])
            tensors |= {
                f"{name}/kernel": 0.3 * rng.standard_normal(shape),
                f"{name}/bias": rng.standard_normal(channels),
            }
        if layer["class_name"] == "BatchNormalization":
            parts = ("gamma", "beta", "moving_mean", "moving_variance")
            tensors |= {f"{name}/{part}": 0.5 + rng.random(channels) for part in parts}
    return {name: tensor.astype("<f4") for name, tensor in tensors.items()}


def write(folder: Path, layers: list[Model], tensors: dict[str, np.ndarray] | None = None, **entries: Any) -> Path:
    """A model of two weight files, the second of which begins in the middle of a tensor."""
    tensors = tensors_of(layers) if tensors is None else tensors
    content = b"".join(tensor.tobytes() for tensor in tensors.values())
    folder.mkdir(exist_ok=True)
    (folder / "a.bin").write_bytes(content[:50])
    (folder / "b.bin").write_bytes(content[50:])
    weights = [{"name": name, "shape": list(t.shape), "dtype": "float32"} for name, t in tensors.items()]
    model = {
        "format": "layers-model", "modelTopology": chained(copy.deepcopy(layers)),
        "weightsManifest": [{"paths": ["a.bin", "b.bin"], "weights": weights}], **entries,
    }  # fmt: skip
    (folder / "model.json").write_text(json.dumps(model))
    return folder
