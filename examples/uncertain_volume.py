"""How large is it, and how sure is the network: `python examples/uncertain_volume.py`.

The volume of a structure is a sum over voxels. With one draw of the weights per sample the voxels err together, as they
do in truth; drawn one by one, their errors would cancel in the sum and the interval would be far too narrow.
"""

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from scans import made_scans
from torch import nn

from dwc_kernels import convert, draw_weights, kl_loss, predict, sampling

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=150)
parser.add_argument("--samples", type=int, default=50)
arguments = parser.parse_args()

torch.manual_seed(0)
images, labels = made_scans(6)
net = nn.Sequential(
    nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 3, 1)
)
convert(net, sigma_init=0.02)
optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
for _ in range(arguments.steps):
    loss = F.cross_entropy(net(images), labels) + kl_loss(net) / labels.numel()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

scan, truth = made_scans(1, seed=3)
prediction = predict(net, scan, arguments.samples, seed=0)
border = prediction.entropy > 0.5
information = prediction.mutual_information[border].mean()
print(f"voxels of high entropy: {border.sum()}; their mutual information: {information:.4f} nats")


@torch.no_grad()
def volumes(context: Callable[[int], AbstractContextManager[None]]) -> torch.Tensor:
    drawn = []
    for i in range(arguments.samples):
        with context(i):
            drawn.append(net(scan).softmax(1)[:, 1:].sum())
    return torch.stack(drawn)


net.eval()
for name, context in (
    ("drawn weights", lambda i: draw_weights(net, i)),
    ("drawn voxels", lambda i: sampling(net, True)),
):
    v = volumes(context)
    print(f"{name}: {v.mean():.0f} voxels, standard deviation {v.std():.1f}; in truth {(truth > 0).sum()}")
