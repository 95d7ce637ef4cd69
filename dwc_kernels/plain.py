"""Plain layers that have a variational form: whether one can be taken over, and how a new layer takes it over."""

from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin
from torch.nn.utils import parametrizations, parametrize

from dwc_kernels.factorized import FFGModule

__all__ = ["mean_leaf", "take_over", "why_not_taken_over"]

# The methods that a subclass may not replace if it is to be the plain layer.
_METHODS = ("forward", "_conv_forward", "_output_padding")
_FORWARD_HOOKS = tuple(name for name in vars(nn.Module()) if "hook" in name and "state_dict" not in name)
_STATE_HOOKS = tuple(name for name in vars(nn.Module()) if "state_dict" in name and "hook" in name)


def why_not_taken_over(plain: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why a variational layer could not stand in for ``plain``, an instance of ``kind``; None if it can."""
    name = type(plain).__name__
    if any(isinstance(t, UninitializedTensorMixin) for t in plain.parameters()):
        return f"{name} has no weights yet; run one batch through the network first"
    if any(getattr(type(plain), method, None) is not getattr(kind, method, None) for method in _METHODS):
        return f"{name} has a forward of its own; only torch.nn.{kind.__name__} itself is taken over"
    normalized = _weight_norm(plain) is not None
    if parametrize.is_parametrized(plain):
        if not normalized:
            return f"{name} has parametrizations other than weight_norm on its weight; remove them first"
    elif "weight" not in plain._parameters:
        return (
            f"the weight of {name} is made by forward hooks, as pruning and the older weight_norm do; remove them first"
        )
    if any(len(getattr(plain, hooks)) > (normalized and "load" in hooks) for hooks in _STATE_HOOKS):
        return f"{name} has state_dict hooks, which name parameters that will be gone; remove them first"
    if not plain.weight.is_floating_point():
        return f"its weight is {plain.weight.dtype}, not a real floating-point type"
    if hasattr(plain.weight, "device_mesh"):
        return "its weight is sharded; convert before fully_shard"
    return None


def take_over(layer: FFGModule, plain: nn.Module) -> None:
    """Give a new layer the weights of a plain one as means.

    They stay the same Parameter objects, so that ties to other layers, optimizers and hooks on them hold. Weight
    normalization goes over to ``weight_mu``; forward and backward hooks, the mode and whatever else was put on the
    plain layer come along.
    """
    norm = _weight_norm(plain)
    if norm is None:
        layer.weight_mu = plain.weight
    else:
        parametrizations.weight_norm(layer, "weight_mu", dim=norm.dim if norm.dim >= 0 else None)
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


def mean_leaf(plain: nn.Module, name: str) -> Tensor | None:
    """The Parameter behind a plain layer's "weight" or "bias", by which ties are known."""
    if parametrize.is_parametrized(plain, name):
        return plain.parametrizations[name].original1
    return getattr(plain, name)


def _weight_norm(plain: nn.Module) -> nn.Module | None:
    """The weight normalization of a layer, if that is its only parametrization."""
    if not parametrize.is_parametrized(plain):
        return None
    found = [(name, list(chain)) for name, chain in plain.parametrizations.items()]
    if [name for name, _ in found] != ["weight"] or [type(p).__name__ for p in found[0][1]] != ["_WeightNorm"]:
        return None
    return found[0][1][0]
