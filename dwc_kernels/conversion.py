"""Other people's networks: `convert` makes their convolutions and linear layers variational, `conversion_report` says
beforehand or afterwards which ones, and `mean_names` tells loaders where a plain checkpoint's weights have gone."""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from dwc_kernels.factorized import FFGModule, leaves, weight_key
from dwc_kernels.module import FFGConv3d, FFGConvTranspose3d, FFGLinear
from dwc_kernels.plain import become, why_not_taken_over

__all__ = ["Conversion", "conversion_report", "convert", "mean_names"]

_KINDS: dict[type[nn.Module], Any] = {
    nn.Conv3d: FFGConv3d,
    nn.ConvTranspose3d: FFGConvTranspose3d,
    nn.Linear: FFGLinear,
}
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)
_COMPILED = "it or a module around it is compiled; convert before torch.compile"
_log = logging.getLogger("dwc_kernels")

Skip = str | type[nn.Module] | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Conversion:
    """What `convert` does, or did, with one layer.

    Attributes
    ----------
    path : str
        As in ``named_modules``; "" is the model itself.
    kind : str
        The layer's class.
    parameters : int
        Number of parameters of the plain layer, without those that a layer before it shares.
    converted : bool
        Whether it is variational.
    reason : str
        Why it is not.
    """

    path: str
    kind: str
    parameters: int
    converted: bool
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.path or '(model)'}: {self.kind}, {self.parameters:,} parameters, {self.reason or 'variational'}"


def convert(model: nn.Module, *, skip: Skip | Iterable[Skip] = (), **kwargs: Any) -> nn.Module:
    """Make every Conv3d, ConvTranspose3d and Linear of a network variational, its weights as means, in place.

    Each layer changes its class in place, so whatever else holds it, such as a plain list, holds the variational one.
    Shared layers and tied weights stay so. The means are the Parameter objects that the weights were: an optimizer
    goes on with them (add the new ``*_rho`` to it), and frozen ones stay frozen, while their sigmas train. Hooks on
    the forward and the backward and attributes are kept. The logger "dwc_kernels" warns of the number of parameters
    that are left as they are, and names each layer at level INFO.

    Parameters
    ----------
    model : nn.Module
        A network, or a single layer. Convert before DistributedDataParallel, fully_shard, torch.compile, scripting
        and quantization.
    skip : str, type, callable (path, module) -> bool, or an iterable of these
        What to leave as it is, with everything below: paths as in ``named_modules(remove_duplicate=False)``, types of
        module, or a predicate. A shared layer is left if any of its paths is.
    **kwargs
        prior_mu, prior_sigma, sigma_init, backend of the new layers.

    Returns
    -------
    nn.Module
        ``model`` itself.

    Raises
    ------
    ValueError
        For a layer that `torch.nn` computes and the means could not stand in for (see `conversion_report`), naming its
        path; skip it. Nothing is converted then.
    """
    FFGLinear(1, 1, device="meta", **kwargs)  # refuses what no layer takes, also where there is none
    found = list(_classified(model, skip))
    if refused := [entry for entry, _, fatal in found if fatal]:
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        path = refused[0].path
        raise ValueError(f"{path or 'the model'}{more}: {refused[0].reason}, or pass skip=[{path!r}]")
    new = [
        (module, _KINDS[kind]._like(module, **kwargs))
        for entry, module, _ in found
        if entry.converted and (kind := _kind(module))
    ]
    first: dict[tuple[Any, ...], FFGModule] = {}  # the layer that shared its sigmas and prior with those tied to it
    for module in model.modules():
        for name in module._names if isinstance(module, FFGModule) else ():
            if f"{name}_rho" in module._parameters:
                first.setdefault(weight_key(module, f"{name}_mu"), cast(FFGModule, module))
    for module, layer in new:
        become(module, layer)
        for name in layer._names:
            owner = first.setdefault(weight_key(module, f"{name}_mu"), cast(FFGModule, module))
            if owner is not module:
                cast(FFGModule, module)._share(owner, name)
    _log_report([entry for entry, _, _ in found])
    return model


def conversion_report(model: nn.Module, *, skip: Skip | Iterable[Skip] = ()) -> list[Conversion]:
    """Say for each layer of `model` with parameters whether `convert` makes it variational, or why not.

    Nothing is changed. `skip` is as in `convert`.

    After a conversion it says the same of the converted network, but for the layers that were skipped.
    """
    return [entry for entry, _, _ in _classified(model, skip)]


def mean_names(model: nn.Module) -> dict[str, str]:
    """Names of a plain network's weights to their names as means in the converted `model`, for loaders by name.

    ``load_state_dict`` needs none of this. MONAI's loader does:
    ``copy_model_state(converted, plain, mapping=mean_names(converted))``.
    """
    names = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, FFGModule):
            for name in module._names:
                suffixes = [f"parametrizations.{{}}.original{i}" for i in (0, 1)]
                plain = "{}" if f"{name}_mu" in module._parameters else None
                for template in suffixes if plain is None else [plain]:
                    prefix = f"{path}." if path else ""
                    names[prefix + template.format(name)] = prefix + template.format(f"{name}_mu")
    return names


