"""FLOP formulas of the operators, for `torch.utils.flop_counter`.

That module imports Triton, a second that not every user of a layer should wait for, so the formulas are registered when
somebody else imports it.
"""

import importlib.abc
import importlib.util
import math
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

__all__ = ["count_when_asked"]

_COUNTER = "torch.utils.flop_counter"


def _products(x: Sequence[int], weight: Sequence[int], out: Sequence[int], transposed: bool) -> int:
    """FLOPs of one convolution, multiply-adds counted twice, as PyTorch counts them."""
    return 2 * x[0] * math.prod((x if transposed else out)[2:]) * math.prod(weight)


def _register(counter: ModuleType) -> None:
    ops = torch.ops.dwc

    @counter.register_flop_formula(ops.ffg_conv3d)
    def _(x: Any, weight_mu: Any, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
        transposed = kwargs.get("transposed_size", rest[10] if len(rest) > 10 else None) is not None
        return 2 * _products(x, weight_mu, out_shape[0], transposed)

    @counter.register_flop_formula(ops.ffg_conv3d_grad_input)
    def _(g: Any, r: Any, x: Any, weight_mu: Any, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
        transposed = kwargs.get("transposed", rest[6] if len(rest) > 6 else False)
        return 2 * _products(x, weight_mu, g, transposed)

    @counter.register_flop_formula(ops.ffg_conv3d_grad_weight)
    def _(g: Any, r: Any, x: Any, weight: Any, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
        names = ("bias_sigma", "wants_mu", "wants_sigma", "transposed")
        given = dict(zip(names, rest[5:], strict=False)) | kwargs
        n_sums = given.get("wants_mu", True) + given.get("wants_sigma", True)
        return n_sums * _products(x, weight, g, given.get("transposed", False))


def count_when_asked() -> None:
    """Register the formulas with the counter now if it is imported, else as soon as it is."""
    if counter := sys.modules.get(_COUNTER):
        _register(counter)
    else:
        sys.meta_path.insert(0, _AtImport())


class _AtImport(importlib.abc.MetaPathFinder):
    """Finds nothing itself; hands on the counter's own spec with a loader that registers behind it."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                _register(module)

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec
