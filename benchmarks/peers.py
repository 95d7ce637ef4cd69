"""One layer side by side with those of other libraries: `python -m benchmarks.peers --size 16`.

For each library that is installed (none has to be): CPU seconds of a training step, the least of the repetitions, in
turn; bytes kept for its backward; variance of the gradients in mu and rho over repeated draws, and that variance times
the seconds, which is what a gradient of equal precision costs; the error of the KL divergence against fp64; and whether
eval() is deterministic. All layers get the same means, standard deviations, input and loss. A second table says what
each layer can do.
"""

import argparse
import copy
import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor, nn

from benchmarks.composition import saved_bytes
from dwc_kernels import FFGConv3d, draw_weights, gaussian_kl, inverse_softplus

__all__ = ["compare", "main"]

SIGMA, PRIOR_SIGMA = 0.05, 1.0


@dataclass(frozen=True)
class Peer:
    """How a library's layer is made and read."""

    name: str
    make: Callable[[int, int], nn.Module]  # channels, filters -> a 3x3x3 layer with padding 1
    means: tuple[str, str]  # of weights and biases
    deviations: tuple[str, str]
    kl: Callable[[Any], Tensor]  # after a forward
    kl_is_mean: bool = False  # of the weights plus of the biases, in place of sums
    kl_has_biases: bool = True
    from_sigma: Callable[[Tensor], Tensor] = inverse_softplus
    call: Callable[[nn.Module, Tensor], Tensor] = lambda layer, x: layer(x)


def _bayesian_torch(kind: str) -> Callable[[int, int], nn.Module]:
    module = importlib.import_module("bayesian_torch.layers")
    moments = dict(prior_mean=0.0, prior_variance=PRIOR_SIGMA, posterior_mu_init=0.0, posterior_rho_init=-3.0)
    return lambda c, f: getattr(module, kind)(c, f, 3, padding=1, **moments)


def _blitz() -> Callable[[int, int], nn.Module]:
    module = importlib.import_module("blitz.modules")
    prior = dict(prior_sigma_1=PRIOR_SIGMA, prior_sigma_2=PRIOR_SIGMA, prior_pi=1.0)
    return lambda c, f: module.BayesianConv3d(c, f, (3, 3, 3), padding=1, **prior)


def _nobrainer() -> Callable[[int, int], nn.Module]:
    module = importlib.import_module("nobrainer.models.bayesian.vwn_layers")
    return lambda c, f: module.FFGConv3d(c, f, 3, padding=1, prior_sigma=PRIOR_SIGMA)


def _ours(c: int, f: int) -> nn.Module:
    return FFGConv3d(c, f, 3, padding=1, prior_sigma=PRIOR_SIGMA)


def _drawn(layer: nn.Module, x: Tensor) -> Tensor:
    with draw_weights(layer):
        return layer(x)


def _one_output(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, return_kl=False)


def peers() -> tuple[list[Peer], list[str]]:
    """The layers that can be made here, and why the others cannot."""
    names = ("weight_mu", "bias_mu"), ("weight_rho", "bias_rho")
    found = [
        Peer("dwc_kernels", _ours, *names, kl=lambda layer: layer.kl_loss()),
        Peer("dwc_kernels, drawn weights", _ours, *names, kl=lambda layer: layer.kl_loss(), call=_drawn),
    ]
    samplers = ("weight_sampler.mu", "bias_sampler.mu"), ("weight_sampler.rho", "bias_sampler.rho")
    kernels = ("mu_kernel", "mu_bias"), ("rho_kernel", "rho_bias")
    mean = dict(kl=lambda layer: layer.kl_loss(), kl_is_mean=True, call=_one_output)
    optional: list[tuple[str, Callable[[], Callable[[int, int], nn.Module]], tuple, dict[str, Any]]] = [
        ("bayesian-torch, Reparameterization", lambda: _bayesian_torch("Conv3dReparameterization"), kernels, mean),
        ("bayesian-torch, Flipout", lambda: _bayesian_torch("Conv3dFlipout"), kernels, mean),
        ("blitz", _blitz, samplers, dict(kl=lambda layer: layer.log_variational_posterior - layer.log_prior)),
        (
            "nobrainer",
            _nobrainer,
            (("v", "bias_m"), ("kernel_a", "bias_a")),
            dict(kl=lambda layer: layer.kl, kl_has_biases=False, from_sigma=lambda s: s),
        ),
    ]
    missing = []
    for name, maker, parameters, options in optional:
        try:
            found.append(Peer(name, maker(), *parameters, **options))
        except ImportError as error:
            missing.append(f"{name}: {error}")
    return found, missing


