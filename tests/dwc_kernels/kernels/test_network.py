"""A tiny network trained through the interpreted kernels and through the reference learns the same."""

import pytest
import torch
import torch.nn.functional as F

from dwc.meshnet import MeshNet

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # 1 / sqrt(0), not taken


def losses(backend: str, steps: int) -> list[float]:
    """The negative log-likelihood of each step of a small network on one small volume."""
    torch.manual_seed(0)
    network = MeshNet(n_classes=3, width=5, dilations=(1, 4))
    for layer in network.layers:
        layer.backend = backend
    x = torch.randn(1, 1, 2, 4, 4)
    labels = (x[:, 0] > 0).long() + (x[:, 0] > 1).long()
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    history = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(network(x), labels)
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return history


def test_thirty_steps_end_where_the_reference_ends():
    ours, reference = losses("triton", 30), losses("reference", 30)
    assert reference[-1] < 0.7 * reference[0]
    assert abs(ours[-1] - reference[-1]) < 1e-4
