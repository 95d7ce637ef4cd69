"""Read a TensorFlow.js layers-model, as brainchop publishes MeshNets, into a MAP posterior.

A model is a folder of model.json (the layers, and a manifest of tensors in order) and files of little-endian float32.
Everything in it is checked, since it comes from elsewhere; nothing in it is executed.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, Field, ValidationError

from dwc.base.errors import InputError, one_line
from dwc.data.constants import SIDE
from dwc.data.grid import Grid
from dwc.data.intensity import IN_HEADERS, QUANTILES, Scheme
from dwc.data.labels import LabelMap
from dwc.data.paths import existing_file, unreadable
from dwc.meshnet import describe
from dwc.posterior import Posterior

__all__ = ["MODEL", "import_network"]

MODEL = "model.json"
_MAX_JSON = 16 << 20  # bytes
_MAX_WEIGHTS = 1 << 30  # bytes
_MAX_SHARDS = 256
_IDLE = ("Dropout", "SpatialDropout3D")  # layers that do nothing in prediction
_LICENCE = "the weights keep their publisher's licence (brainchop's models: MIT, neuroneural); pass it on with them"
_M = TypeVar("_M", bound=BaseModel)
_Size = Annotated[int, Field(gt=0, strict=True)]
_Name = Annotated[str, Field(max_length=200)]


class _Tensor(BaseModel):
    name: _Name
    shape: tuple[_Size, ...]
    dtype: Literal["float32"]
    quantization: None = None


class _Group(BaseModel):
    paths: list[_Name]
    weights: list[_Tensor]


class _Layer(BaseModel):
    class_name: _Name
    config: dict[str, Any]
    inbound_nodes: Any = None

    @property
    def name(self) -> str:
        return str(self.config.get("name"))


class _Graph(BaseModel):
    class_name: Literal["Functional", "Model", "Sequential"]
    config: dict[str, Any]


class _Input(BaseModel):
    """A scan: one channel, last."""

    batch_input_shape: tuple[Any, Any, Any, Any, Literal[1]]


class _Convolution(BaseModel):
    filters: _Size
    kernel_size: tuple[Literal[1, 3], Literal[1, 3], Literal[1, 3]]
    strides: tuple[Literal[1], Literal[1], Literal[1]] = (1, 1, 1)
    padding: Literal["same", "valid"]
    dilation_rate: tuple[_Size, _Size, _Size] = (1, 1, 1)
    data_format: Literal["channels_last"] = "channels_last"
    groups: Literal[1] = 1
    use_bias: bool = True
    activation: str = "linear"


class _Normalization(BaseModel):
    axis: Literal[4, -1] | tuple[Literal[4, -1]] = -1
    epsilon: Annotated[float, Field(gt=0)] = 1e-3
    scale: bool = True
    center: bool = True


class _Activation(BaseModel):
    activation: Literal["relu", "elu", "linear", "softmax"]


class _Normalize(BaseModel):
    """How brainchop scales a scan for the model; the quantiles are percent."""

    type: _Name
    min: float = 100 * QUANTILES[0]
    max: float = 100 * QUANTILES[1]


class _ReLU(BaseModel):
    max_value: None = None
    negative_slope: Literal[0, None] = 0
    threshold: Literal[0, None] = 0


class _ELU(BaseModel):
    alpha: Literal[1] = 1


class _Folded:
    """A convolution, fp64, with the normalization after it folded in, and the activation after that."""

    def __init__(self, name: str, config: _Convolution, kernel: np.ndarray, bias: np.ndarray) -> None:
        self.name, self.config, self.kernel, self.bias = name, config, kernel, bias
        self.activation = "linear"


def import_network(folder: str | Path, label_map: LabelMap, intensity: Scheme | None = None) -> Posterior:
    """A MeshNet published as a TensorFlow.js layers-model, as a MAP posterior on the 256^3 grid of 1 mm.

    Parameters
    ----------
    folder : path
        The model's folder, or the model.json in it.
    label_map : LabelMap
        What the network's classes are, in its order.
    intensity : str, optional
        How scans were scaled for the network. By default `quantile` if model.json asks for quantiles (`_normalize`),
        else `min_max`, as brainchop does.
    """
    path = Path(folder)
    path = existing_file(path if path.suffix == ".json" or path.is_file() else path / MODEL)
    text = _read(path, _MAX_JSON)
    model = _json(path, text)
    groups = _manifest(path, model)
    shards = [[_read(shard, _MAX_WEIGHTS) for shard in _shards(path, group)] for group in groups]
    weights = _weights(path, groups, [b"".join(parts) for parts in shards])
    layers = _convolutions(path, _layers(path, model), weights)
    if weights:
        raise InputError(f"{path}: its tensor {min(weights)} belongs to no layer; download the model again")
    dilations, activation = _meshnet(path, layers)
    n_classes, width = layers[-1].config.filters, layers[0].config.filters
    if n_classes != label_map.n_classes:
        raise InputError(
            f"{path}: has {n_classes} classes, but label map {label_map.name} has {label_map.n_classes}; "
            "give the table of its classes as `label_map`"
        )
    by_quantile = intensity is None and _asks_for_quantiles(path, model)
    known: Scheme = "quantile" if by_quantile else "min_max"
    source = "model.json asks for quantiles" if by_quantile else "brainchop's default"
    names = [name for group in groups for name in group.paths]
    files = zip([MODEL, *names], [text, *(part for parts in shards for part in parts)], strict=True)
    grid = Grid()
    metadata = {
        "architecture": describe(n_classes, width, dilations, activation=activation),
        "label_map": {"name": label_map.name, "sha256": label_map.sha256},
        "preprocessing": {
            "grid_size": grid.size,
            "voxel_size": grid.voxel_size,
            "sub_volume": SIDE,
            "intensity": IN_HEADERS[intensity or known],
        },
        "provenance": {
            "source": f"TensorFlow.js layers-model {one_line(path.absolute().parent.name)}",
            "sha256": {one_line(name): hashlib.sha256(content).hexdigest() for name, content in files},
            "intensity_from": source if intensity is None else "given at the import",
            "licence": _LICENCE,
        },
    }
    mu = {}
    for index, layer in enumerate(layers):
        kernel = np.ascontiguousarray(layer.kernel.transpose(4, 3, 0, 1, 2), np.float32)
        mu[f"layers.{index}.weight"] = torch.from_numpy(kernel)
        mu[f"layers.{index}.bias"] = torch.from_numpy(layer.bias.astype(np.float32))
    return Posterior(mu, {}, metadata, str(path)).validate()


def _read(path: Path, limit: int) -> bytes:
    try:
        size = path.stat().st_size
        if size > limit:
            raise InputError(f"{path}: has {size} bytes, more than {limit}; a MeshNet is much smaller")
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error


def _json(path: Path, text: bytes) -> dict[str, Any]:
    try:
        model = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON; download the model again") from error
    if not isinstance(model, dict) or model.get("format", "layers-model") != "layers-model":
        raise InputError(f"{path}: is not a TensorFlow.js layers-model; convert it with tensorflowjs_converter")
    return model


def _parsed(path: Path, what: str, kind: type[_M], value: Any) -> _M:
    """A part of model.json as `kind` declares it."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "entry"
        found = one_line(str(first["input"]))[:60]
        raise InputError(f"{path}: {what}: {where} {found}: {first['msg']}; give an unquantized MeshNet") from error


