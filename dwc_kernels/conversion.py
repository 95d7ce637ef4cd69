"""Other people's networks: `convert` makes their convolutions and linear layers variational, `conversion_report` says
beforehand or afterwards which ones, and `mean_names` tells loaders where a plain checkpoint's weights have gone."""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dwc_kernels.factorized import FFGModule
from dwc_kernels.module import FFGConv3d, FFGConvTranspose3d, FFGLinear
from dwc_kernels.plain import mean_leaf, take_over, why_not_taken_over

__all__ = ["Conversion", "conversion_report", "convert", "mean_names"]

_KINDS: dict[type[nn.Module], Any] = {
    nn.Conv3d: FFGConv3d,
    nn.ConvTranspose3d: FFGConvTranspose3d,
    nn.Linear: FFGLinear,
}
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)
_log = logging.getLogger("dwc_kernels")

Skip = str | type[nn.Module] | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Conversion:
    """What `convert` does, or did, with one layer."""

    path: str  # "" is the model itself
    kind: str
    parameters: int  # of the plain layer
    converted: bool
    reason: str = ""  # why not

    def __str__(self) -> str:
        return f"{self.path or '(model)'}: {self.kind}, {self.parameters:,} parameters, {self.reason or 'variational'}"


def convert(model: nn.Module, *, skip: Skip | Iterable[Skip] = (), **kwargs: Any) -> nn.Module:
    """Make every Conv3d, ConvTranspose3d and Linear of a network variational, its weights as means, in place.

    Layers and weights that stand in several places stay shared, frozen weights frozen, and the means are the same
    Parameter objects as the weights were, so an optimizer that already holds them goes on with them; add the new
    ``*_rho`` to it. Hooks on the forward and the backward and attributes are kept. The logger "dwc_kernels" warns of
    the number of parameters that are left as they are, and names each layer at level INFO.

    Parameters
    ----------
    model : nn.Module
        A network, or a single layer. Convert before DistributedDataParallel, fully_shard, scripting and quantization.
    skip : str, type, callable (path, module) -> bool, or an iterable of these
        What to leave as it is: paths as in ``named_modules()``, types of module, or a predicate, each with everything
        below.
    **kwargs
        prior_mu, prior_sigma, sigma_init, backend of the new layers.

    Returns
    -------
    nn.Module
        ``model`` itself, or the new layer where ``model`` is a layer.

    Raises
    ------
    ValueError
        For a layer that `torch.nn` computes and the means could not stand in for (see `conversion_report`), naming its
        path; skip it. Nothing is converted then.
    """
    found = list(_classified(model, skip))
    if refused := [entry for entry, _, fatal in found if fatal]:
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        path = refused[0].path
        raise ValueError(f"{path or 'the model'}{more}: {refused[0].reason}, or pass skip=[{path!r}]")
    layers: dict[int, FFGModule] = {}
    rhos: dict[int, nn.Parameter] = {}  # of means that are tied, so that their sigmas are
    for entry, module, _ in found:
        if not entry.converted or isinstance(module, FFGModule):
            continue
        kind = _kind(module)
        layer = layers[id(module)] = _KINDS[kind]._like(module, **kwargs)
        take_over(layer, module)
        for name in layer._names:
            rho = rhos.setdefault(id(mean_leaf(module, name)), getattr(layer, f"{name}_rho"))
            setattr(layer, f"{name}_rho", rho)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in layers:
                parent._modules[name] = layers[id(child)]
    _log_report([entry for entry, _, _ in found])
    return layers.get(id(model), model)


def conversion_report(model: nn.Module, *, skip: Skip | Iterable[Skip] = ()) -> list[Conversion]:
    """Say for each layer with parameters whether `convert` makes it variational, or why not; changes nothing.

    After a conversion it says the same of the converted network, but for the layers that were skipped.
    """
    return [entry for entry, _, _ in _classified(model, skip)]


def mean_names(model: nn.Module) -> dict[str, str]:
    """Names of a plain network's weights to their names as means, for loaders that match by name.

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
    for module in model.modules():
        if isinstance(module, _WRAPPERS):
            raise ValueError(
                f"convert the network before {type(module).__name__} wraps it, which would miss the sigmas"
            )
    for path, module, parent, skipped in _walk(model, _skipper(model, skip)):
        kind = _kind(module)
        n_parameters, reason, fatal = _size(module), "", False
        if isinstance(module, FFGModule):
            n_parameters = sum(getattr(module, f"{name}_rho").numel() for name in module._names)
        elif skipped:
            reason = "skipped"
        elif kind is None:
            reason = _why_never(module)
        elif _reads_weights(parent):
            reason = f"{type(parent).__name__} reads its weight itself"
        elif why := why_not_taken_over(module, kind):
            reason, fatal = why, True
        yield Conversion(path, _name(module), n_parameters, not reason, reason), module, fatal


def _walk(
    model: nn.Module, skips: Callable[[str, nn.Module], bool]
) -> Iterator[tuple[str, nn.Module, nn.Module | None, bool]]:
    """Modules with parameters of their own, each once: path, module, parent, whether it is to be skipped."""
    seen: set[int] = set()

    def walk(
        module: nn.Module, path: str, parent: nn.Module | None, skipped: bool
    ) -> Iterator[tuple[str, nn.Module, nn.Module | None, bool]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        skipped = skipped or skips(path, module)
        whole = isinstance(module, (FFGModule, torch.jit.ScriptModule)) or _kind(module) or _quantized(module)
        if whole or any(p is not None for p in module._parameters.values()):
            yield path, module, parent, skipped
        if not whole:
            for name, child in module.named_children():
                yield from walk(child, f"{path}.{name}" if path else name, module, skipped)

    yield from walk(model, "", None, False)


def _skipper(model: nn.Module, skip: Skip | Iterable[Skip]) -> Callable[[str, nn.Module], bool]:
    entries = [skip] if isinstance(skip, str) or callable(skip) else list(skip)
    known = {path for path, _ in model.named_modules(remove_duplicate=False)}
    for entry in entries:
        if isinstance(entry, str) and entry not in known:
            raise ValueError(f"skip={entry!r} is no module of the network; see named_modules()")

    def skips(path: str, module: nn.Module) -> bool:
        for entry in entries:
            if isinstance(entry, str):
                hit = path == entry
            elif isinstance(entry, type):
                hit = isinstance(module, entry)
            else:
                hit = entry(path, module)
            if hit:
                return True
        return False

    return skips


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


def _size(module: nn.Module) -> int:
    if _quantized(module):
        return module.weight().numel()
    own = module.parameters(
        recurse=_kind(module) is not None or isinstance(module, (FFGModule, torch.jit.ScriptModule))
    )
    return sum(p.numel() for p in own if not isinstance(p, nn.parameter.UninitializedParameter))


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