class _Subject:
    """A peer's layer with the common means and standard deviations."""

    def __init__(self, peer: Peer, values: dict[str, Tensor]) -> None:
        self.peer = peer
        self.layer: Any = peer.make(values["weight"].shape[1], values["weight"].shape[0])
        for i, name in enumerate(("weight", "bias")):
            sigma = torch.full_like(values[name], SIGMA)
            parameters = (peer.means[i], values[name]), (peer.deviations[i], peer.from_sigma(sigma))
            for attribute, value in parameters:
                with torch.no_grad():
                    self.layer.get_parameter(attribute).copy_(value)
        if hasattr(self.layer, "g"):  # a weight normalization of its own
            with torch.no_grad():
                self.layer.g.copy_(values["weight"].flatten(1).norm(dim=1).view_as(self.layer.g))

    def step(self, x: Tensor, target: Tensor) -> None:
        """Gradients of the squared error, mean over voxels."""
        self.layer.zero_grad()
        (self.peer.call(self.layer, x) - target).square().mean().backward()

    def gradient(self, which: int) -> Tensor:
        """Of the means (0), or of rho (1) whatever the layer calls sigma's parameter."""
        attribute = (self.peer.means, self.peer.deviations)[which][0]
        gradient = self.layer.get_parameter(attribute).grad.flatten().double().clone()
        if which and self.peer.from_sigma is not inverse_softplus:
            gradient *= torch.sigmoid(inverse_softplus(torch.tensor(SIGMA)))
        return gradient


def compare(channels: int, filters: int, size: int, batch: int, draws: int) -> pd.DataFrame:
    """The table, one row per layer."""
    torch.manual_seed(0)
    values = {"weight": torch.randn(filters, channels, 3, 3, 3) / (27 * channels) ** 0.5, "bias": torch.zeros(filters)}
    x = torch.randn(batch, channels, size, size, size).relu()
    target = torch.randn(batch, filters, size, size, size)
    subjects = [_Subject(peer, values) for peer in peers()[0]]
    rows = {subject.peer.name: _facts(subject, values, x) for subject in subjects}
    seconds: dict[str, list[float]] = {subject.peer.name: [] for subject in subjects}
    gradients: dict[str, list[list[Tensor]]] = {subject.peer.name: [[], []] for subject in subjects}
    for _ in range(draws + 1):
        for subject in subjects:
            start = time.process_time()
            subject.step(x, target)
            seconds[subject.peer.name].append(time.process_time() - start)
            for which in (0, 1):
                gradients[subject.peer.name][which].append(subject.gradient(which))
    for name, row in rows.items():
        row["ms"] = 1e3 * min(seconds[name][1:])
        for which, parameter in enumerate(("mu", "rho")):
            row[f"var {parameter}"] = torch.stack(gradients[name][which]).var(0).mean().item()
    table = pd.DataFrame.from_dict(rows, orient="index")
    ours = table.iloc[0]
    for parameter in ("mu", "rho"):
        cost = table.ms * table[f"var {parameter}"]
        table[f"ms x var {parameter}"] = cost / (ours.ms * ours[f"var {parameter}"])
    return table