def _asks_for_quantiles(path: Path, model: dict[str, Any]) -> bool:
    """Whether the model asks for the quantiles of the scheme `quantile`; other wishes are refused."""
    asked = model.get("_normalize")
    if asked is None:
        return False
    wanted = _parsed(path, "its _normalize", _Normalize, asked)
    if wanted.type == "quantile" and (wanted.min, wanted.max) == tuple(100 * q for q in QUANTILES):
        return True
    raise InputError(
        f"{path}: asks for scans scaled as {one_line(json.dumps(asked))[:60]}, which dwc does not offer; choose the "
        "nearest `intensity`"
    )


def _manifest(path: Path, model: dict[str, Any]) -> list[_Group]:
    manifest = model.get("weightsManifest")
    if not isinstance(manifest, list) or not manifest:
        raise InputError(f"{path}: has no weightsManifest; download the model again")
    groups = [_parsed(path, "its weightsManifest", _Group, group) for group in manifest]
    if (n_shards := sum(len(group.paths) for group in groups)) > _MAX_SHARDS:
        raise InputError(f"{path}: names {n_shards} weight files, more than {_MAX_SHARDS}; convert it into one file")
    return groups


def _shards(path: Path, group: _Group) -> Iterator[Path]:
    """The files of a group; they must be in the model's folder."""
    for name in group.paths:
        parts = PurePosixPath(name)
        if not name or "\\" in name or ":" in name or parts.is_absolute() or ".." in parts.parts:
            raise InputError(f"{path}: its weight file {one_line(name)!r} is not in its folder; correct the manifest")
        yield existing_file(path.parent / parts)


def _weights(path: Path, groups: list[_Group], contents: list[bytes]) -> dict[str, np.ndarray]:
    """The tensors, fp64, by layer and part, such as conv3d_0/kernel."""
    weights: dict[str, np.ndarray] = {}
    for group, content in zip(groups, contents, strict=True):
        counts = [math.prod(tensor.shape) for tensor in group.weights]
        if len(content) != 4 * sum(counts):
            raise InputError(
                f"{path}: {one_line(', '.join(group.paths))} holds {len(content)} bytes, but the manifest lists "
                f"{4 * sum(counts)}; download the model again"
            )
        start = 0
        for tensor, count in zip(group.weights, counts, strict=True):
            values = np.frombuffer(content, "<f4", count, 4 * start).astype(np.float64)
            start += count
            if not np.isfinite(values).all():
                raise InputError(f"{path}: its tensor {tensor.name} holds non-finite values; download the model again")
            name = "/".join(tensor.name.split("/")[-2:])
            if name in weights:
                raise InputError(f"{path}: lists the tensor {name} twice; download the model again")
            weights[name] = values.reshape(tensor.shape)
    return weights


def _layers(path: Path, model: dict[str, Any]) -> list[_Layer]:
    """The layers, each of which takes the output of the one before."""
    topology = model.get("modelTopology")
    inner = topology.get("model_config", topology) if isinstance(topology, dict) else topology
    graph = _parsed(path, "its modelTopology", _Graph, inner)
    listed = graph.config.get("layers")
    if not isinstance(listed, list) or not listed:
        raise InputError(f"{path}: its modelTopology has no layers; give a MeshNet")
    layers = [_parsed(path, f"its layer {n}", _Layer, layer) for n, layer in enumerate(listed)]
    if graph.class_name == "Sequential":
        return layers
    sources: list[Any] = [[], *([[[layer.name, 0, 0, {}]]] for layer in layers[:-1])]
    for layer, source in zip(layers, sources, strict=True):
        if layer.inbound_nodes != source:
            raise InputError(
                f"{path}: its layer {layer.name} does not follow the one before it alone; give a MeshNet, whose "
                "layers form a chain"
            )
    if graph.config.get("output_layers") != [[layers[-1].name, 0, 0]]:
        raise InputError(f"{path}: its output is not that of its last layer alone; give a MeshNet")
    return layers


