"""Plain layers that have a variational form: whether one can be taken over, and how a new layer takes it over."""

from itertools import takewhile
from types import FunctionType
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations, parametrize

__all__ = ["become", "take_over", "why_not_taken_over"]

# The methods that a subclass may not replace if it is to be the plain layer.
_METHODS = ("forward", "__call__", "_conv_forward", "_output_padding")
_FORWARD_HOOKS = tuple(name for name in vars(nn.Module()) if "hook" in name and "state_dict" not in name)
_STATE_HOOKS = tuple(name for name in vars(nn.Module()) if "state_dict" in name and "hook" in name)


def why_not_taken_over(plain: Any, kind: type[nn.Module]) -> str | None:
    """Why a variational layer could not stand in for ``plain``, an instance of ``kind``; None if it can."""
    name = type(plain).__name__
    if any(is_lazy(t) for t in plain.parameters()):
        return f"{name} has no weights yet; run one batch through the network first"
    if any(getattr(type(plain), method, None) is not getattr(kind, method, None) for method in _METHODS):
        return f"{name} has a forward of its own; only torch.nn.{kind.__name__} itself is taken over"
    if hasattr(getattr(plain, "weight", None), "device_mesh"):
        return "its weight is sharded; convert before fully_shard"
    if replaced := [method for method in vars(plain) if callable(getattr(type(plain), method, None))]:
        return f"its {replaced[0]} was replaced on the instance, which a conversion would lose; restore it first"
    normalized = _weight_norm(plain) is not None
    if parametrize.is_parametrized(plain) and not normalized:
        return f"{name} has parametrizations other than weight_norm on its weight; remove them first"
    if own := _own_members(plain, kind):
        return f"{name} has a {own[0]} of its own, which the variational layer would lose; move it to the module around"
    registered = ("bias",) if normalized else ("weight", "bias")
    if made := [part for part in registered if part not in plain._parameters]:
        return (
            f"the {made[0]} of {name} is made by forward hooks, as pruning and the older weight_norm do; "
            "remove them first"
        )
    if any(len(getattr(plain, hooks)) > (normalized and "load" in hooks) for hooks in _STATE_HOOKS):
        return f"{name} has state_dict hooks, which name parameters that will be gone; remove them first"
    if not plain.weight.is_floating_point():
        return f"its weight is {plain.weight.dtype}, not a real floating-point type"
    return None


def _own_members(plain: Any, kind: type[nn.Module]) -> list[str]:
    """Methods and properties that the layer's class adds to ``kind``'s; static ones serve those who make layers."""
    bases = type(plain).__mro__[parametrize.is_parametrized(plain) :]  # which puts a class of its own in front
    members = [pair for base in takewhile(lambda base: base is not kind, bases) for pair in vars(base).items()]
    return [
        member
        for member, value in members
        if isinstance(value, FunctionType | property) and not member.startswith("__") and member != "extra_repr"
    ]


def take_over(layer: Any, plain: Any) -> None:
    """Give a new FFGModule the weights of a plain one as means.

    They stay the same Parameter objects, so that ties to other layers, optimizers and hooks on them hold. Weight
    normalization goes over to ``weight_mu``; forward and backward hooks, the mode and whatever else was put on the
    plain layer come along.
    """
    norm = _weight_norm(plain)
    if norm is None:
        layer.weight_mu = plain.weight
    else:
        dim: Any = norm.dim if norm.dim >= 0 else None  # None: one norm for all
        parametrizations.weight_norm(layer, "weight_mu", dim=dim)
        theirs, ours = plain.parametrizations["weight"], layer.parametrizations["weight_mu"]
        ours.original0, ours.original1 = theirs.original0, theirs.original1
    layer.bias_mu = plain.bias
    for hooks in _FORWARD_HOOKS:
        setattr(layer, hooks, getattr(plain, hooks))  # the same dict, so that handles still remove their hooks
    for kind in ("_parameters", "_buffers", "_modules"):
        for name, value in getattr(plain, kind).items():
            if name not in ("weight", "bias", "parametrizations"):
                getattr(layer, kind)[name] = value
    layer._non_persistent_buffers_set |= plain._non_persistent_buffers_set
    for name, value in vars(plain).items():
        vars(layer).setdefault(name, value)
    layer.training = plain.training


def become(plain: Any, layer: Any) -> None:
    """Turn a plain layer into the new one in place, so that a list or a closure that holds it holds the new one."""
    take_over(layer, plain)
    plain.__class__ = type(layer)
    vars(plain).clear()
    vars(plain).update(vars(layer))


def _weight_norm(plain: Any) -> Any:
    """The weight normalization of a layer, if that is its only parametrization."""
    if not parametrize.is_parametrized(plain):
        return None
    found = [(name, list(chain)) for name, chain in plain.parametrizations.items()]
    if [name for name, _ in found] != ["weight"] or [type(p).__name__ for p in found[0][1]] != ["_WeightNorm"]:
        return None
    return found[0][1][0]