def _facts(subject: _Subject, values: dict[str, Tensor], x: Tensor) -> dict[str, Any]:
    layer, peer = subject.layer, subject.peer
    kept = saved_bytes(lambda: peer.call(layer, x), *layer.parameters(), *layer.buffers())
    zero, prior, sigma = (torch.tensor(v, dtype=torch.float64) for v in (0.0, PRIOR_SIGMA, SIGMA))
    parts = {name: gaussian_kl(value.double(), sigma.expand_as(value), zero, prior) for name, value in values.items()}
    if peer.kl_is_mean:
        parts = {name: kl / values[name].numel() for name, kl in parts.items()}
    exact = sum(kl for name, kl in parts.items() if name == "weight" or peer.kl_has_biases)
    error = (peer.kl(layer).detach().double() / exact - 1).abs().item()
    layer.eval()
    with torch.no_grad():
        deterministic = torch.equal(*(layer(x) if peer.call is _drawn else peer.call(layer, x) for _ in range(2)))
    layer.train()
    return {"KB kept": kept / 1024, "KL error": error, "eval() repeats": deterministic}


def abilities() -> pd.DataFrame:
    """What each library's layer can do, one column per layer; a check that raises is a no."""
    x = torch.randn(2, 2, 4, 4, 4)
    return pd.DataFrame(
        {
            peer.name: {ability: _succeeds(check, peer, peer.make(2, 3), x) for ability, check in _ABILITIES.items()}
            for peer in peers()[0]
            if peer.call is not _drawn
        }
    )


def _succeeds(check: Callable[[Peer, Any, Tensor], bool], peer: Peer, layer: nn.Module, x: Tensor) -> str:
    try:
        return "yes" if check(peer, layer, x) else "no"
    except Exception:  # whatever a library raises where it cannot
        return "no"


def _repeats_in_eval(peer: Peer, layer: Any, x: Tensor) -> bool:
    layer.eval()
    return torch.equal(peer.call(layer, x), peer.call(layer, x))


def _kl_before_a_forward(peer: Peer, layer: Any, x: Tensor) -> bool:
    return float(peer.kl(layer)) > 0


def _loads_a_plain_checkpoint(peer: Peer, layer: Any, x: Tensor) -> bool:
    layer.load_state_dict(nn.Conv3d(2, 3, 3).state_dict())
    return True


def _copies_after_a_forward(peer: Peer, layer: Any, x: Tensor) -> bool:
    peer.call(layer, x)
    return copy.deepcopy(layer) is not layer


def _gradients_per_sample(peer: Peer, layer: Any, x: Tensor) -> bool:
    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        def run(*arguments: Any) -> Tensor:
            return torch.func.functional_call(layer, parameters, arguments)

        return peer.call(cast(nn.Module, run), sample[None]).square().mean()

    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="different")(parameters, x)
    return all(g.isfinite().all() for g in gradients.values())


def _compiles_in_one_graph(peer: Peer, layer: Any, x: Tensor) -> bool:
    torch._dynamo.reset()
    compiled: Any = torch.compile(layer, backend="eager", fullgraph=True)
    return peer.call(compiled, x).shape == (2, 3, 4, 4, 4)


_ABILITIES: dict[str, Callable[[Peer, Any, Tensor], bool]] = {
    "`eval()` is deterministic": _repeats_in_eval,
    "KL divergence before a forward": _kl_before_a_forward,
    "loads a plain Conv3d's checkpoint": _loads_a_plain_checkpoint,
    "`copy.deepcopy` after a forward": _copies_after_a_forward,
    "gradients per sample with `torch.func`": _gradients_per_sample,
    "`torch.compile(fullgraph=True)`": _compiles_in_one_graph,
}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("channels", 16), ("filters", 16), ("size", 8), ("batch", 2), ("draws", 30)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = vars(parser.parse_args())
    with pd.option_context("display.width", 200, "display.max_columns", None):
        print(compare(**arguments).to_string(float_format="%.3g"))
        print(abilities().to_string())
    for line in peers()[1]:
        print(f"not installed: {line}")


if __name__ == "__main__":
    main()