def _convolutions(path: Path, layers: list[_Layer], weights: dict[str, np.ndarray]) -> list[_Folded]:
    """The convolutions, with batch normalization folded in and the activation after each; takes their weights."""

    def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
        values = weights.pop(name, None)
        if values is None:
            raise InputError(f"{path}: lists no tensor {name}; download the model again")
        if values.shape != shape:
            raise InputError(f"{path}: its tensor {name} has shape {list(values.shape)}, not {list(shape)}")
        return values

    found: list[_Folded] = []
    channels = 1
    for position, layer in enumerate(layers):
        what, kind, name = f"its layer {one_line(layer.name)}", layer.class_name, layer.name
        if kind == "InputLayer" and position == 0:
            shape = layer.config.get("batch_input_shape", layer.config.get("batch_shape"))
            _parsed(path, what, _Input, {"batch_input_shape": shape})
        elif kind == "Conv3D":
            config = _parsed(path, what, _Convolution, layer.config)
            kernel = take(f"{name}/kernel", (*config.kernel_size, channels, config.filters))
            channels = config.filters
            bias = take(f"{name}/bias", (channels,)) if config.use_bias else np.zeros(channels)
            found.append(_Folded(name, config, kernel, bias))
            found[-1].activation = _parsed(path, what, _Activation, {"activation": config.activation}).activation
        elif kind in _IDLE:
            continue
        elif not found or found[-1].activation != "linear":
            raise InputError(
                f"{path}: {what}, a {one_line(kind)}, follows no convolution; give a MeshNet: convolution, batch "
                "normalization or none, activation"
            )
        elif kind == "BatchNormalization":
            normalization, shape = _parsed(path, what, _Normalization, layer.config), (channels,)
            scale = take(f"{name}/gamma", shape) if normalization.scale else np.ones(channels)
            shift = take(f"{name}/beta", shape) if normalization.center else np.zeros(channels)
            mean, variance = take(f"{name}/moving_mean", shape), take(f"{name}/moving_variance", shape)
            if (variance < 0).any():
                raise InputError(f"{path}: its tensor {name}/moving_variance holds negative values")
            scale /= np.sqrt(variance + normalization.epsilon)
            found[-1].kernel, found[-1].bias = found[-1].kernel * scale, (found[-1].bias - mean) * scale + shift
        elif kind == "Activation":
            found[-1].activation = _parsed(path, what, _Activation, layer.config).activation
        elif kind == "ReLU":
            _parsed(path, what, _ReLU, layer.config)
            found[-1].activation = "relu"
        elif kind == "ELU":
            _parsed(path, what, _ELU, layer.config)
            found[-1].activation = "elu"
        elif kind == "Softmax":
            found[-1].activation = "softmax"
        else:
            raise InputError(f"{path}: {what} is a {one_line(kind)}, which no MeshNet has; give a MeshNet")
    return found


def _meshnet(path: Path, layers: list[_Folded]) -> tuple[list[int], Literal["relu", "elu"]]:
    """Dilations and activation, after checking that the convolutions form a MeshNet."""
    if len(layers) < 2:
        raise InputError(f"{path}: has {len(layers)} convolutions; a MeshNet has two or more")
    *hidden, last = layers
    if last.config.kernel_size != (1, 1, 1) or last.activation not in ("linear", "softmax"):
        raise InputError(
            f"{path}: its last layer {last.name} is {last.config.kernel_size} with {last.activation}; a MeshNet ends "
            "with a 1x1x1 convolution to the classes"
        )
    first = hidden[0]
    for layer in hidden:
        config = layer.config
        if config.kernel_size != (3, 3, 3) or config.padding != "same" or len(set(config.dilation_rate)) > 1:
            raise InputError(
                f"{path}: its layer {layer.name} has kernel {config.kernel_size}, padding {config.padding} and "
                f"dilation {config.dilation_rate}; a MeshNet has 3x3x3, same and one dilation for all axes"
            )
        if config.filters != first.config.filters:
            raise InputError(
                f"{path}: its layer {layer.name} has {config.filters} filters, not {first.config.filters} as its "
                "first; a MeshNet has the same number in each"
            )
        if layer.activation not in ("relu", "elu") or layer.activation != first.activation:
            raise InputError(
                f"{path}: its layer {layer.name} has activation {layer.activation}; a MeshNet has relu or elu after "
                "every layer but the last"
            )
    activation: Literal["relu", "elu"] = "elu" if first.activation == "elu" else "relu"
    return [layer.config.dilation_rate[0] for layer in hidden], activation