def _classified(model: nn.Module, skip: Skip | Iterable[Skip]) -> Iterator[tuple[Conversion, nn.Module, bool]]:
    """Each layer's entry and module, and whether it stops a conversion."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got a {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, _WRAPPERS):
            raise ValueError(
                f"convert the network before {type(module).__name__} wraps it, which would miss the sigmas"
            )
    skipped, counted = _skipped(model, skip), set[int]()
    for path, module, parent, compiled in _walk(model):
        kind = _kind(module)
        n_parameters, reason, fatal = _size(module, counted), "", False
        if isinstance(module, FFGModule):
            pass
        elif id(module) in skipped:
            reason = "skipped"
        elif kind is None:
            reason = _why_never(module)
        elif _reads_weights(parent):
            reason = f"{type(parent).__name__} reads its weight itself"
        elif why := (_COMPILED if compiled else why_not_taken_over(module, kind)):
            reason, fatal = why, True
        yield Conversion(path, _name(module), n_parameters, not reason, reason), module, fatal


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module | None, bool]]:
    """Modules with parameters of their own, each once: path, module, parent, whether one around it is compiled."""
    seen: set[int] = set()

    def walk(
        module: nn.Module, path: str, parent: nn.Module | None, compiled: bool
    ) -> Iterator[tuple[str, nn.Module, nn.Module | None, bool]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        compiled = compiled or "_orig_mod" in module._modules or vars(module).get("_compiled_call_impl") is not None
        whole = isinstance(module, (FFGModule, torch.jit.ScriptModule)) or _kind(module) or _quantized(module)
        if whole or any(p is not None for p in module._parameters.values()):
            yield path, module, parent, compiled
        if not whole:
            for name, child in module.named_children():
                yield from walk(child, f"{path}.{name}" if path else name, module, compiled)

    yield from walk(model, "", None, False)


def _skipped(model: nn.Module, skip: Skip | Iterable[Skip]) -> set[int]:
    """The ids of all modules to be left as they are, under whichever of their paths."""
    entries = [skip] if isinstance(skip, str) or callable(skip) else skip
    if not isinstance(entries, Iterable) or not all(isinstance(entry, str) or callable(entry) for entry in entries):
        raise ValueError(f"skip takes paths, types of module and predicates, got {skip!r}")
    entries = list(entries)
    named = list(model.named_modules(remove_duplicate=False))
    known = {path for path, _ in named}
    for entry in entries:
        if isinstance(entry, str) and entry not in known:
            raise ValueError(f"skip={entry!r} is no module of the network; see named_modules()")

    def hit(entry: Skip, path: str, module: nn.Module) -> bool:
        if isinstance(entry, str):
            return path == entry
        return isinstance(module, entry) if isinstance(entry, type) else entry(path, module)

    tops = [module for path, module in named if any(hit(entry, path, module) for entry in entries)]
    return {id(module) for top in tops for module in top.modules()}


def _kind(module: nn.Module) -> type[nn.Module] | None:
    """The torch.nn layer that a module is, if it is one that has a variational form."""
    return next((kind for kind in _KINDS if isinstance(module, kind)), None)


def _quantized(module: nn.Module) -> bool:
    return ".quantized" in type(module).__module__ and callable(getattr(module, "weight", None))


def _reads_weights(parent: nn.Module | None) -> bool:
    """Whether a layer's parent is torch.nn's own and more than a container, as attention is."""
    kinds = [kind for kind in type(parent).__mro__ if kind.__module__.startswith("torch.nn.modules")]
    return any(kind not in (*_CONTAINERS, nn.Module) for kind in kinds)


def _why_never(module: nn.Module) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted; convert before torch.jit"
    if _quantized(module):
        return "quantized; convert before quantization"
    return "has no variational form"


def _size(module: nn.Module, counted: set[int]) -> int:
    """The number of weights, without those that were counted before."""
    weight: Any = getattr(module, "weight", None)
    if _quantized(module):
        return weight().numel()
    if isinstance(module, FFGModule):
        own = [t for name in module._names for t in leaves(module, f"{name}_rho")]
    else:
        own = list(module.parameters(recurse=_kind(module) is not None or isinstance(module, torch.jit.ScriptModule)))
    new = [p for p in own if id(p) not in counted and not isinstance(p, nn.parameter.UninitializedParameter)]
    counted.update(map(id, new))
    return sum(p.numel() for p in new)


def _name(module: nn.Module) -> str:
    return getattr(module, "original_name", type(module).__name__)


def _log_report(entries: list[Conversion]) -> None:
    for entry in entries:
        _log.info("%s", entry)
    left = [entry for entry in entries if not entry.converted and entry.reason != "skipped"]
    if left:
        kinds = ", ".join(dict.fromkeys(entry.kind for entry in left))
        total = sum(entry.parameters for entry in entries)
        n_left = sum(entry.parameters for entry in left)
        text = "convert left %s of %s parameters as they are (%s); see conversion_report"
        _log.warning(text, f"{n_left:,}", f"{total:,}", kinds)
