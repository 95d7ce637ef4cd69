"""A network at its means as an ONNX model, with what has to be known to use it in its metadata."""

import importlib
import json
import warnings
from pathlib import Path

import torch
from torch.export import Dim

from dwc.base.files import write_whole
from dwc.export.network import facts, plain_network
from dwc.posterior import Posterior
from dwc.preprocessing import Preprocessing

__all__ = ["write_onnx"]


def write_onnx(posterior: Posterior, path: Path, label_map: str | None = None) -> None:
    """Write an ONNX model: `image`, fp32 [N, 1, D, H, W], scaled, to `logits` [N, n_classes, D, H, W] of any size."""
    for library in ("onnx", "onnxscript"):  # PyTorch may remember them from before
        importlib.import_module(library)
    preprocessing = Preprocessing.of(posterior, label_map)
    example = torch.zeros(2, 1, 12, 10, 11)
    any_size = {0: Dim("batch"), 2: Dim("depth"), 3: Dim("height"), 4: Dim("width")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        program = torch.onnx.export(
            plain_network(posterior), (example,), dynamo=True, input_names=["image"], output_names=["logits"],
            dynamic_shapes=(any_size,), verbose=False,
        )  # fmt: skip
    assert program is not None  # as dynamo=True gives one
    model = program.model_proto
    model.producer_name, model.doc_string = "dwc", "Logits of a scaled, conformed T1 scan; metadata_props say how."
    for key, value in facts(posterior, preprocessing).items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        model.metadata_props.add(key=key, value=text)
    write_whole(path, model.SerializeToString())
