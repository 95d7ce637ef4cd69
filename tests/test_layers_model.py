"""Importing TensorFlow.js layers-models: the function of the published layers, or one line that says what is wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import batch_norm, conv3d, elu, relu

from dwc import cli
from dwc.base.errors import InputError
from dwc.layers_model import import_network
from dwc.meshnet import MeshNet
from dwc.posterior import Posterior
from tests.made_models import COARSE, Model, conv, layers_of, tensors_of, write

pytestmark = pytest.mark.usefixtures("one_thread")
pytest_plugins = ["tests.tiny_runs"]


def change(folder: Path, edit: Any) -> None:
    model = json.loads((folder / "model.json").read_text())
    edit(model)
    (folder / "model.json").write_text(json.dumps(model))


def published(layers: list[Model], tensors: dict[str, np.ndarray], x: torch.Tensor) -> torch.Tensor:
    """What the layers compute, in float64, one after the other."""
    weight = {name: torch.from_numpy(tensor).double() for name, tensor in tensors.items()}
    for layer in layers:
        config, name = layer["config"], layer["config"]["name"]
        if layer["class_name"] == "Conv3D":
            kernel, dilation = weight[f"{name}/kernel"].permute(4, 3, 0, 1, 2), config["dilation_rate"]
            x = conv3d(x, kernel, weight[f"{name}/bias"], padding="same", dilation=dilation)
        elif layer["class_name"] == "BatchNormalization":
            parts = (weight[f"{name}/{part}"] for part in ("moving_mean", "moving_variance", "gamma", "beta"))
            x = batch_norm(x, *parts, eps=config["epsilon"])
        elif layer["class_name"] == "Activation":
            x = {"relu": relu, "elu": elu}[config["activation"]](x)
    return x


@pytest.mark.parametrize("normalized", [False, True], ids=["folded", "with batch normalization"])
@pytest.mark.parametrize("kind", ["relu", "elu"])
def test_an_imported_network_computes_what_its_layers_compute(tmp_path, kind, normalized):
    layers = layers_of(kind, normalized=normalized)
    posterior = import_network(write(tmp_path / "m", layers), COARSE)
    network = MeshNet.from_posterior(posterior).double()
    x = torch.randn(1, 1, 7, 8, 9, dtype=torch.float64)
    torch.testing.assert_close(network(x), published(layers, tensors_of(layers), x), rtol=1e-5, atol=1e-5)
    assert not posterior.is_bayesian
    assert posterior.metadata["architecture"] == {
        "network": "MeshNet", "n_classes": 9, "width": 4, "dilations": [1, 2], "in_channels": 1, "activation": kind,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("entries", "given", "scheme", "source"),
    [
        ({}, None, "min-max per volume", "brainchop's default"),
        (
            {"_normalize": {"type": "quantile"}},
            None,
            "quantiles 0.05 to 0.95 per volume, the upper near white matter",
            "model.json asks for quantiles",
        ),
        ({"_normalize": {"type": "quantile"}}, "z_score", "z-score per volume", "given at the import"),
    ],
)
def test_the_intensity_scheme_comes_from_the_model_or_from_the_user(tmp_path, entries, given, scheme, source):
    header = import_network(write(tmp_path / "m", layers_of("elu"), **entries), COARSE, given).metadata
    assert header["preprocessing"]["intensity"] == scheme
    assert header["provenance"]["intensity_from"] == source


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"type": "quantile", "min": 2, "max": 98}, 'scaled as {"type": "quantile", "min": 2, "max": 98}, which'),
        ({"type": "z"}, 'scaled as {"type": "z"}, which dwc does not offer'),
        ({"type": "quantile", "min": "low"}, "its _normalize: min low"),
        ("quantile", "its _normalize: entry quantile"),
    ],
)
def test_a_scaling_that_dwc_has_not_is_refused_unless_another_is_chosen(tmp_path, asked, message):
    folder = write(tmp_path / "m", layers_of("elu"), _normalize=asked)
    with pytest.raises(InputError, match=message):
        import_network(folder, COARSE)
    header = import_network(folder, COARSE, "quantile").metadata
    assert header["provenance"]["intensity_from"] == "given at the import"


def test_the_header_says_where_the_network_is_from(tmp_path):
    folder = write(tmp_path / "m", layers_of("elu"))
    provenance = import_network(folder / "model.json", COARSE).metadata["provenance"]
    assert provenance["source"] == "TensorFlow.js layers-model m"
    assert provenance["sha256"].keys() == {"model.json", "a.bin", "b.bin"}
    assert "licence" in provenance["licence"]


def test_sequential_models_activations_inside_layers_and_the_final_softmax_are_understood(tmp_path):
    layers = [
        conv("c0", 4, activation="elu"), conv("c1", 4, dilation=2, use_bias=False),
        {"class_name": "ELU", "config": {"name": "e", "alpha": 1.0}}, conv("out", 9, 1, padding="valid"),
        {"class_name": "Softmax", "config": {"name": "s"}},
    ]  # fmt: skip
    tensors = {name: tensor for name, tensor in tensors_of(layers).items() if name != "c1/bias"}
    folder = write(tmp_path / "m", layers, tensors)
    sequential = {"class_name": "Sequential", "config": {"layers": layers}}
    change(folder, lambda model: model.update(modelTopology=sequential))
    posterior = import_network(folder, COARSE)
    assert posterior.metadata["architecture"]["activation"] == "elu"
    assert not posterior.mu["layers.1.bias"].any()


def _config(model: Model, layer: int) -> Model:
    return model["modelTopology"]["model_config"]["config"]["layers"][layer]["config"]


def _layer(model: Model, layer: int) -> Model:
    return model["modelTopology"]["model_config"]["config"]["layers"][layer]


def _group(model: Model) -> Model:
    return model["weightsManifest"][0]


FAULTS = {  # layers: input 0, convolution 1, activation 2, dropout 3, convolution 4, activation 5, dropout 6, last 7
    "a strided layer": (lambda m: _config(m, 1).update(strides=[2, 2, 2]), "c0: strides.0 2"),
    "an unpadded layer": (lambda m: _config(m, 1).update(padding="valid"), "padding valid"),
    "an unknown padding": (lambda m: _config(m, 1).update(padding="reflect"), "padding reflect"),
    "grouped filters": (lambda m: _config(m, 1).update(groups=2), "groups 2"),
    "channels first": (lambda m: _config(m, 1).update(data_format="channels_first"), "data_format channels_first"),
    "an unknown activation": (lambda m: _config(m, 2).update(activation="swish"), "activation swish"),
    "two activations": (lambda m: _config(m, 2).update(activation="elu"), "c1 has activation relu"),
    "no activation": (lambda m: _config(m, 2).update(activation="linear"), "c0 has activation linear"),
    "an activation of the last layer": (lambda m: _config(m, 7).update(activation="relu"), "ends with a 1x1x1"),
    "uneven dilations": (lambda m: _config(m, 1).update(dilation_rate=[1, 1, 2]), "one dilation for all axes"),
    "a dilation that is no number": (lambda m: _config(m, 1).update(dilation_rate=["a", 1, 1]), "dilation_rate.0 a"),
    "a kernel of 5": (lambda m: _config(m, 1).update(kernel_size=[5, 5, 5]), "kernel_size.0 5"),
    "two channels of input": (lambda m: _config(m, 0).update(batch_input_shape=[None, 9, 9, 9, 2]), "in: batch_input"),
    "a layer of another kind": (lambda m: _layer(m, 2).update(class_name="UpSampling3D"), "a0 is a UpSampling3D"),
    "a skip connection": (lambda m: _layer(m, 4)["inbound_nodes"][0].append(["c0", 0, 0, {}]), "c1 does not follow"),
    "an output from the middle": (
        lambda m: m["modelTopology"]["model_config"]["config"].update(output_layers=[["a0", 0, 0]]),
        "its output is not",
    ),
    "nodes that are no list": (lambda m: _layer(m, 4).update(inbound_nodes={"a": 1}), "c1 does not follow"),
    "a graph-model": (lambda m: m.update(format="graph-model"), "not a TensorFlow.js layers-model"),
    "no topology": (lambda m: m.pop("modelTopology"), "modelTopology"),
    "no layers": (lambda m: m["modelTopology"]["model_config"]["config"].update(layers=[]), "has no layers"),
    "a layer that is no object": (
        lambda m: m["modelTopology"]["model_config"]["config"]["layers"].append(3), "layer 8",
    ),
    "no manifest": (lambda m: m.pop("weightsManifest"), "has no weightsManifest"),
    "a missing file": (lambda m: _group(m).update(paths=["a.bin", "c.bin"]), "c.bin: no such file"),
    "a file outside": (lambda m: _group(m).update(paths=["a.bin", "../b.bin"]), "'../b.bin' is not in its folder"),
    "an absolute file": (lambda m: _group(m).update(paths=["/etc/passwd"]), "'/etc/passwd' is not in its folder"),
    "a file on the net": (lambda m: _group(m).update(paths=["http://a.org/b"]), "is not in its folder"),
    "too few bytes": (lambda m: _group(m).update(paths=["a.bin"]), "holds 50 bytes, but the manifest lists"),
    "too many bytes": (lambda m: _group(m).update(paths=["a.bin", "b.bin", "a.bin"]), "bytes, but the manifest"),
    "quantized weights": (
        lambda m: _group(m)["weights"][0].update(quantization={"dtype": "uint8", "scale": 0.1}), "quantization",
    ),
    "halves": (lambda m: _group(m)["weights"][0].update(dtype="float16"), "dtype float16"),
    "a negative shape": (lambda m: _group(m)["weights"][0].update(shape=[-3, 3, 3, 1, 4]), "shape.0 -3"),
    "a shape of another layer": (lambda m: _group(m)["weights"][0].update(shape=[3, 3, 1, 3, 4]), "has shape"),
    "a tensor twice": (lambda m: _group(m)["weights"][2].update(name="c0/kernel"), "c0/kernel twice"),
    "a tensor of no layer": (lambda m: _config(m, 1).update(use_bias=False), "c0/bias belongs to no layer"),
    "a tensor under another name": (lambda m: _group(m)["weights"][0].update(name="x/kernel"), "no tensor c0/kernel"),
    "filters that differ": (lambda m: _config(m, 1).update(filters=5), "has shape"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_that_is_no_meshnet_or_damaged_is_refused_in_one_line(tmp_path, fault):
    folder = write(tmp_path / "m", layers_of("relu"))
    edit, words = FAULTS[fault]
    change(folder, edit)
    with pytest.raises(InputError, match=words) as refusal:
        import_network(folder, COARSE)
    assert "\n" not in str(refusal.value)
    assert str(tmp_path) in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "not JSON"), (b"{", "not JSON"), (b"\xff\xfe", "not JSON"), (b"[" * 100_000, "not JSON"),
        (b"3", "not a TensorFlow.js"), (b"{}", "weightsManifest"), (b" " * (17 << 20), "more than 16777216"),
    ],
)  # fmt: skip
def test_a_model_json_that_is_none_is_refused(tmp_path, text, words):
    (tmp_path / "model.json").write_bytes(text)
    with pytest.raises(InputError, match=f"model.json: .*{words}"):
        import_network(tmp_path, COARSE)


@pytest.mark.parametrize("given", ["none", "none/model.json"])
def test_a_folder_that_is_not_there_is_refused_naming_the_model_json_that_is_looked_for(tmp_path, given):
    with pytest.raises(InputError, match=f"^{tmp_path}/none/model.json: no such file; check the path$"):
        import_network(tmp_path / given, COARSE)


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path):
    layers = layers_of("relu")
    tensors = tensors_of(layers)
    tensors["c1/bias"][2] = np.nan
    with pytest.raises(InputError, match="c1/bias holds non-finite values"):
        import_network(write(tmp_path / "m", layers, tensors), COARSE)


def test_layers_of_different_widths_are_refused(tmp_path):
    layers = layers_of("relu")
    layers[4] = conv("c1", 5)
    with pytest.raises(InputError, match="c1 has 5 filters, not 4"):
        import_network(write(tmp_path / "m", layers), COARSE)


def test_batch_normalization_after_the_activation_is_refused_since_padding_tells_the_difference(tmp_path):
    layers = layers_of("relu", normalized=True)
    layers[2], layers[3] = layers[3], layers[2]
    with pytest.raises(InputError, match="b0, a BatchNormalization, follows no convolution"):
        import_network(write(tmp_path / "m", layers), COARSE)


def test_import_as_a_user_types_it_writes_a_network_that_can_be_inspected(tmp_path, capsys):
    folder, out = write(tmp_path / "m", layers_of("elu")), tmp_path / "net.safetensors"
    command = ["import", str(folder), "--label-map", "coarse", "--intensity", "quantile", "--out", str(out)]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "9 classes, 4 filters, dilations 1 2, elu; intensity quantiles 0.05 to 0.95 per volume" in said
    assert Posterior.load(out).metadata["label_map"]["name"] == "coarse"
    assert cli.main(["posterior", "inspect", str(out)]) == 0
    assert "provenance: where an imported network comes from" in capsys.readouterr().out
    assert cli.main(command) == 2
    assert "exists already" in capsys.readouterr().err
    assert cli.main([*command, "--overwrite"]) == 0


def test_a_label_map_of_another_number_of_classes_is_refused_naming_both(tmp_path, capsys):
    folder = write(tmp_path / "m", layers_of("relu"))
    assert cli.main(["import", str(folder), "--label-map", "fifty", "--out", str(tmp_path / "n.safetensors")]) == 2
    said = capsys.readouterr().err
    assert "has 9 classes, but label map fifty has 50; give the table of its classes as --label-map" in said
    assert not (tmp_path / "n.safetensors").exists()
