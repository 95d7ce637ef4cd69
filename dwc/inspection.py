"""All that a posterior file holds, in plain words, and which parts of it could identify the site that made it."""

from collections.abc import Iterator
from typing import Any

from dwc.base.errors import one_line
from dwc.base.files import canonical_json
from dwc.data.constants import SHIPPED
from dwc.influence import measure
from dwc.posterior import Posterior

__all__ = ["inspect"]

_MEANING = {
    "format_version": "version of the file format",
    "package_version": "version of dwc that wrote it",
    "architecture": "the network",
    "label_map": "the classes, by name and digest",
    "preprocessing": "how scans were prepared",
    "n_volumes": "number of training volumes",
    "prior_sha256": "the posterior that it was trained from, by digest",
    "training": "settings and outcome of the training; no paths",
    "provenance": "where an imported network comes from",
    "sites": "the sites that were consolidated, by digest, with volumes and power",
}


def inspect(posterior: Posterior, prior: Posterior | None = None) -> str:
    """A report on a file; with its prior, also on how far it moved."""
    lines = [*_summary(posterior), "", "header", *_header(posterior.metadata), "", "tensors", *_tensors(posterior)]
    if prior is not None:
        lines += ["", "compared with its prior", *_movement(posterior, prior)]
    lines += ["", "what could identify the site", *(f"  {line}" for line in identifying(posterior))]
    return "\n".join(lines)


def identifying(posterior: Posterior) -> Iterator[str]:
    """What a receiver could use to tell whose file this is."""
    header = posterior.metadata
    if header.get("n_volumes") is not None:
        yield f"n_volumes: the size of its training set, {header['n_volumes']}"
    training = header.get("training") or {}
    if "stream" in training:
        yield "training.stream: computed from the site's name, so that a guessed name can be checked"
    name = (header.get("label_map") or {}).get("name")
    if name is not None and name not in SHIPPED:
        yield f"label_map.name: the name of the site's own file, {one_line(str(name))}"
    for path, value in _leaves(header):
        if isinstance(value, str) and any(mark in value for mark in "/\\@"):
            yield f"{path}: may be a path or an address, {one_line(value)[:60]}"
    for key in sorted(header.keys() - _MEANING.keys()):
        yield f"{one_line(key)}: an entry that dwc does not write"
    if posterior.signature:
        yield "the signature: whoever has the public key knows who signed"
    yield "mu and sigma: computed from the scans; run dwc posterior audit before you send them"


def _summary(posterior: Posterior) -> Iterator[str]:
    n_weights = sum(tensor.numel() for tensor in posterior.mu.values())
    kind = "mean and standard deviation of" if posterior.is_bayesian else "values (a MAP network) of"
    yield one_line(posterior.name)
    yield f"  {kind} {n_weights} weights in {len(posterior.mu)} tensors"
    yield f"  content sha256 {posterior.sha256}"
    yield f"  {'signed' if posterior.signature else 'not signed'}"
    for name, count in posterior.coarse().items():
        yield f"  warning: {one_line(name)}: fp32 rounds {count} means by more than a tenth of their sigma"


def _header(header: dict[str, Any]) -> Iterator[str]:
    for key, value in header.items():
        text = canonical_json(value)
        shown = text if len(text) <= 200 else f"{text[:200]}..."
        yield f"  {one_line(key)}: {_MEANING.get(key, 'not written by dwc')} ({len(text)} bytes)"
        yield f"    {one_line(shown)}"


def _tensors(posterior: Posterior) -> Iterator[str]:
    for name, mu in posterior.mu.items():
        size = mu.numel() * mu.element_size() * (2 if posterior.is_bayesian else 1)
        line = f"  {one_line(name)} {list(mu.shape)}, {size} bytes, mu {mu.min():.3g} to {mu.max():.3g}"
        if posterior.is_bayesian:
            sigma = posterior.sigma[name]
            line += f", sigma {sigma.min():.3g} to {sigma.max():.3g}"
        yield line


def _movement(posterior: Posterior, prior: Posterior) -> Iterator[str]:
    from dwc.consolidation import Consolidation

    Consolidation(prior).add(posterior)  # refuses what was not trained from it
    influence = measure(posterior, prior)
    yield f"  KL from the prior {influence.kl:.4g} nats, {influence.kl / max(1, influence.n_volumes):.4g} per volume"
    yield f"  adds {influence.precision:.3g} times the prior's precision, pulls means by {influence.shift:.3g} sigma_0"
    yield f"  furthest mean {influence.furthest:.3g} sigma_0; smallest sigma {influence.surest:.3g} sigma_0"


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _leaves(part, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for part in value:
            yield from _leaves(part, path)
    else:
        yield one_line(path), value
