"""Learn from one batch of scans, then from another without the first: `python examples/posterior_as_prior.py`.

Yesterday's posterior is today's prior (variational continual learning): what the first scans taught, and how surely, is
in the network itself.
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from scans import made_scans
from torch import nn

from dwc_kernels import FFGConv3d, SigmaProjection, kl_loss, set_prior

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=150)
steps = parser.parse_args().steps


def train(net: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    optimizer, project = torch.optim.Adam(net.parameters(), lr=1e-2), SigmaProjection(net)
    for _ in range(steps):
        loss = F.cross_entropy(net(images), labels) + kl_loss(net) / labels.numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        project()  # more scans never make a weight less certain


@torch.no_grad()
def error(net: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    net.eval()
    wrong = (net(images).argmax(1) != labels).float().mean().item()
    net.train()
    return wrong


torch.manual_seed(0)
first, second = made_scans(6, contrast=1.0, seed=1), made_scans(6, contrast=-1.0, seed=2)
net = nn.Sequential(
    FFGConv3d(1, 8, 3, padding=1, sigma_init=0.05), nn.ReLU(),
    FFGConv3d(8, 8, 3, padding=2, dilation=2, sigma_init=0.05), nn.ReLU(),
    FFGConv3d(8, 3, 1, sigma_init=0.05),
)  # fmt: skip
train(net, *first)
print(
    f"after the first scans: {error(net, *first):.1%} of their voxels wrong, {error(net, *second):.1%} of the second's"
)

forgetful = copy.deepcopy(net)
set_prior(net, net)
print(f"KL from the new prior: {kl_loss(net):.1f} nats")
for name, candidate in (("with yesterday's posterior as prior", net), ("with the old prior", forgetful)):
    train(candidate, *second)
    print(f"then the second, {name}: {error(candidate, *first):.1%} and {error(candidate, *second):.1%}")
